"""The expected cost of a stage: disk, memory and time, from parameter counts and a short measurement of the machine.

These are estimates for a plan: 2 floating-point operations a parameter and token forward, 6 in training, and the rate
of matrix products (arXiv 2001.08361, section 2.1).
"""

import time
from functools import cached_property

from harness.runtime.device import compute_dtype
from harness.store.artifacts import Estimate

BYTES_PER_TOKEN = 4.0  # of text, typical for vocabularies of 32k and more
_EFFICIENCY = 0.5  # fraction of the rate of a matrix product that a whole model reaches


class Costs:
    """Estimates for one device."""

    def __init__(self, device: str) -> None:
        self.device = device

    @cached_property
    def flops(self) -> float:
        """Floating-point operations a second that a model reaches here, on all visible GPUs together."""
        import torch

        size = 4096 if self.device.startswith("cuda") else 1024
        dtype = getattr(torch, compute_dtype("auto", self.device))
        a = torch.ones(size, size, device=self.device, dtype=dtype)
        a @ a
        started, n = time.perf_counter(), 0
        while time.perf_counter() - started < 0.1:
            float((a @ a)[0, 0])
            n += 1
        rate = 2 * size**3 * n / (time.perf_counter() - started)
        devices = max(1, torch.cuda.device_count()) if self.device.startswith("cuda") else 1
        return rate * devices * _EFFICIENCY

    def forward(self, parameters: float, n_bytes: float, *, disk_per_token: float = 0, batch: int = 2048) -> Estimate:
        """The cost of one forward pass of a model over `n_bytes` of text.

        `parameters`: number of parameters; `disk_per_token`: bytes stored a position; `batch`: tokens a batch.
        """
        tokens = n_bytes / BYTES_PER_TOKEN
        return Estimate(
            disk=tokens * disk_per_token,
            memory=4 * parameters + 4 * 20_000 * batch,
            seconds=2 * parameters * tokens / self.flops,
        )

    def training(self, parameters: float, tokens: float) -> Estimate:
        """The cost of a training on `tokens` tokens: float32 weights, gradients and moments; a checkpoint on disk."""
        return Estimate(disk=4 * parameters, memory=18 * parameters, seconds=6 * parameters * tokens / self.flops)
