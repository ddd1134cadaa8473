"""The objective against the published collator and loss, run on features with random logits (the reference inputs)."""

import gzip
import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion.alignment.projection import fill_unaligned
from fusion.alignment.selection import FUSIONS, SourceScores
from fusion.losses.objective import Head, MixedLoss, Objective, mixed_loss
from fusion.losses.sparse_cross_entropy import SparseCrossEntropy
from fusion.switches import PRESETS, Switches
from fusion.types import Sparse
from tests.shared import shared

RELATIVE = 2e-3  # the published code keeps probabilities in bfloat16, ours are float32
SOURCES = ("", "_aligned_0", "_aligned_1")  # suffixes of a feature's keys: the target itself and two aligned sources
CASES = [(case, mode) for case in (0, 1) for mode in ("mince", "avgce")]


def oracle(case: int) -> dict[str, Any]:
    with gzip.open(shared("oracle/objective/published.json.gz"), "rt") as file:
        return json.load(file)[case]


def sparse(scores: list[list[float]], indices: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """ids[n, k] and softmax(scores)[n, k] of lists of unequal length."""
    ids = np.full((len(indices), max(map(len, indices))), -1, np.int32)
    p = np.zeros(ids.shape)
    for row, (score, index) in enumerate(zip(scores, indices, strict=True)):
        if index:
            e = np.exp(np.array(score) - max(score))
            ids[row, : len(index)], p[row, : len(index)] = index, e / e.sum()
    return ids, p


def target(feature: dict[str, Any], mode: str) -> Sparse:
    """What the preset `published` makes of a feature's three aligned distributions and their mean cross-entropies."""
    switches = Switches(**PRESETS["published"], fusion=mode)
    current = np.array(feature["input_ids"], np.int32)
    n, members = len(current), []
    for suffix in SOURCES:
        name = f"per_step{suffix}_logits" if suffix == "" else f"per_step_aligned_logits{suffix[-2:]}"
        ids, p = sparse(feature[name], feature[name.replace("logits", "indices")])
        own = (lambda: members[0]) if members else None
        gold = np.append(current[1:], -1)
        members.append(
            fill_unaligned(ids, p, np.arange(n), gold=gold, current=current, switches=switches, own=own)[0],
        )
    nats = np.array([[feature[f"metric_ce{suffix}"]] for suffix in SOURCES])
    scores = SourceScores(
        ("base", "source_0", "source_1"), nats, np.ones((3, 1), int), np.ones(1, int), np.zeros(n, int)
    )
    return FUSIONS.get(mode)(members, scores, switches)[0]


def target_in_bfloat16(feature: dict[str, Any], mode: str, vocabulary: int) -> Sparse:
    """The same as the published collator rounds it; its probabilities do not sum to 1."""
    dense = []
    for suffix in SOURCES:
        name = f"per_step{suffix}_logits" if suffix == "" else f"per_step_aligned_logits{suffix[-2:]}"
        rows = torch.zeros(len(feature["input_ids"]), vocabulary, dtype=torch.bfloat16)
        for t, (scores, index) in enumerate(
            zip(feature[name], feature[name.replace("logits", "indices")], strict=True)
        ):
            if index:
                rows[t, index] = torch.tensor(scores, dtype=torch.bfloat16).softmax(-1)
            else:
                rows[t] = dense[0][t]
        dense.append(rows)
    rewards = torch.exp(-torch.tensor([feature[f"metric_ce{suffix}"] for suffix in SOURCES], dtype=torch.bfloat16))
    if mode == "mince":
        fused = dense[int(rewards.argmax())]
    else:
        first, *rest = (weight * rows for weight, rows in zip(rewards.softmax(0), dense, strict=True))
        fused = sum(rest, first)  # one after the other: each sum is rounded
    p, ids = fused.float().topk(int((fused > 0).sum(1).max()))
    return Sparse(torch.where(p > 0, ids, -1).int().numpy(), p.numpy(), np.zeros(len(p), np.float32))


def our_loss(case: dict[str, Any], targets: list[Sparse], logits: Tensor) -> MixedLoss:
    """Both terms as the published loss averages them: CLM over next tokens, fusion over the unshifted mask."""
    batch, width, _ = logits.shape
    entries = len(SOURCES) * 8
    gold, clm_weight, fusion_weight = (
        torch.full((batch, width), -1),
        torch.zeros(batch, width),
        torch.zeros(batch, width),
    )
    ids, p = torch.full((batch, width, entries), -1), torch.zeros(batch, width, entries)
    for row, (feature, fused) in enumerate(zip(case["features"], targets, strict=True)):
        n = len(feature["input_ids"])
        gold[row, : n - 1] = torch.tensor(feature["labels"][1:])
        clm_weight[row, : n - 1] = 1
        fusion_weight[row, :n] = torch.tensor(feature["attention_mask"], dtype=torch.float)
        ids[row, :n, : fused.ids.shape[1]] = torch.from_numpy(fused.ids).long()
        p[row, :n, : fused.p.shape[1]] = torch.from_numpy(fused.p)
        assert not fused.tail.any()
    term = SparseCrossEntropy(
        ids.flatten(0, 1),
        p.flatten(0, 1),
        torch.zeros(batch * width),
        (fusion_weight / fusion_weight.sum()).flatten(),
    )
    weight = (clm_weight / clm_weight.sum()).flatten()
    objective = Objective(gold.flatten(), weight, case["lambda_"], term, chunk=7)
    return mixed_loss(logits.flatten(0, 1), Head(torch.eye(case["V"], dtype=logits.dtype)), objective)


@pytest.mark.parametrize("rounded", [False, True], ids=["preset", "rounded"])
@pytest.mark.parametrize(("number", "mode"), CASES)
def test_value_and_gradient_are_the_published_ones(number: int, mode: str, rounded: bool) -> None:
    """The preset to what bfloat16 allows; given the published code's own rounded targets, the objective much closer."""
    case = oracle(number)
    make = (lambda f: target_in_bfloat16(f, mode, case["V"])) if rounded else (lambda f: target(f, mode))
    targets = [make(feature) for feature in case["features"]]
    tolerance = 1e-5 if rounded else RELATIVE
    logits = torch.tensor(case["logits"], dtype=torch.float64, requires_grad=True)
    ours = our_loss(case, targets, logits)
    ours.total.backward()
    assert logits.grad is not None
    expected = {e["loss_type"]: e for e in case["expected"] if e["mode"] == mode}
    lam = case["lambda_"]
    assert float(ours.clm) == pytest.approx(expected["ce"]["clm"], rel=1e-5)
    assert float(ours.total.detach()) == pytest.approx(expected["ce"]["loss"], rel=tolerance)
    # At lambda 0.9 most of the loss is CLM, which would hide an error in the rest.
    fusion = {kind: (e["loss"] - lam * e["clm"]) / (1 - lam) for kind, e in expected.items()}
    assert float(ours.fusion) == pytest.approx(fusion["ce"], rel=tolerance)
    # The divergence differs from the cross-entropy by the entropy of the target: another value, the same gradient.
    p = np.concatenate([t.p for t in targets]).astype(float)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum() / len(p)
    assert float(ours.fusion) - entropy == pytest.approx(fusion["kl"], rel=max(tolerance, 1e-4))
    for kind in ("ce", "kl"):
        assert float(logits.grad.norm()) == pytest.approx(expected[kind]["grad_norm"], rel=tolerance)
        corner = torch.tensor(expected[kind]["grad_head"], dtype=torch.float64)
        # 24 numbers, of which few hold a p: its rounding (of the logits too, 2^-8 at worst) is not averaged out.
        assert float((logits.grad[0, :3, :8] - corner).norm()) <= (1e-4 if rounded else 2**-8) * float(corner.norm())
