"""Environment variables by which libraries would compute otherwise than the configuration says."""

import os

from harness.runtime.progress import notify

_PREFIXES = ("ACCELERATE_", "FSDP_", "FP8_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
"""Of accelerate: precision, device, sharding, compilation and DeepSpeed, as `accelerate launch` sets them."""
_NAMES = {
    "DNNL_DEFAULT_FPMATH_MODE",  # products of float32 in bfloat16 on a CPU
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",  # products of float32 with 10 bits of mantissa on a GPU
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "XLA_DOWNCAST_BF16",
    "XLA_USE_BF16",
}
_HARMLESS = {"ACCELERATE_LOG_LEVEL", "ACCELERATE_DEBUG_MODE", "ACCELERATE_ENABLE_RICH"}
_OFF = {"", "0", "no", "false", "none"}


def ignore_overrides() -> None:
    """Removes the variables from this process's environment, and says which of them would have changed something.

    To be called before a model is loaded and after the ranks are connected, since a launcher is known by some of them.
    """
    found = {
        name: os.environ.pop(name)
        for name in sorted(os.environ)
        if (name.startswith(_PREFIXES) or name in _NAMES) and name not in _HARMLESS
    }
    named = [f"{name}={value}" for name, value in found.items() if value.lower() not in _OFF]
    if named:
        notify(f"{', '.join(named)}: ignored, for the configuration alone decides how is computed.")
