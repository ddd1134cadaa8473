"""The C library's heap: what torch frees on a CPU is kept for the next tensor, and given back between stages.

By default a freed block of more than a few megabytes goes back to the kernel at once, and the next one is mapped and
cleared anew, page by page: in a training step on a CPU that costs about a seventh of the time.
"""

import contextlib
import ctypes
import gc
from typing import Any

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt(3)


def retain_heap() -> None:
    """Has freed memory stay in this process. Does nothing where the C library is not glibc."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, -1)
        libc.mallopt(_TOP_PAD, 2**28)


def trim_heap() -> None:
    """Returns what is free to the kernel, models that only cycles hold among it."""
    gc.collect()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        _ = libc.gnu_get_libc_version
        return libc
    return None
