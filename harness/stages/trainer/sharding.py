"""DeepSpeed's ZeRO: what its configuration may say, and the weights that it has partitioned put together again."""

import functools
import gc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError, did_you_mean
from harness.runtime import distributed
from harness.store.files import read_json_object
from harness.store.paths import PRESETS

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

_SHIPPED = PRESETS / "deepspeed"
# What the training settings say; the Trainer fills it in.
_FILLED: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    # DeepSpeed's own default adds gradients up in bfloat16.
    "data_types": {"grad_accum_dtype": "fp32"},
}
_REFUSED = ("optimizer", "scheduler", "fp16", "amp")


def zero_config(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration of a name that ships with the harness, or of a JSON file.

    Raises UserError where there is none, where it is none of ZeRO-1 to 3, and where it sets what `training` sets: a
    batch, an optimiser or a precision of its own would make this row of the table another training than the others.
    """
    shipped = sorted(p.name.removesuffix(".json") for p in _SHIPPED.iterdir())
    file = _SHIPPED / f"{name}.json" if name in shipped else Path(name)
    if not file.is_file():
        raise UserError(
            f"training.deepspeed = {name!r} is no JSON file and none of {', '.join(shipped)}"
            f"{did_you_mean(name, shipped)}: correct it."
        )
    config = read_json_object(Path(str(file)), "correct it, or training.deepspeed")
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        raise UserError(f"{file} does not say which stage of ZeRO it is: set zero_optimization.stage to 1, 2 or 3.")
    for key in _REFUSED:
        if key in config:
            raise UserError(f"{file} has its own {key}, which the training settings set: remove it.")
    for key, filled in _FILLED.items():
        if config.setdefault(key, filled) != filled:
            raise UserError(f"{file} sets {key}, which follows from the training settings: remove it.")
    return config


def zero_stage(name: str | None) -> int | None:
    """The stage of ZeRO of a DeepSpeed configuration; None without one."""
    return int(zero_config(name)["zero_optimization"]["stage"]) if name else None


def check_usable(name: str) -> None:
    """Raises UserError where this process cannot train with the configuration `name`, or there is none."""
    zero_config(name)
    if not distributed.launched():
        raise UserError(
            f"training.deepspeed = {name!r} needs a process for each GPU: start them with {distributed.COMMAND}."
        )
    if find_spec("deepspeed") is None:
        raise UserError(
            f"training.deepspeed = {name!r} needs the package deepspeed: install fusellm-harness[deepspeed]."
        )


def without_own_ops() -> None:
    """Has DeepSpeed do with torch's own operations, where it would compile a collective of its own for the CPU.

    It would need a compiler, half a minute, and a line on standard output, where tables go.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def whole_weights(model: "nn.Module", *, keep: bool) -> "dict[str, Tensor]":
    """All weights in float32 on the CPU, each gathered from the ranks; to be called by all of them.

    Also where the model itself is in bfloat16: the optimiser's own copies are. Empty without `keep`.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    whole = {name: value for name, value in model.state_dict().items() if name not in parameters.keys() | tied}
    for name, parameter in parameters.items():  # one at a time: together they may be more than a GPU holds
        value = safe_get_full_fp32_param(parameter)
        if keep:
            whole[name] = value.detach().cpu()
    return whole if keep else {}


def release(accelerator: "Accelerator") -> None:
    """Lets go of a finished training, so that the next one has its memory and models are loaded whole again."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    accelerator.free_memory()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # while it is set, accelerate trains with DeepSpeed unasked
    unset_hf_deepspeed_config()  # while it is set, `from_pretrained` partitions under ZeRO-3
    # DeepSpeed 0.19 leaves what it has partitioned on a stack and in caches of its methods.
    FWD_MODULE_STACK.clear()
    for found in gc.get_objects():
        if type(found) is functools._lru_cache_wrapper and found.__module__.startswith("deepspeed.runtime.zero"):
            found.cache_clear()
