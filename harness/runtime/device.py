"""The device that a process computes on, and the precision that it computes in."""

import importlib.metadata
import os
from pathlib import Path
from typing import Literal

from fusion.errors import UnknownName, UserError
from harness.runtime.distributed import COMMAND, launched, local_rank
from harness.runtime.memory import retain_heap
from harness.runtime.progress import notify

DType = Literal["auto", "float32", "bfloat16", "float16"]

_NO_CUDA = "device is cuda, but this machine has no CUDA device that torch can use: set device=cpu."
_GPU_FILES = ("nvidia*", "nvhost*", "nvmap", "nvgpu", "kfd", "dxg")
"""Device files of NVIDIA's drivers, of Jetson boards, of ROCm (which torch calls CUDA, too) and of WSL."""


def refuse_missing_device(device: str) -> None:
    """Raises UserError for device `cuda` where torch was built without CUDA or the machine has no driver of a GPU.

    Importing torch to ask takes seconds; what passes here is still checked by `usable_device`.
    """
    if device != "cuda":
        return
    try:
        built_for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return  # the import of torch ends in a sentence about it
    dev = Path("/dev")
    without_driver = dev.is_dir() and not any(next(dev.glob(pattern), None) for pattern in _GPU_FILES)
    if built_for_cpu or without_driver:
        raise UserError(_NO_CUDA)


def usable_device(device: str, *, dry: bool, one_gpu: bool = False) -> str:
    """The device of this process (`cpu`, `cuda`, or `cuda:RANK` under a launcher) for `auto`, `cpu` or `cuda`.

    Where several GPUs are visible to one process it takes the first and says so if `one_gpu`; no library of it sees the
    others then. Otherwise, and unless it is `dry`, UserError is raised, as it is where there is no device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UnknownName("device", device, ("auto", "cpu", "cuda"))
    import torch

    if device != "cpu" and torch.cuda.is_available():
        n, own = torch.cuda.device_count(), local_rank()
        if own >= n:
            raise UserError(f"This machine has {n} CUDA devices, but its rank {own} needs one more: start {n} ranks.")
        if n > 1 and not launched() and one_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
            notify(f"{n} GPUs are visible, of which one process uses the first: torchrun starts one for each.")
        elif n > 1 and not launched() and not dry:
            raise UserError(
                f"A process uses one GPU and {n} are visible: start one for each with {COMMAND}, or set "
                "CUDA_VISIBLE_DEVICES to one of them."
            )
        return f"cuda:{own}" if launched() else "cuda"
    if device == "cuda":
        raise UserError(_NO_CUDA)
    # DeepSpeed would otherwise detect an accelerator and warn on standard output, which is for tables.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    retain_heap()
    return "cpu"


def compute_dtype(dtype: DType, device: str) -> Literal["float32", "bfloat16", "float16"]:
    """The precision that `auto` stands for on `device`: bfloat16 where it is native, else float32."""
    if dtype != "auto":
        return dtype
    import torch

    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return "bfloat16" if native else "float32"
