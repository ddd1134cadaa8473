"""What a manifest says about the making of an artifact."""

import sys

import numpy as np
import pytest

from harness.artifacts import PeakMemory

MEGABYTE = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can set the high-water mark back")
def test_a_stage_is_not_charged_with_the_memory_of_the_one_before() -> None:
    with PeakMemory() as around:
        with PeakMemory() as large:
            np.ones(400 * MEGABYTE, np.uint8)
        with PeakMemory() as small:
            np.ones(10 * MEGABYTE, np.uint8)
    assert large.bytes - small.bytes > 300 * MEGABYTE
    assert around.bytes >= large.bytes
