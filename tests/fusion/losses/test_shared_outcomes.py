"""Losses over the tokens that both vocabularies have: SimCT against its published code, strict by hand."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.losses.loss import Loss
from fusion.losses.simct import SimCTLoss
from fusion.losses.strict import StrictLoss
from tests.fusion.losses.oracles import oracle, predictions, resources, value_and_gradient, vocabulary

DIVERGENCES = {"rkl": "reverse_kl", "kl": "forward_kl", "jsd": "jensen_shannon"}


def test_simct_is_the_published_loss_on_log_probabilities() -> None:
    """On the published code's segments and on the paper's; raw logits, which no store holds, give other numbers."""
    found = oracle("simct")
    own_words = vocabulary(found["student_vocab"], eos=0)
    compared = []
    for case in found["cases"]:
        if not case["logits_are_log_probabilities"]:
            continue
        words = vocabulary(found["teacher_vocab" if case["teacher"] == "A" else "teacher2_vocab"], eos=0)
        for run in case["runs"]:
            on_shared_ends = "shared byte ends" in run["class"]
            if run["class"] != "SpanCrossTokenizerKD" and not on_shared_ends:
                continue
            if run["kd_temperature"] != 1 or run["kd_ratio"] != 1:
                continue
            segments: Any = "shared_ends" if on_shared_ends else "published"
            loss = SimCTLoss(["t"], DIVERGENCES[run["kd_loss_fn"]], segments)
            total = 0.0
            for n, tokens in enumerate(case["student_ids"]):
                its = case["teacher_ids"][n]
                passage = {
                    "target": predictions(own_words, tokens, case["student_logits"][n][: len(tokens)]),
                    "t": predictions(words, its, case["teacher_logits"][n][: len(its)]),
                }
                logits = torch.tensor(case["student_logits"][n][: len(tokens)])
                nats, gradient = value_and_gradient(loss, passage, resources(own_words, t=words), logits)
                if "per_segment" in run:
                    assert nats[nats != 0].tolist() == pytest.approx(run["per_segment"][n], rel=1e-5)
                if "grad_student_logits" in run:
                    theirs = torch.tensor(run["grad_student_logits"][n])[: len(tokens)].double()
                    scaled = _through_log_softmax(theirs, logits.double()) * run["avg_micro_batch_token_num"]
                    assert (gradient - scaled).norm() <= 1e-5 * scaled.norm()
                total += float(nats.sum()) / run["avg_micro_batch_token_num"]
            assert total == pytest.approx(run["loss"], rel=1e-5)
            compared.append((case["teacher"], segments, run["kd_loss_fn"]))
    assert len(set(compared)) == 12


def _through_log_softmax(gradient: Tensor, log_p: Tensor) -> Tensor:
    """The gradient on logits whose log-softmax it is given on."""
    return gradient - log_p.exp() * gradient.sum(-1, keepdim=True)


S, T = ["<s>", "a", "b", "c", "x"], ["<s>", "a", "b", "c", "y"]
P_S, P_T = [1e-30, 0.5, 0.2, 0.1, 0.2], [1e-30, 0.4, 0.4, 0.1, 0.1]


@pytest.mark.parametrize(
    ("k", "settings", "expected"),
    [
        (5, {}, 0.08396),
        (5, {"top": 2}, 0.09488),
        (2, {"renormalise": False}, 0.09458),
        # The tail .2 is taken for that of c: p .4 .4 .2 against q .625 .25 .125.
        (2, {}, 0.625 * math.log(0.625 / 0.4) + 0.25 * math.log(0.25 / 0.4) + 0.125 * math.log(0.125 / 0.2)),
    ],
)
def test_strict_by_hand(k: int, settings: dict[str, Any], expected: float) -> None:
    own, words = vocabulary(S, 1), vocabulary(T, 1)
    logits, its_logits = (torch.tensor([p, p], dtype=torch.float64).log() for p in (P_S, P_T))
    passage = {"target": predictions(own, [0, 1], logits), "t": predictions(words, [0, 1], its_logits, k)}
    nats, _ = value_and_gradient(StrictLoss(["t"], **settings), passage, resources(own, t=words), logits)
    assert nats.tolist() == pytest.approx([expected, 0], abs=1e-5)


def test_strict_adds_the_squared_difference_of_spans() -> None:
    """A span of probability .2 under the target, in one token, and of .5 * .6 under the teacher, in two."""
    own, words = vocabulary(["<s>", "ab", "a", "b"], 1), vocabulary(["<s>", "a", "b", "ab"], 1)
    logits = torch.tensor([[0.2, 0.2, 0.3, 0.3]] * 2, dtype=torch.float64).log()
    its_logits = torch.tensor([[0.1, 0.5, 0.2, 0.2], [0.2, 0.1, 0.6, 0.1], [0.25] * 4], dtype=torch.float64).log()
    passage = {"target": predictions(own, [0, 1], logits), "t": predictions(words, [0, 1, 2], its_logits)}
    nats, gradient = value_and_gradient(StrictLoss(["t"], span_weight=0.5), passage, resources(own, t=words), logits)
    assert nats.tolist() == pytest.approx([0.5 * 0.16440, 0], abs=1e-5)
    assert gradient[0].norm() > 0.1
    nats, _ = value_and_gradient(StrictLoss(["t"]), passage, resources(own, t=words), logits)
    assert nats.tolist() == [0, 0]


def test_strict_refuses_settings_that_contradict() -> None:
    with pytest.raises(UserError, match="set renormalise to true"):
        StrictLoss(["t"], renormalise=False, top=3)
    with pytest.raises(UserError, match="at least 1"):
        StrictLoss(["t"], top=0)


def strict_in_full(p: Tensor, q: Tensor) -> Tensor:
    return (q * (q / p).log()).sum()


def simct_in_full(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2


@pytest.mark.parametrize(
    ("loss", "full"),
    [(StrictLoss(["t"]), strict_in_full), (SimCTLoss(["t"], "jensen_shannon"), simct_in_full)],
    ids=["strict", "simct"],
)
def test_with_all_entries_it_is_the_full_form_and_with_fewer_a_coarser_one(
    loss: Loss, full: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """In float64, with values and gradients; a divergence does not grow where outcomes are merged."""
    letters = [chr(ord("a") + i) for i in range(12)]
    own, words = vocabulary(["<s>", *letters], 1), vocabulary(["<s>", *reversed(letters)], 1)
    g = torch.Generator().manual_seed(0)
    logits, its_logits = (2 * torch.randn(6, 13, generator=g, dtype=torch.float64) for _ in range(2))
    its_logits[:, 0] = -30  # of the control token, which is not shared: a tail has none of it
    tokens = torch.randint(1, 13, (6,), generator=g)
    its = torch.where(tokens > 0, 13 - tokens, 0)
    tokens[0] = its[0] = 0
    order = [0, *range(12, 0, -1)]
    leaf = logits.clone().requires_grad_()
    nats = torch.stack(
        [
            full(p[order][1:] / p[1:].sum(), q[1:] / q[1:].sum())
            for p, q in zip(its_logits.softmax(-1)[:-1], leaf.softmax(-1)[:-1], strict=True)
        ]
    )
    (theirs,) = torch.autograd.grad(nats.sum(), leaf)
    values = []
    for k in (13, 5, 2):
        passage = {
            "target": predictions(own, tokens.tolist(), logits),
            "t": predictions(words, its.tolist(), its_logits, k),
        }
        mine, gradient = value_and_gradient(loss, passage, resources(own, t=words), logits)
        values.append(mine)
        if k == 13:
            torch.testing.assert_close(mine[:-1], nats.detach(), rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(gradient, theirs, rtol=1e-5, atol=1e-7)
    assert (values[0] >= values[1] - 1e-6).all() and values[0].sum() > values[2].sum() > 0
