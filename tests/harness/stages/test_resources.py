"""What `auto` stands for: recomputed activations, processes that load data, positions projected at once."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from fusion.losses.objective import CHUNK, GPU_CHUNK_BYTES, LOGIT_BYTES, chunk_size
from fusion.modeling.packing import packed_inputs
from harness.config.schema import TrainingConfig
from harness.data.sequences import collate
from harness.runtime import distributed
from harness.stages.trainer.resources import activation_bytes, loader_workers, recomputes, state_bytes

LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
PARAMETERS = 6.74e9
PAPER = TrainingConfig(deepspeed="zero2", micro_batch_size=2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def of(gigabytes: float) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(gigabytes * 1e9), int(gigabytes * 1e9)))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
        monkeypatch.setattr(distributed, "world_size", lambda: 8)
        monkeypatch.setattr(distributed, "gather", lambda value: [value] * 8)

    return of


@pytest.mark.parametrize(
    ("gigabytes", "settings", "expected"),
    [
        (80, {}, False),
        (40, {}, True),
        (40, {"gradient_checkpointing": False}, False),
        (80, {"gradient_checkpointing": True}, True),
        (80, {"micro_batch_size": 8}, True),
        (40, {"deepspeed": None, "fsdp2": True, "micro_batch_size": 1}, False),
        (140, {"deepspeed": None}, True),
    ],
)
def test_a_7b_model_is_recomputed_where_it_does_not_fit(
    gpu: Callable[[float], None], gigabytes: float, settings: dict[str, Any], expected: bool
) -> None:
    gpu(gigabytes)
    assert recomputes(PAPER.with_own(settings), LLAMA_7B, PARAMETERS, "cuda:0") is expected


def test_one_rank_without_room_has_all_recompute(gpu: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(80)
    monkeypatch.setattr(distributed, "gather", lambda value: [value, False])
    assert recomputes(PAPER, LLAMA_7B, PARAMETERS, "cuda:0")


def test_nothing_is_recomputed_on_a_cpu() -> None:
    assert not recomputes(TrainingConfig(), LLAMA_7B, PARAMETERS, "cpu")


def test_the_estimate_is_that_of_the_reproduction_page() -> None:
    assert state_bytes(PAPER, 8) * PARAMETERS == pytest.approx(27e9, rel=0.01)
    assert activation_bytes(PAPER, LLAMA_7B) == pytest.approx(2 * 2048 * 32 * 190e3, rel=0.03)


def test_a_gpu_has_loaders_and_a_cpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr(distributed, "local_world_size", lambda: 8)
    assert loader_workers(TrainingConfig(), "cuda:3") == 4
    assert loader_workers(TrainingConfig(), "cpu") == 0
    assert loader_workers(TrainingConfig(workers=7), "cpu") == 7
    monkeypatch.setattr(distributed, "local_world_size", lambda: 32)
    assert loader_workers(TrainingConfig(), "cuda:3") == 2


def test_a_chunk_of_logits_fills_its_share_of_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert chunk_size(32000, torch.device("cpu")) == CHUNK
    assert chunk_size(2_000_000, gpu) == CHUNK
    assert chunk_size(32000, gpu) * 32000 * LOGIT_BYTES == pytest.approx(GPU_CHUNK_BYTES, rel=1e-3)


def test_a_batch_knows_the_lengths_of_its_passages() -> None:
    def sequence(*lengths: int) -> dict[str, np.ndarray]:
        positions = np.concatenate([np.arange(n) for n in lengths])
        return {"input_ids": positions, "position_ids": positions, "labels": positions}

    batch = collate([sequence(3, 1, 1, 5), sequence(10), sequence(1, 9)])
    counted = packed_inputs("passages", batch["input_ids"], batch["position_ids"], torch.float32)
    assert batch["passage_lengths"] == counted["passage_lengths"] == [[3, 1, 1, 5], [10], [1, 9]]
