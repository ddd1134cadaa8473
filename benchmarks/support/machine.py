"""What this machine is, what it can do at most, and how time and memory are taken on it."""

import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np

from harness.runtime.memory import PeakMemory

T = TypeVar("T")
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "numba", "rapidfuzz", "safetensors", "pyarrow")


def facts() -> list[tuple[str, str]]:
    """What the numbers depend on."""
    import psutil
    import torch

    from harness.runtime.device import compute_dtype

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _LIBRARIES)
    return [
        ("processor", f"{_processor()}, {cores()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB of memory"),
        ("threads", f"{torch.get_num_threads()} in torch, {cores()} in the search of a map, one elsewhere"),
        ("dtype", f"models compute in {compute_dtype('auto', 'cpu')}, weights and objective in float32"),
        ("software", f"{platform.system()}, Python {sys.version.split()[0]}, {versions}"),
        ("load", f"{os.getloadavg()[0]:.1f} processes in the minute before the first measurement"),
    ]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(run: Callable[[], Any], *, repeat: int = 7, warm: bool = True) -> float:
    """The median wall-clock seconds of `run()`; a first call, which compiles and fills caches, is not counted."""
    if warm:
        run()
    taken = []
    for _ in range(repeat):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """What `function` gives in a process that has only imported, whose memory is therefore its own."""
    context = get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_beyond(run: Callable[[], Any]) -> int:
    """Bytes of resident memory that `run()` takes at its height beyond what was resident before."""
    before = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with PeakMemory() as peak:
        run()
    return peak.bytes - before


@cache
def bandwidth() -> float:
    """Bytes a second that one thread copies in memory, read and written bytes both counted."""
    source = np.ones(16 * 2**20, np.float64)
    target = np.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: np.copyto(target, source))


@cache
def matmul(dtype: str) -> float:
    """Floating-point operations a second of a large matrix product, on all of torch's threads."""
    import torch

    a, b = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * 2048**3 / seconds(lambda: a @ b, repeat=5)


@cache
def integer_operations() -> float:
    """Operations a second on 64-bit integers, in one thread's vector units: shifts and exclusive ors in registers."""
    state = np.arange(1, 129, dtype=np.uint64)
    rounds = 100_000
    return 6 * rounds * len(state) / seconds(lambda: _xorshift(state, rounds))


@numba.njit(cache=True)
def _xorshift(state: np.ndarray, rounds: int) -> None:
    for block in range(0, len(state), 32):
        part = state[block : block + 32].copy()
        for _ in range(rounds):
            for lane in range(32):
                x = part[lane]
                x ^= x << np.uint64(13)
                x ^= x >> np.uint64(7)
                part[lane] = x ^ (x << np.uint64(17))
        state[block : block + 32] = part
