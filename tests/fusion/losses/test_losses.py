"""Losses on logits against dense definitions in float64."""

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fusion.losses.alm import ALMLoss, binary_divergence
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.loss import Loss, TeacherModel
from fusion.losses.objective import Head, Objective, logits_of, mixed_loss, mixed_loss_from_logits
from fusion.losses.online_distillation import OnlineDistillationLoss
from fusion.losses.term import Term
from fusion.losses.top_k_distillation import TopKDistillationLoss
from fusion.losses.uld import ULDLoss
from fusion.modeling.packing import own_forward
from fusion.modeling.teacher import Teacher

N, D, V = 23, 6, 31


def kl(p: Tensor, q: Tensor) -> Tensor:
    """sum p log(p / q) over the outcomes that p has."""
    return (p[p > 0] * (p[p > 0] / q[p > 0]).log()).sum()


DENSE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jensen_shannon": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "skewed_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skewed_reverse_kl": lambda p, q: kl(q, 0.1 * q + 0.9 * p),
    "total_variation": lambda p, q: (p - q).abs().sum() / 2,
}


def parameters(seed: int) -> tuple[torch.Generator, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,)}
    return g, {n: torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}


def term_of(loss: Loss, features: dict[str, Tensor], teachers: Mapping[str, TeacherModel] = {}) -> Term:
    """The loss at a batch of one sequence with these features [N, ...]."""
    return loss.term({name: array[None] for name, array in features.items()}, teachers)


def compare(
    found: dict[str, Tensor],
    term: Term,
    reference: Callable[[Tensor], Tensor],
    g: torch.Generator,
    *,
    lam: float = 0.3,
    chunk: int = 16,
    softcap: float | None = None,
) -> None:
    """Value and every gradient of the mixed loss with `term` are those of `reference(logits) -> summed nats`."""
    gold, weight = torch.randint(-1, V, (N,), generator=g), torch.randint(0, 2, (N,), generator=g).double()
    head = Head(found["weight"], found["bias"], softcap=softcap)
    objective = Objective(gold, weight, lam, term, chunk)
    ours = mixed_loss(found["hidden"], head, objective)
    logits = F.linear(found["hidden"], found["weight"], found["bias"])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    clm = (weight * F.cross_entropy(logits, gold, ignore_index=-1, reduction="none")).sum()
    other = reference(logits)
    theirs = lam * clm + (1 - lam) * other
    assert float(ours.clm) == pytest.approx(float(clm.detach()), rel=1e-9)
    assert float(ours.fusion) == pytest.approx(float(other.detach()), rel=1e-9, abs=1e-12)
    assert float(ours.total.detach()) == pytest.approx(float(theirs.detach()), rel=1e-9)
    leaves = list(found.values())
    for mine, its in zip(torch.autograd.grad(ours.total, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert (mine - its).norm() <= 1e-9 * its.norm()
    whole = logits_of(found["hidden"].detach(), head).detach()
    dense = mixed_loss_from_logits(whole, objective)
    assert float(dense.total) == pytest.approx(float(theirs.detach()), rel=1e-9)


def outcomes(g: torch.Generator, k: int, teachers: int) -> dict[str, Tensor]:
    """Distributions with every edge in them: pads, nothing but a tail, a kept id without mass, no weight."""
    ids = torch.stack([torch.stack([torch.randperm(V, generator=g)[:k] for _ in range(teachers)]) for _ in range(N)])
    p = torch.rand(N, teachers, k + 1, generator=g, dtype=torch.float64)
    p /= p.sum(-1, keepdim=True)
    at = torch.rand(N, teachers, generator=g)
    tail = p[..., -1].clone()
    p = p[..., :-1].clone()
    if k < V:
        pads = at < 0.3
        tail[pads] += p[pads][:, -2:].sum(-1)
        ids[pads, -2:], p[pads, -2:] = -1, 0
    else:
        p, tail = p / p.sum(-1, keepdim=True), torch.full_like(tail, 1e-8)
    weight = torch.rand(N, teachers, generator=g, dtype=torch.float64) * (torch.rand(N, teachers, generator=g) > 0.2)
    return {"ids": ids, "p": p, "tail": tail, "weight": weight}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    divergence=st.sampled_from(sorted(DENSE)),
    temperature=st.sampled_from([1.0, 2.5]),
    k=st.sampled_from([1, 5, V]),
    teachers=st.sampled_from([1, 3]),
    chunk=st.sampled_from([1, 16, 256]),
    softcap=st.sampled_from([None, 2.0]),
)
def test_top_k_distillation(
    seed: int, divergence: str, temperature: float, k: int, teachers: int, chunk: int, softcap: float | None
) -> None:
    g, found = parameters(seed)
    arrays = outcomes(g, max(k, 3), teachers)

    def reference(logits: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for n, q in enumerate((logits / temperature).softmax(-1)):
            for s in range(teachers):
                kept = arrays["ids"][n, s][arrays["ids"][n, s] >= 0]
                rest = torch.ones(V, dtype=torch.bool)
                rest[kept] = False
                p, mine = arrays["p"][n, s, : len(kept)], q[kept]
                if rest.any():
                    p = torch.cat([p, arrays["tail"][n, s, None]])
                    mine = torch.cat([mine, q[rest].sum()[None]])
                total = total + arrays["weight"][n, s] * temperature**2 * DENSE[divergence](p, mine)
        return total

    loss = TopKDistillationLoss(["a"], divergence, temperature)
    compare(found, term_of(loss, arrays), reference, g, chunk=chunk, softcap=softcap)


def test_without_a_tail_only_the_kept_count() -> None:
    g, found = parameters(0)
    arrays = outcomes(g, 4, 1)
    arrays["p"] = arrays["p"] / arrays["p"].sum(-1, keepdim=True)
    arrays["tail"] = 0 * arrays["tail"]

    def reference(logits: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1).gather(1, arrays["ids"][:, 0].clamp(min=0))
        p = arrays["p"][:, 0]
        return (arrays["weight"] * torch.where(p > 0, p * (p.log() - log_q), 0)).sum()

    compare(found, term_of(TopKDistillationLoss(["a"]), arrays), reference, g)


@pytest.mark.parametrize("name", sorted(DENSE))
def test_a_divergence_from_itself_is_nothing(name: str) -> None:
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores[:, -2:] = -math.inf
    log_p = scores.log_softmax(-1)
    log_q = log_p.clone().requires_grad_()
    nats = DIVERGENCES.choose(name).value(log_p, log_q)
    assert nats.detach().abs().max() < 1e-15
    (gradient,) = torch.autograd.grad(nats.sum(), log_q)
    # What a softmax lets through of it: the part that is not the same for all outcomes by their probability.
    through = gradient - log_p.exp() * gradient.sum(-1, keepdim=True)
    assert through.abs().max() < 1e-15


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.9])
def test_parameters_of_divergences(beta: float) -> None:
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    log_p, log_q = scores.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    m = beta * p + (1 - beta) * q
    expected = {
        "jensen_shannon": (beta * kl(p, m) + (1 - beta) * kl(q, m), {"beta": beta}),
        "skewed_forward_kl": (kl(p, m), {"alpha": beta}),
        "skewed_reverse_kl": (kl(q, beta * q + (1 - beta) * p), {"alpha": beta}),
    }
    for name, (value, given_settings) in expected.items():
        found = DIVERGENCES.choose({"name": name, **given_settings}).value(log_p, log_q)
        assert float(found) == pytest.approx(float(value), rel=1e-12)
    for name, limit in [("skewed_forward_kl", kl(p, q)), ("skewed_reverse_kl", kl(q, p))]:
        found = DIVERGENCES.choose({"name": name, "alpha": 0}).value(log_p, log_q)
        assert float(found) == pytest.approx(float(limit), rel=1e-12)


def llama(seed: int, vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, initializer_range=0.3, **size))


@pytest.mark.parametrize("divergence", sorted(DENSE))
@pytest.mark.parametrize("rows", [V, V + 3, V - 2])
def test_online_distillation(divergence: str, rows: int) -> None:
    """A teacher with more or fewer rows than tokens in its vocabulary: those mean nothing."""
    g, found = parameters(1)
    model = llama(3, rows).double()
    tokens = torch.randint(min(rows, V), (1, N), generator=g)
    positions = torch.cat([torch.arange(9), torch.arange(N - 9)])[None]
    teacher = Teacher(model)
    weight = torch.rand(N, generator=g).double()
    weight[::5] = 0
    size, t = min(rows, V), 2.0
    with torch.no_grad():
        parts = [own_forward(model, input_ids=part).logits[0] for part in tokens.split([9, N - 9], 1)]
    p = (torch.cat(parts)[:, :size] / t).softmax(-1)

    def reference(logits: Tensor) -> Tensor:
        q = (logits[:, :size] / t).softmax(-1)
        return sum((w * t**2 * DENSE[divergence](a, b) for w, a, b in zip(weight, p, q, strict=True)), q.new_zeros(()))

    features = {"input_ids": tokens[0], "position_ids": positions[0], "weight": weight}
    compare(found, term_of(OnlineDistillationLoss(["a"], divergence, t), features, {"a": teacher}), reference, g)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("k", [3, V, V + 4])
@pytest.mark.parametrize("teachers", [1, 2])
def test_uld(k: int, teachers: int) -> None:
    g, found = parameters(2)
    whole = torch.rand(N, teachers, max(k, V + 4), generator=g, dtype=torch.float64).pow(4)
    whole = (whole / whole.sum(-1, keepdim=True)).sort(descending=True).values
    p, tail = whole[..., :k], whole[..., k:].sum(-1)
    weight = torch.rand(N, teachers, generator=g).double() * (torch.rand(N, teachers, generator=g) > 0.2)

    def reference(logits: Tensor) -> Tensor:
        total = logits.new_zeros(())
        for n, q in enumerate(logits.softmax(-1)):
            mine = sorted(q, key=float, reverse=True) + [q.new_zeros(())] * 4
            for s in range(teachers):
                apart = sum(((mine[i] - p[n, s, i]).abs() for i in range(k)), q.new_zeros(()))
                rest = sum(mine[k:], q.new_zeros(()))
                total = total + weight[n, s] * (apart + (rest - tail[n, s]).abs())
        return total

    compare(found, term_of(ULDLoss(["a"]), {"p": p, "tail": tail, "weight": weight}), reference, g)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@pytest.mark.parametrize("chunk", [4, 20, 256])
def test_alm(temperature: float, chunk: int) -> None:
    """Chunks of one to seven positions, none of them cut however few positions are projected at once."""
    g, found = parameters(3)
    lengths = {0: [1, 2, 7, 1, 3, 5], 1: [4, 4, 1, 2, 2, 2]}
    number, nats = torch.full((N, 2), -1), torch.zeros(N, 2, dtype=torch.float64)
    members: list[tuple[int, range, float]] = []
    for s, sizes in lengths.items():
        start = 2 * s
        for size in sizes:
            a = float(torch.rand(1, generator=g)) * 4
            members.append((s, range(start, start + size), a))
            number[start : start + size, s], nats[start : start + size, s] = len(members), a
            start += size
    gold = torch.randint(V, (N,), generator=g)

    def reference(logits: Tensor) -> Tensor:
        log_q, total = logits.log_softmax(-1), logits.new_zeros(())
        for _, positions, a in members:
            q = (sum((log_q[i, gold[i]] for i in positions), total.new_zeros(())) / temperature).exp()
            p = torch.tensor(math.exp(-a / temperature), dtype=torch.float64)
            pair = [torch.stack([x, 1 - x]) for x in (p, q)]
            total = total + temperature * kl(*pair) / 2
        return total

    features = {"labels": gold, "chunk": number, "teacher_nll": nats, "weight": (number >= 0) / 2}
    compare(found, term_of(ALMLoss(["a"], temperature), features), reference, g, chunk=chunk)


def test_the_binary_divergence_tends_to_its_limit() -> None:
    a, b = torch.tensor([0.5, 3.0, 9.0]).double(), torch.tensor([2.0, 3.0, 1.0]).double()
    limit = b - a + a * (a / b).log()
    assert torch.allclose(binary_divergence(a, b, 1e6), limit, atol=1e-4)
    certain = binary_divergence(torch.zeros(2), torch.tensor([0.0, 1.0]), 1.0)
    assert certain.isfinite().all() and float(certain[0]) == 0


def test_a_term_without_weight_leaves_clm_alone() -> None:
    _, found = parameters(4)
    one = torch.ones(N)
    term = term_of(ULDLoss(["a"]), {"p": torch.ones(N, 1, 1), "tail": torch.zeros(N, 1), "weight": torch.ones(N, 1)})
    head = Head(found["weight"])
    with_term = mixed_loss(found["hidden"], head, Objective(one.long(), one, 1.0, term))
    alone = mixed_loss(found["hidden"], head, Objective(one.long(), one, 1.0))
    np.testing.assert_allclose(float(with_term.total.detach()), float(alone.total.detach()), rtol=1e-12)


def test_a_term_is_of_all_positions() -> None:
    _, found = parameters(4)
    one = torch.ones(N)
    features = {"p": torch.ones(N - 1, 1, 1), "tail": torch.zeros(N - 1, 1), "weight": torch.ones(N - 1, 1)}
    with pytest.raises(ValueError, match="positions"):
        objective = Objective(one.long(), one, 0.5, term_of(ULDLoss(["a"]), features))
        mixed_loss(found["hidden"], Head(found["weight"]), objective)
