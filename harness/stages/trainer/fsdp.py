"""FSDP2 (`torch.distributed.fsdp.fully_shard`): every rank has a part of each weight, its gradient and its moments.

accelerate shards the model, a decoder layer at a time, from meta tensors: the main process reads the weights and deals
them out. Checkpoints are `torch.distributed.checkpoint`'s, so that another number of ranks goes on from them.
"""

import os
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from harness.runtime import distributed

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainingArguments


def check_launched() -> None:
    """Raises UserError where this process was started by no launcher."""
    if not distributed.launched():
        raise UserError(f"training.fsdp2 = true needs a process for each GPU: start them with {distributed.COMMAND}.")


def fsdp_arguments(*, recompute: bool) -> dict[str, Any]:
    """What the Trainer is told so that it trains with FSDP2, recomputing activations if asked to."""
    settings = {
        "version": 2,
        "state_dict_type": "SHARDED_STATE_DICT",
        "cpu_ram_efficient_loading": True,  # the other ranks' weights are never read
        "activation_checkpointing": recompute,
    }
    return {"fsdp": True, "fsdp_config": settings}


def keep_precision(arguments: "TrainingArguments") -> None:
    """Has weights and gradients travel in float32, and nothing be rounded on its way into the model or out of it.

    accelerate would have sums of gradients, the losses and stored probabilities in bfloat16. Under autocast products
    are in bfloat16 as without FSDP, so that the weights are the same but for the order of sums.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    assert arguments.fsdp_plugin_args is not None
    arguments.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(cast_forward_inputs=False)


def whole_weights(model: "nn.Module") -> "dict[str, Tensor]":
    """All weights in float32 on the CPU of the main process, each gathered from the ranks; to be called by all.

    Empty on the other ranks.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    whole: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return {name: value for name, value in whole.items() if name not in tied}


def release() -> None:
    """Lets go of a finished training: while these are set, accelerate shards unasked and models are loaded empty."""
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        os.environ.pop(name, None)
