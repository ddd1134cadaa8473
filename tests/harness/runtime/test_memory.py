"""The peak memory of a stage, and the heap that keeps or returns freed memory."""

import subprocess
import sys

import numpy as np
import pytest

from harness.runtime.memory import PeakMemory, release_memory

MEGABYTE = 2**20


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can set the high-water mark back")
def test_a_stage_is_not_charged_with_the_memory_of_the_one_before() -> None:
    release_memory()
    with PeakMemory() as around:
        with PeakMemory() as large:
            np.ones(400 * MEGABYTE, np.uint8)
        release_memory()  # as between stages; another test may have had freed memory kept
        with PeakMemory() as small:
            np.ones(10 * MEGABYTE, np.uint8)
    assert large.bytes - small.bytes > 300 * MEGABYTE
    assert around.bytes >= large.bytes


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc's heap is told what to do")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    """In a process of its own: what is told to the heap cannot be taken back."""
    code = """
import numpy as np, psutil
from harness.runtime.memory import retain_heap, release_memory
resident = lambda: psutil.Process().memory_info().rss
retain_heap()
before = resident()
np.ones(200 * 2**20, np.uint8)
assert resident() - before > 150 * 2**20
release_memory()
assert resident() - before < 50 * 2**20
"""
    subprocess.run([sys.executable, "-c", code], check=True)
