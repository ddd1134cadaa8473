"""What `auto` stands for in the training settings, on the device at hand."""

import os
from typing import Any

from harness.config.schema import TrainingConfig
from harness.runtime import distributed
from harness.stages.trainer.sharding import zero_stage

_WORKERS = 4
"""Loader processes that keep a GPU busy: a sequence takes tens of milliseconds to fuse, a training step hundreds."""
_OTHER = 6e9
"""Bytes of a GPU for what is not counted: buckets of gradients, logits of a chunk, cuBLAS, NCCL and fragmentation."""


def loader_workers(config: TrainingConfig, device: str) -> int:
    """The processes that load data for this rank; `auto`: none on a CPU, whose cores compute, and a few for a GPU.

    One core is left for the training process.
    """
    if config.workers != "auto":
        return config.workers
    if not device.startswith("cuda"):
        return 0
    cores = len(os.sched_getaffinity(0)) // distributed.local_world_size()
    return max(1, min(_WORKERS, cores - 1))


def recomputes(config: TrainingConfig, model_config: Any, parameters: float, device: str) -> bool:
    """Whether activations are recomputed in the backward pass; `auto`: on a GPU that would not hold them.

    parameters: of the model. Called by all ranks, which do the same: the one with the least memory decides.
    """
    if config.gradient_checkpointing != "auto":
        return config.gradient_checkpointing
    fits = True
    if device.startswith("cuda"):
        import torch

        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        needed = state_bytes(config, distributed.world_size()) * parameters + activation_bytes(config, model_config)
        fits = needed + _OTHER <= free
    return not all(distributed.gather(fits))


def state_bytes(config: TrainingConfig, ranks: int) -> float:
    """Bytes a parameter that a rank holds: weights, gradients and Adam's moments, in parts where they are divided.

    Data parallelism: float32 weights (4), gradients (4), the buckets in which they are added up (4), moments (8) and
    the short copy that autocast keeps (2). ZeRO: short weights (2), float32 gradients (4), float32 weights and moments
    (12).
    """
    stage = zero_stage(config.deepspeed)
    if config.fsdp2:
        return 16 / ranks
    if stage is None:
        return 22 if ranks > 1 else 18
    whole, parts = {1: (6, 12), 2: (2, 16), 3: (0, 18)}[stage]
    return whole + parts / ranks


def activation_bytes(config: TrainingConfig, model_config: Any) -> float:
    """Bytes of the activations of a micro batch that the backward pass needs, under flash attention and autocast.

    In a decoder layer some 12 vectors of the hidden size and 4 of the size of the feed-forward network, of two bytes
    each, at every position (190 kB at 7B).
    """
    text = model_config.get_text_config()
    hidden, layers = int(text.hidden_size), int(text.num_hidden_layers)
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    return config.micro_batch_size * config.sequence_length * layers * 2.0 * (12 * hidden + 4 * inner)
