"""Losses against what published code answers (`../shared/oracle/methods`; each file's `source` says what made it)."""

import gzip
import json
from typing import Any

import pytest
import torch

from fusion.losses.divergences import DIVERGENCES
from tests.shared import shared


def oracle(name: str) -> Any:
    with gzip.open(shared(f"oracle/methods/{name}.json.gz"), "rt") as file:
        return json.load(file)


def double(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_generalised_jensen_shannon_divergence_of_trl() -> None:
    """Without TRL's jump at 0 and 1, where it has forward and reverse KL."""
    found = oracle("gkd")
    teacher, labelled = double(found["teacher_logits"]), torch.tensor(found["labels"]) != -100
    for case in found["jsd"]:
        student = double(found["student_logits"]).requires_grad_()
        beta = case["beta"]
        name = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, {"name": "jensen_shannon", "beta": beta})
        log_p, log_q = ((z / case["temperature"]).log_softmax(-1) for z in (teacher, student))
        loss = DIVERGENCES.choose(name).value(log_p, log_q)[labelled].mean()
        assert float(loss.detach()) == pytest.approx(case["loss"], rel=1e-5)
        if "gradient" in case:
            (gradient,) = torch.autograd.grad(loss, student)
            torch.testing.assert_close(gradient, double(case["gradient"]), rtol=1e-5, atol=1e-9)
