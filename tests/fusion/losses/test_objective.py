"""The fused loss against a dense one in float64, built from the model's own logits by autograd."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fusion.losses.objective import Head, logits_of, mixed_loss, mixed_loss_from_logits
from fusion.losses.term import LossTerm
from tests.fusion.losses.objective_cases import case, dense, head_of, objective, relative, values


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    lam=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    chunk=st.sampled_from([1, 4, 256]),
    softcap=st.sampled_from([None, 2.0]),
    scale=st.sampled_from([1.0, 0.3]),
    bias=st.booleans(),
    k=st.sampled_from([1, 5, 31]),
    upstream=st.sampled_from([1.0, -2.5]),
)
def test_equals_the_dense_definition(
    seed: int, lam: float, chunk: int, softcap: float | None, scale: float, bias: bool, k: int, upstream: float
) -> None:
    parameters, arrays = case(seed, bias=bias, k=k)
    if k == 31:
        arrays["tail"] = torch.where((arrays["ids"] >= 0).all(1), 0, arrays["tail"])  # nothing is outside
    head = head_of(parameters, softcap=softcap, scale=scale)
    ours = mixed_loss(parameters["hidden"], head, objective(**arrays, lam=lam, chunk=chunk))
    logits = scale * F.linear(parameters["hidden"], parameters["weight"], parameters.get("bias"))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    reference = dense(logits, **arrays, lam=lam)
    assert values(ours) == pytest.approx(values(reference), rel=1e-9, abs=1e-9)

    leaves = list(parameters.values())
    given_logits = logits.detach().requires_grad_()
    from_logits = mixed_loss_from_logits(given_logits, objective(**arrays, lam=lam, chunk=chunk))
    assert values(from_logits) == pytest.approx(values(ours), rel=1e-9, abs=1e-9)
    if not reference[0].requires_grad:
        return
    theirs = torch.autograd.grad(upstream * reference[0], [*leaves, logits])
    for mine, other in zip(torch.autograd.grad(upstream * ours.total, leaves), theirs, strict=False):
        assert relative(mine, other) < 1e-9 or float(other.norm()) < 1e-9
    (mine,) = torch.autograd.grad(upstream * from_logits.total, given_logits)
    assert torch.allclose(mine, theirs[-1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("by_hand", [True, False])
def test_rescaled_terms_weigh_as_lambda_says(lam: float, chunk: int, by_hand: bool) -> None:
    parameters, arrays = case(3)
    leaves = list(parameters.values())
    logits = F.linear(*leaves)
    plain = objective(**arrays, lam=lam, chunk=chunk)
    _, clm, other = dense(logits, **arrays, lam=lam)
    if not by_hand:
        weight = {"weight": arrays["fusion_weight"]}
        plain = replace(plain, term=LossTerm(lambda z, f: f["weight"] * (z**2).mean(-1), weight))
        other = (weight["weight"] * (logits**2).mean(-1)).sum()
    rescaled = replace(plain, balance="rescale")
    total = lam * clm + (1 - lam) * (clm / other).detach() * other
    ours = mixed_loss(parameters["hidden"], head_of(parameters), rescaled)
    assert values(ours) == pytest.approx(values((total, clm, other)), rel=1e-9)
    theirs = torch.autograd.grad(-2.5 * total, [*leaves, logits])
    for mine, reference in zip(torch.autograd.grad(-2.5 * ours.total, leaves), theirs, strict=False):
        assert relative(mine, reference) < 1e-9
    alone = logits.detach().requires_grad_()
    from_logits = mixed_loss_from_logits(alone, rescaled)
    assert relative(torch.autograd.grad(-2.5 * from_logits.total, alone)[0], theirs[-1]) < 1e-9


def test_a_term_that_is_nothing_is_not_rescaled() -> None:
    parameters, arrays = case(3)
    for nothing in ("fusion_weight", "clm_weight"):
        plain = objective(**{**arrays, nothing: torch.zeros_like(arrays[nothing])}, lam=0.5)
        losses = [
            mixed_loss(parameters["hidden"], head_of(parameters), given)
            for given in (plain, replace(plain, balance="rescale"))
        ]
        assert values(losses[0]) == values(losses[1])


@pytest.mark.parametrize(("dtype", "value", "gradient"), [(torch.float32, 1e-6, 1e-5), (torch.bfloat16, 1e-2, 2e-2)])
def test_shorter_types_against_the_dense_definition_in_float64(
    dtype: torch.dtype, value: float, gradient: float
) -> None:
    parameters, arrays = case(7, n=300, d=32, v=400, k=10, spread=0.5)
    short = {name: x.detach().to(dtype).requires_grad_() for name, x in parameters.items()}
    ours = mixed_loss(short["hidden"], head_of(short), objective(**arrays, lam=0.9, chunk=64))
    exact = {name: x.detach().double().requires_grad_() for name, x in short.items()}
    reference = dense(logits_of(exact["hidden"], head_of(exact)), **arrays, lam=0.9)
    assert ours.total.dtype == torch.float32
    assert values(ours) == pytest.approx(values(reference), rel=value)
    mine = torch.autograd.grad(ours.total, list(short.values()))
    for name, got, other in zip(short, mine, torch.autograd.grad(reference[0], list(exact.values())), strict=True):
        assert got.dtype == dtype
        assert relative(got.double(), other) < gradient, name


def test_bfloat16_projection_gradient_is_summed_in_float32() -> None:
    """Summed in bfloat16 over 512 chunks it would stop at 32, where one more 12th is rounded away."""
    n, d, v = 512, 8, 12
    hidden = torch.ones(n, d, dtype=torch.bfloat16)
    weight = torch.zeros(v, d, dtype=torch.bfloat16, requires_grad=True)
    ours = mixed_loss(
        hidden, Head(weight), objective(gold=torch.zeros(n).long(), clm_weight=torch.ones(n), lam=1.0, chunk=1)
    )
    ours.total.backward()
    assert weight.grad is not None
    assert float(weight.grad[1, 0]) == pytest.approx(n / v, rel=5e-3)


def test_gradient_of_the_bucket_is_the_stated_one() -> None:
    """q - p inside, q (S - Q) / (1 - Q) outside; without tail S q - p everywhere."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 9, generator=g, dtype=torch.float64, requires_grad=True)
    ids, p = torch.tensor([[2, 5, 0, -1]]), torch.tensor([[0.5, 0.2, 0.1, 0.0]], dtype=torch.float64)
    one, none = torch.ones(1, dtype=torch.float64), torch.tensor([-1])
    q = logits.detach().softmax(-1)[0]
    full = torch.zeros(9, dtype=torch.float64)
    full[ids[0, :3]] = p[0, :3]
    mass = float(p.sum())
    for tail in (1 - mass, 0.0):
        loss = mixed_loss_from_logits(
            logits, objective(gold=none, clm_weight=one, ids=ids, p=p, tail=tail * one, fusion_weight=one, lam=0.0)
        )
        (gradient,) = torch.autograd.grad(loss.total, logits)
        kept_q = float(q[ids[0, :3]].sum())
        outside = q * (mass - kept_q) / (1 - kept_q) if tail else mass * q
        inside = q - full if tail else mass * q - full
        expected = torch.where(torch.isin(torch.arange(9), ids[0, :3]), inside, outside)
        assert torch.allclose(gradient[0], expected, atol=1e-14)
        assert abs(float(gradient.sum())) < 1e-14


def test_the_bucket_is_proper_and_renormalising_is_not() -> None:
    """The loss is least where the model gives each kept id its p and the rest its tail."""
    p, tail = torch.tensor([[0.4, 0.25]], dtype=torch.float64), torch.tensor([0.35], dtype=torch.float64)
    one, ids = torch.ones(1, dtype=torch.float64), torch.tensor([[0, 3]])
    q = torch.tensor([[0.4, 0.1, 0.2, 0.25, 0.05]], dtype=torch.float64).log().requires_grad_()
    arrays = {"gold": torch.tensor([-1]), "clm_weight": one, "ids": ids, "p": p, "fusion_weight": one}
    (at_truth,) = torch.autograd.grad(mixed_loss_from_logits(q, objective(**arrays, tail=tail, lam=0.0)).total, q)
    assert float(at_truth.norm()) < 1e-14
    (without,) = torch.autograd.grad(mixed_loss_from_logits(q, objective(**arrays, tail=0 * tail, lam=0.0)).total, q)
    assert float(without.norm()) > 0.1


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 300.0])
def test_float32_stays_exact_when_almost_nothing_is_outside(gap: float) -> None:
    """1 - Q by subtraction is 0 in float32 from a gap of 16 on; the sum over the outside is not."""
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    ids, p = torch.tensor([[3, 7]] * 4), torch.tensor([[0.5, 0.2]] * 4)
    logits[:, [3, 7]] += gap
    short, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    one, tail, none = torch.ones(4), torch.full((4,), 0.3), torch.full((4,), -1)
    loss = mixed_loss_from_logits(
        short, objective(gold=none, clm_weight=one, ids=ids, p=p, tail=tail, fusion_weight=one, lam=0.0, floor=1e-300)
    ).total
    reference = dense(exact, none, one, ids, p, tail, one, 0.0)[0]
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-5)
    loss.backward()
    reference.backward()
    assert short.grad is not None and exact.grad is not None
    assert torch.allclose(short.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)


def test_floor_makes_the_tail_constant() -> None:
    logits = torch.tensor([[60.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, dtype=torch.float64)
    arrays = {"gold": torch.tensor([-1]), "clm_weight": one, "ids": torch.tensor([[0]]), "fusion_weight": one}
    loss = mixed_loss_from_logits(
        logits, objective(**arrays, p=0.6 * one[:, None], tail=0.4 * one, lam=0.0, floor=1e-6)
    )
    (gradient,) = torch.autograd.grad(loss.total, logits)
    q = logits.detach().softmax(-1)
    assert float(loss.fusion) == pytest.approx(-0.4 * math.log(1e-6) - 0.6 * float(q[0, 0].log()))
    assert torch.allclose(gradient, 0.6 * q - 0.6 * torch.eye(3, dtype=q.dtype)[:1], atol=1e-14)


def test_whole_vocabulary_kept_is_finite() -> None:
    logits = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    one, p = torch.ones(2), torch.full((2, 4), 0.2)
    loss = mixed_loss_from_logits(
        logits, objective(gold=torch.tensor([1, 2]), clm_weight=one, ids=torch.arange(4).expand(2, 4), p=p,
        tail=0.2 * one, fusion_weight=one, lam=0.5,
    ))  # fmt: skip
    (gradient,) = torch.autograd.grad(loss.total, logits)
    assert math.isfinite(float(loss.total.detach())) and gradient.isfinite().all()


def test_clm_alone_is_the_cross_entropy_and_the_same_code() -> None:
    parameters, arrays = case(3)
    head, hidden = head_of(parameters), parameters["hidden"]
    gold, weight = arrays["gold"], arrays["clm_weight"]
    alone = mixed_loss(hidden, head, objective(gold=gold, clm_weight=weight, lam=1.0))
    nats = F.cross_entropy(logits_of(hidden.detach(), head).detach(), gold, reduction="none", ignore_index=-1)
    assert float(alone.total.detach()) == pytest.approx(float((nats * weight).sum()), rel=1e-12)
    assert float(alone.fusion) == 0.0
    both = mixed_loss(hidden, head, objective(**arrays, lam=1.0))
    assert values(both)[:2] == pytest.approx(values(alone)[:2], rel=1e-12)
    leaves = list(parameters.values())
    for a, b in zip(torch.autograd.grad(alone.total, leaves), torch.autograd.grad(both.total, leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_gold_among_the_ids_as_a_one_hot_is_clm() -> None:
    parameters, arrays = case(4)
    gold = arrays["gold"].clamp(min=0)
    weight = arrays["clm_weight"]
    ids, p = torch.stack([gold, torch.full_like(gold, -1)], 1), torch.ones(len(gold), 2)
    for lam in (0.0, 0.3):
        loss = mixed_loss(
            parameters["hidden"], head_of(parameters), objective(gold=gold, clm_weight=weight, ids=ids, p=p,
            tail=0 * weight, fusion_weight=weight, lam=lam,
        ))  # fmt: skip
        assert values(loss)[1:] == pytest.approx([values(loss)[0]] * 2)


def test_sums_over_parts_and_any_order() -> None:
    parameters, arrays = case(5)
    hidden, head = parameters["hidden"].detach(), head_of(parameters)
    whole = values(mixed_loss(hidden, head, objective(**arrays, lam=0.7)))
    order = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(0))
    parts = [order[:9], order[9:]]
    split = [
        values(mixed_loss(hidden[i], head, objective(**{n: a[i] for n, a in arrays.items()}, lam=0.7))) for i in parts
    ]
    assert [sum(x) for x in zip(*split, strict=True)] == pytest.approx(whole)


class Sizes(TorchDispatchMode):
    """Records how many matrix products run, their rows, and the greatest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.rows, self.largest = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products += 1
            self.rows += out.shape[0]
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_positions_without_weight_are_not_projected_and_may_hold_anything() -> None:
    parameters, arrays = case(6)
    idle = (arrays["fusion_weight"] == 0) & ((arrays["clm_weight"] == 0) | (arrays["gold"] < 0))
    assert 0 < idle.sum() < len(idle)
    hidden = parameters["hidden"].detach().clone()
    hidden[idle] = math.nan
    hidden.requires_grad_()
    with Sizes() as sizes, torch.no_grad():
        mixed_loss(hidden, head_of(parameters), objective(**arrays, lam=0.9))
    assert sizes.products == 1 and sizes.rows == int((~idle).sum())
    loss = mixed_loss(hidden, head_of(parameters), objective(**arrays, lam=0.9))
    for gradient in torch.autograd.grad(loss.total, [hidden, parameters["weight"]]):
        assert gradient.isfinite().all()


def test_nothing_to_do_gives_zero_and_zero_gradients() -> None:
    parameters, _ = case(6)
    n = len(parameters["hidden"])
    loss = mixed_loss(
        parameters["hidden"],
        head_of(parameters),
        objective(gold=torch.full((n,), -1), clm_weight=torch.ones(n), lam=1.0),
    )
    assert values(loss) == [0, 0, 0]
    assert not any(g.any() for g in torch.autograd.grad(loss.total, list(parameters.values())))


def test_memory_never_holds_the_logits_and_evaluation_makes_no_gradients() -> None:
    parameters, arrays = case(8, n=200, d=4, v=97, k=5)
    with Sizes() as sizes:
        mixed_loss(parameters["hidden"], head_of(parameters), objective(**arrays, lam=0.9, chunk=16)).total.backward()
    assert sizes.largest <= 16 * 97
    with Sizes() as evaluating, torch.no_grad():
        loss = mixed_loss(parameters["hidden"], head_of(parameters), objective(**arrays, lam=0.9, chunk=16))
    assert not loss.total.requires_grad
    assert 3 * evaluating.products == sizes.products


def test_only_the_total_carries_a_gradient_and_once() -> None:
    parameters, arrays = case(9)
    loss = mixed_loss(parameters["hidden"], head_of(parameters), objective(**arrays, lam=0.9))
    assert loss.total.requires_grad and not loss.clm.requires_grad and not loss.fusion.requires_grad
    loss.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.total.backward()


def test_tied_and_frozen_weights() -> None:
    parameters, arrays = case(10, n=12, d=6, v=31, bias=False)
    tokens = torch.arange(12)
    embedding = parameters["weight"]
    leaf = embedding.detach().clone().requires_grad_()
    ours = mixed_loss(torch.tanh(F.embedding(tokens, leaf)), Head(leaf), objective(**arrays, lam=0.9)).total
    reference = dense(torch.tanh(F.embedding(tokens, embedding)) @ embedding.T, **arrays, lam=0.9)[0]
    assert relative(*torch.autograd.grad(ours, leaf), *torch.autograd.grad(reference, embedding)) < 1e-9
    frozen = mixed_loss(parameters["hidden"], Head(embedding.detach()), objective(**arrays, lam=0.9)).total
    trained = mixed_loss(parameters["hidden"], Head(embedding), objective(**arrays, lam=0.9)).total
    (a,), (b,) = (torch.autograd.grad(loss, parameters["hidden"]) for loss in (frozen, trained))
    assert torch.equal(a, b)


def test_autocast_projects_in_its_dtype() -> None:
    parameters, arrays = case(11, n=64, d=16, v=50)
    single = {name: x.detach().float().requires_grad_() for name, x in parameters.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto = mixed_loss(single["hidden"], head_of(single), objective(**arrays, lam=0.9))
        gradients = torch.autograd.grad(auto.total, list(single.values()))
    half = {name: x.detach().bfloat16() for name, x in single.items()}
    assert values(auto) == values(mixed_loss(half["hidden"], head_of(half), objective(**arrays, lam=0.9)))
    assert {g.dtype for g in gradients} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lam": 1.5}, "lam must be"),
        ({"tail": torch.zeros(3)}, "tail has shape"),
        ({"fusion_weight": torch.zeros(3)}, "weight has shape"),
        ({"ids": None, "p": None, "tail": None, "fusion_weight": None}, "without a term: give one, or lam = 1"),
        ({"gold": torch.zeros(3).long()}, "gold has shape"),
        ({"p": torch.zeros(23, 2)}, "must both be"),
        ({"ids": torch.zeros(23, 5).long()}, "repeat"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    parameters, arrays = case(12)
    given = {name: value for name, value in {**arrays, "lam": 0.9, **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        mixed_loss(parameters["hidden"], head_of(parameters), objective(**given))


def test_head_refuses_impossible_numbers() -> None:
    for kwargs in ({"softcap": 0.0}, {"scale": 0.0}, {"scale": math.inf}):
        with pytest.raises(ValueError, match="must be"):
            Head(torch.eye(2), **kwargs)
