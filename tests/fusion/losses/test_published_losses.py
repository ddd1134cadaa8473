"""Losses against what published code answers (`../shared/oracle/methods`; each file's `source` says what made it)."""

import gzip
import json
from typing import Any

import numpy as np
import pytest
import torch

from fusion.losses.alm import binary_divergence
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.infifusion import InfiFusionLoss
from fusion.losses.loss import LossResources
from fusion.losses.uld import ULDLoss
from fusion.types import Predictions
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


def whole(logits: torch.Tensor, temperature: float = 1.0) -> Predictions:
    """Predictions of tokens of one byte with every entry stored, from logits[M - 1, V]; nothing follows the last."""
    m = len(logits) + 1
    log_p = (logits.detach() / temperature).log_softmax(-1)
    log_p = torch.cat([log_p, log_p[-1:]])
    top, ids = log_p.sort(descending=True)
    std = logits.detach().std(-1, unbiased=False)
    spread = torch.stack([std, ((logits.detach().log_softmax(-1)) / std[:, None]).logsumexp(-1)], -1)
    return Predictions(
        tokens=np.arange(m, dtype=np.int32),
        byte_ends=np.arange(m, dtype=np.int32),
        ids=ids.int().numpy(),
        log_p=top.numpy(),
        tail=np.zeros(m),
        nll=np.ones(m),
        spread=torch.cat([spread, spread[-1:]]).numpy(),
    )


def features_of(loss: Any, teacher: Predictions, own: Predictions) -> dict[str, torch.Tensor]:
    found = loss.features([{"a": teacher, "target": own}], [len(own.tokens) - 1], LossResources("target", {}))
    return {name: torch.from_numpy(array) for name, array in found.items()}


def test_uld_of_its_own_code() -> None:
    """The n-th token of the answer with the n-th, the mean of each sample and then of the samples."""
    found = oracle("uld")
    compared = 0
    for case in found["cases"]:
        settings = case["settings"]
        if case["code"] != "original":
            continue
        temperature, cut = settings.get("student_temperature", 1.0), int("skip_student_eos" in settings)
        means = []
        for sample in range(2):
            rows = []
            for side in ("teacher", "student"):
                labelled = np.flatnonzero(np.array(found[f"{side}_labels"][sample]) != -100)
                answer = double(found[f"{side}_logits"][sample])[labelled[0] - 1 : labelled[-1]]
                rows.append(answer[: len(answer) - cut])
            loss = ULDLoss(["a"], pairing="index", temperature=temperature)
            features = features_of(loss, whole(rows[0], temperature), whole(rows[1]))
            logits = torch.cat([rows[1], rows[1][-1:]])
            distance, weight = loss(logits, features), features["weight"]
            means.append(float(distance.sum() / weight.sum()))
        assert sum(means) / 2 == pytest.approx(case["loss"], rel=1e-5)
        compared += 1
    assert compared == 3


def test_alm_of_tokenkit_without_debiasing() -> None:
    """Cross-entropy of tokenkit is our divergence and the entropy of the teacher's two outcomes."""
    found = oracle("alm")
    a, b = (double([x for row in found["check"][f"{s}_chunk_nats"] for x in row if x]) for s in ("teacher", "student"))
    losses = {
        (case["alm_diff_fn"], case["binarization_temp"]): case["loss"]
        for case in reversed(found["cases"])
        if (case["chunks"], case["alm_mode"]) == ("unconstrained", "") and not case.keys() & {"distill_chunk_sizes"}
    }
    p = (-a).exp()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    assert float((binary_divergence(a, b, 1.0) + entropy).mean()) == pytest.approx(losses["binary_ce", 1.0], rel=1e-5)
    limit = losses["binary_kl_temp_limit", 100.0]
    assert float(binary_divergence(a, b, 1e6).mean()) == pytest.approx(limit, rel=1e-5)


def test_infifusion_by_hand() -> None:
    for case in oracle("hand")["infifusion_top_k_uld"]["cases"]:
        teacher, student = (double([case[f"{side}_logits"]]) for side in ("teacher", "student"))
        loss = InfiFusionLoss(["a"], top_k=case["k"])
        features = features_of(loss, whole(teacher), whole(student))
        np.testing.assert_allclose(features["p"][0, 0], case["teacher_top_k_from_stored_log_p_sigma_and_log_z"])
        found = loss(torch.cat([student, student]), features)
        assert float(found[0]) == pytest.approx(case["loss_top_k"], rel=1e-6) and found[1] == 0


def test_infifusion_with_the_whole_vocabulary_is_its_definition() -> None:
    """Values and gradients in float64, with a teacher of a larger vocabulary."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = (torch.randn(5, v, generator=generator, dtype=torch.float64) for v in (13, 11))
    student.requires_grad_()
    features = features_of(InfiFusionLoss(["a"], top_k=13), whole(teacher), whole(student))
    ours = InfiFusionLoss(["a"], top_k=13)(torch.cat([student, student[-1:]]), features).sum()
    p, q = (
        (z / z.std(-1, unbiased=False, keepdim=True)).softmax(-1).sort(descending=True)[0] for z in (teacher, student)
    )
    theirs = (p - torch.nn.functional.pad(q, (0, 2))).abs().sum()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(one, student)[0] for one in (ours, theirs)))
