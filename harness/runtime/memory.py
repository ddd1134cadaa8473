"""Memory of this process: glibc's heap, which keeps or returns what torch frees, and the peak of a stage.

By default a freed block of more than a few megabytes goes back to the kernel at once, and the next one is mapped and
cleared anew, page by page: in a training step on a CPU that costs about a seventh of the time.
"""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path
from typing import Any, ClassVar

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt(3)


def retain_heap() -> None:
    """Makes the C library keep freed memory for the next allocation. Does nothing where it is not glibc."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_TOP_PAD, 2**28)


def device_memory(device: str) -> int:
    """The memory of a device (bytes), whoever uses it."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def release_memory() -> None:
    """Collects garbage (models that only reference cycles hold) and returns free memory to the kernel and the GPU."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library, or None where it is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version
        return libc
    return None


class PeakMemory:
    """Context manager: `bytes` is the largest resident memory of this process inside the block. May be nested.

    Linux keeps one high-water mark a process, which would charge a stage with the memory of a larger one before it. The
    mark is therefore reset on entering, after its value has been added to the blocks around. Where it cannot be reset,
    `bytes` is the peak of the whole process.
    """

    _open: ClassVar[list["PeakMemory"]] = []

    def __enter__(self) -> "PeakMemory":
        self._update()
        self.bytes = 0
        self._open.append(self)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        self._update()
        self._open.remove(self)

    @classmethod
    def _update(cls) -> None:
        """Adds the high-water mark to all open blocks."""
        try:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for block in cls._open:
            block.bytes = max(block.bytes, peak)
