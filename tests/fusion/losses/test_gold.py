"""GOLD against TRL's own numbers, and what is left of it in the top k."""

from typing import Any

import numpy as np
import pytest
import torch

from fusion.losses.gold import GOLDLoss
from fusion.vocabulary.token_bytes import Vocabulary
from tests.fusion.losses.oracles import oracle, predictions, resources, value_and_gradient, vocabulary

OURS = {
    "beta": "beta",
    "uld_hybrid_matched_weight": "matched_weight",
    "uld_hybrid_unmatched_weight": "unmatched_weight",
    "uld_token_merge_strategy": "merge",
}


def side(case: dict[str, Any], who: str, sample: int, words: Vocabulary) -> tuple[list[int], list[Any], slice]:
    """The ids of a sample's answer after the token before it, the logits there, and where these are in the sample."""
    labels = case[who]["labels"][sample]
    answer = [i for i, label in enumerate(labels) if label >= 0 and words.token_bytes[label] is not None]
    where = slice(answer[0] - 1, answer[-1] + 1)
    return case[who]["input_ids"][sample][where], case[who]["logits"][sample][where], where


@pytest.mark.parametrize("name", ["prefix_only", "batch_of_two_with_eos", "same_tokenizer"])
def test_it_is_the_published_loss(name: str) -> None:
    found = oracle("gold")
    (case,) = (case for case in found["cases"] if case["name"] == name)
    own_words = vocabulary(found["student_vocab"])
    words = own_words if name == "same_tokenizer" else vocabulary(found["teacher_vocab"])
    compared = 0
    for run in case["runs"]:
        settings = run["settings"]
        temperature = settings.get("uld_student_temperature", 1.0)
        if (
            not settings.get("uld_use_hybrid_loss")
            or settings.get("use_extended_uld") is False
            or settings.get("uld_teacher_temperature", 1.0) != temperature
            or settings.get("uld_crossentropy_weight")
        ):
            continue
        given = {ours: settings[theirs] for theirs, ours in OURS.items() if theirs in settings}
        loss = GOLDLoss(["t"], temperature=temperature, **{"merge": "observed", **given})
        n_samples, total, squares = len(case["texts"]), 0.0, 0.0
        for sample in range(n_samples):
            tokens, logits, where = side(case, "student", sample, own_words)
            its_tokens, its_logits, _ = side(case, "teacher", sample, words)
            passage = {
                "target": predictions(own_words, tokens, logits),
                "t": predictions(words, its_tokens, np.array(its_logits) / temperature),
            }
            groups = len(case["alignment_groups"][sample]["student"])
            nats, gradient = value_and_gradient(loss, passage, resources(own_words, t=words), torch.tensor(logits))
            total += float(nats.sum()) / groups / n_samples
            squares += float((gradient / groups / n_samples).square().sum())
            if "grad_student_logits" in run:
                theirs = torch.tensor(run["grad_student_logits"][sample])[where].double()
                assert (gradient / groups / n_samples - theirs).norm() <= 1e-5 * theirs.norm()
        assert total == pytest.approx(run["loss"], rel=1e-5)
        assert squares**0.5 == pytest.approx(run["grad_norm"], rel=1e-5)
        compared += 1
    assert compared >= 8


@pytest.mark.parametrize("k", [13, 4])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_it_is_the_dense_form_with_all_entries(beta: float, k: int) -> None:
    """In float64, with values and gradients; with fewer, what is not kept of the shared tokens is one more."""
    letters = [chr(ord("a") + i) for i in range(14)]
    own, words = vocabulary(["<s>", *letters[:12]], 1), vocabulary(["<s>", *letters[2:]], 1)
    g = torch.Generator().manual_seed(1)
    logits, its_logits = (2 * torch.randn(5, 13, generator=g, dtype=torch.float64) for _ in range(2))
    tokens = [0, *torch.randint(3, 13, (4,), generator=g).tolist()]
    its = [0, *(token - 2 for token in tokens[1:])]
    leaf, share, nats = logits.clone().requires_grad_(), 10 / 13, []
    for i in range(4):
        p, q = its_logits[i].softmax(-1), leaf[i].softmax(-1)
        kept = sorted({*p.topk(k).indices.tolist(), its[i + 1]})
        pairs = [n for n in kept if 1 <= n <= 10]
        p_m, q_m = p[pairs], q[[n + 2 for n in pairs]]
        if k < 13:
            tail = 1 - p[kept].sum()
            p_m, q_m = torch.cat([p_m, tail[None]]), torch.cat([q_m, (q[3:].sum() - q_m.sum())[None]])
        m = beta * p_m + (1 - beta) * q_m
        apart = {0.0: p_m * (p_m / q_m).log(), 1.0: q_m * (q_m / p_m).log()}.get(
            beta, beta * p_m * (p_m / m).log() + (1 - beta) * q_m * (q_m / m).log()
        )
        rest = p[[n for n in kept if not 1 <= n <= 10]].sort(descending=True).values
        others = q[:3].sort(descending=True).values
        rest = torch.cat([rest, rest.new_zeros(3 - len(rest))])
        nats.append(share * apart.sum() + (1 - share) * (rest - others).abs().sum())
    (theirs,) = torch.autograd.grad(torch.stack(nats).sum(), leaf)
    passage = {"target": predictions(own, tokens, logits), "t": predictions(words, its, its_logits, k)}
    mine, gradient = value_and_gradient(GOLDLoss(["t"], beta=beta), passage, resources(own, t=words), logits)
    torch.testing.assert_close(mine[:-1], torch.stack(nats).detach(), rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(gradient, theirs, rtol=1e-5, atol=1e-7)
