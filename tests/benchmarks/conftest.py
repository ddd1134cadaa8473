"""The small experiment that the benchmarks are tried on."""

from tests.harness.conftest import experiment_file, made

__all__ = ["experiment_file", "made"]
