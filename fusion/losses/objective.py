"""The training objective, lambda * CLM + (1 - lambda) * fusion, computed together with the output projection.

With a vocabulary of tens of thousands the logits of one row outweigh everything else in memory, and autograd would hold
several copies. Here a chunk of positions is projected, its loss *and* its gradient on the logits are computed in one
buffer, the gradient is multiplied back onto the hidden states and the projection, and the buffer is dropped: [N, V]
never exists. What backward does is scale by the incoming gradient.

The fusion term at one position, with kept entries p_k over distinct ids and `tail` the mass outside them:

    - sum_k p_k log q_k  -  tail * log(1 - Q),    Q = sum_k q_k

that is the cross-entropy over k + 1 outcomes. Leaving the tail out of a p with sum S < 1 would be least at p / S, a
silent renormalisation. With tail = 0 it is the plain -sum p log q with gradient S q - p. (S is not assumed to be 1.)

1 - Q is never formed by subtraction. The logits outside the kept ids are summed by themselves, which costs nothing
(each logit is exponentiated once either way) and keeps log(1 - Q) = logsumexp(outside) - logsumexp(all) exact however
near Q is to 1. Writing R for 1 - Q and c for the softmax over the outside alone (q = R c), the gradient on the
logits is

    (S + tail) q - p       on the kept ids
    (S R - tail Q) c       outside

which for S + tail = 1 is q - p, and q (S - Q) / (1 - Q), without the division. (Method: arXiv 2401.10491, section 3.)

Any other second term is a `Term`, of which autograd takes the gradient while its chunk exists. That holds a chunk
several times over, so that the chunks are smaller.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK = 512  # positions projected at once: large enough for a full matrix product, small beside a row of 2,048
CACHED = 2**20  # logits of a chunk that a CPU works on at once: float32, they stay in its cache from step to step
TAIL_FLOOR = 1e-30  # of 1 - Q; met only where nothing is left outside the kept ids, see `mixed_loss`
_BUFFERS = 4  # by so much a chunk is smaller where autograd is at work on it


@dataclass(frozen=True)
class Head:
    """The output projection of a causal language model: logits = cap(scale * (hidden @ weight.T + bias)).

    weight[V, D] and bias[V] are the model's own parameters (a tied embedding is simply passed as it is). cap(z) is
    softcap * tanh(z / softcap), or z where softcap is None.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive or None, not {self.softcap}")
        if not (math.isfinite(self.scale) and self.scale != 0):
            raise ValueError(f"scale must be finite and not 0, not {self.scale}")


class MixedLoss(NamedTuple):
    """Sums over positions, in nats; total = lam * clm + (1 - lam) * fusion. Only `total` carries a gradient."""

    total: Tensor
    clm: Tensor
    fusion: Tensor


class Term(Protocol):
    """What N positions learn beside their next token: a differentiable function of their logits."""

    @property
    def active(self) -> Tensor:
        """bool[N], where it is not 0 whatever the logits."""

    @property
    def cuts(self) -> Tensor | None:
        """bool[N], the positions at which a chunk may begin; None for all. What lies between two is never parted."""

    def __getitem__(self, index: Any) -> "Term":
        """The term of some of the positions, in their order."""

    def __call__(self, logits: Tensor) -> Tensor:
        """Weighted nats[N] of logits[N, V], in the dtype of the logits."""


@dataclass(frozen=True)
class _Targets:
    """What the N positions are compared with; float arrays in the dtype of the computation, ids without weight -1."""

    gold: Tensor  # [N]
    clm_weight: Tensor  # [N], 0 where gold is -1
    ids: Tensor  # [N, K], -1 pads
    p: Tensor  # [N, K], 0 at pads
    tail: Tensor  # [N]
    fusion_weight: Tensor  # [N]

    def __getitem__(self, index: Any) -> "_Targets":
        return _Targets(*(array[index] for array in vars(self).values()))

    @property
    def active(self) -> Tensor:
        return (self.clm_weight != 0) | (self.fusion_weight != 0)

    def parts(self, chunk: int) -> Iterator[slice]:
        """The positions that are projected at once."""
        yield from _spans(slice(0, len(self.gold)), chunk)

    def spans(self, part: slice, logits: Tensor) -> list[slice]:
        """Those of a part[C] whose logits[C, V] are worked on at once."""
        return _spans(part, len(logits) if logits.device.type != "cpu" else max(1, CACHED // logits.shape[1]))

    def terms(self, logits: Tensor, lam: float, floor: float, grad: bool) -> tuple[Tensor, Tensor]:
        return _terms(logits, self, lam, floor, grad)


@dataclass(frozen=True)
class _WithTerm:
    """The same for a second term of any kind."""

    gold: Tensor  # [N]
    clm_weight: Tensor  # [N], 0 where gold is -1
    term: Term

    def __getitem__(self, index: Any) -> "_WithTerm":
        return _WithTerm(self.gold[index], self.clm_weight[index], self.term[index])

    @property
    def active(self) -> Tensor:
        return (self.clm_weight != 0) | self.term.active

    def parts(self, chunk: int) -> Iterator[slice]:
        n, size, cuts = len(self.gold), max(1, chunk // _BUFFERS), self.term.cuts
        allowed = range(1, n) if cuts is None else cuts[1:].nonzero()[:, 0].add(1).tolist()
        start = 0
        for here, after in pairwise([*allowed, n, math.inf]):
            if after > start + size and here > start:
                yield slice(start, int(here))
                start = int(here)

    def spans(self, part: slice, logits: Tensor) -> list[slice]:
        return [part]  # a teacher projects them, too, and a term may join all of them

    def terms(self, logits: Tensor, lam: float, floor: float, grad: bool) -> tuple[Tensor, Tensor]:
        """As `_terms`; `floor` is the kept entries' alone."""
        with torch.set_grad_enabled(grad):
            leaf = logits.detach().requires_grad_(grad)
            nats = F.cross_entropy(leaf, self.gold, ignore_index=-1, reduction="none")
            clm = torch.where(self.clm_weight != 0, self.clm_weight * nats, 0)
            other = self.term(leaf)
            if grad:
                logits.copy_(torch.autograd.grad(_mixed(clm.sum(), other.sum(), lam), leaf)[0])
        return clm.detach(), other.detach()


def mixed_loss(
    hidden: Tensor,
    head: Head,
    *,
    gold: Tensor,
    clm_weight: Tensor,
    ids: Tensor | None = None,
    p: Tensor | None = None,
    tail: Tensor | None = None,
    fusion_weight: Tensor | None = None,
    term: Term | None = None,
    lam: float,
    tail_floor: float = TAIL_FLOOR,
    chunk: int = CHUNK,
) -> MixedLoss:
    """The mixed loss of hidden[N, D] projected by `head`, never holding more than `chunk` positions' logits.

    Sums, not means: the caller divides by whatever it counts. gold[N] are target ids, -1 where there is none;
    clm_weight[N] weighs -log q(gold). ids[N, K] are distinct target ids with pads of -1, p[N, K] their probabilities
    (anything at pads is ignored), tail[N] the mass outside them; fusion_weight[N] weighs the fusion term. The four
    fusion arrays may all be None: then `term` takes their place, or the second term is 0 and `lam` must be 1. Positions
    at which neither term has a weight are not projected.

    The projection runs in the wider dtype of hidden and weight (or autocast's), as the model's own would; everything
    after it in float32, float64 if that dtype is float64, and the projection's gradient is summed in the same.
    `tail_floor` bounds 1 - Q from below: there the tail term is constant, with gradient 0.
    Under `torch.no_grad` only the values are computed. Backward may run once.

    Raises ValueError for shapes that do not fit, repeated ids, lam outside [0, 1], missing fusion arrays, or a term
    beside them.
    """
    _check_shapes(hidden, gold, clm_weight, ids, p, tail, fusion_weight, term, lam, chunk)
    dtype = _projection_dtype(hidden, head)
    exact = torch.promote_types(dtype, torch.float32)
    targets = _targets(exact, gold, clm_weight, ids, p, tail, fusion_weight, term)
    hidden, targets = _active(hidden, targets)
    total, clm, fusion = _Projected.apply(
        hidden, head.weight, head.bias, head, targets, lam, tail_floor, chunk, dtype, torch.is_grad_enabled()
    )
    return MixedLoss(total, clm, fusion)


def mixed_loss_from_logits(
    logits: Tensor,
    *,
    gold: Tensor,
    clm_weight: Tensor,
    ids: Tensor | None = None,
    p: Tensor | None = None,
    tail: Tensor | None = None,
    fusion_weight: Tensor | None = None,
    term: Term | None = None,
    lam: float,
    tail_floor: float = TAIL_FLOOR,
    chunk: int = CHUNK,
) -> MixedLoss:
    """`mixed_loss` on given logits[N, V], for models whose head has an unknown form: same numbers, dense memory."""
    _check_shapes(logits, gold, clm_weight, ids, p, tail, fusion_weight, term, lam, chunk)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    targets = _targets(dtype, gold, clm_weight, ids, p, tail, fusion_weight, term)
    logits, targets = _active(logits, targets)
    total, clm, fusion = _Given.apply(logits, targets, lam, tail_floor, chunk, torch.is_grad_enabled())
    return MixedLoss(total, clm, fusion)


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """The logits[..., V] of hidden[..., D], as the model itself would give them; for checks, not for training."""
    logits = F.linear(hidden, head.weight, head.bias)
    _scale_and_cap(logits, head, grad=False)
    return logits


class _Projected(torch.autograd.Function):
    """Values and gradients of hidden[N, D], weight[V, D] and bias[V], all in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        targets: _Targets | _WithTerm,
        lam: float,
        floor: float,
        chunk: int,
        dtype: torch.dtype,
        grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = targets.clm_weight.dtype
        wants = [grad and wanted for wanted in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wants[1] else None
        d_bias = torch.zeros_like(bias, dtype=exact) if wants[2] and bias is not None else None
        clm, fusion = (torch.zeros(len(hidden), dtype=exact, device=hidden.device) for _ in range(2))

        # Autocast is honoured by `dtype`, once; left on, it would cast the whole weight anew in every chunk.
        with torch.autocast(hidden.device.type, enabled=False):
            w, b = weight.to(dtype), None if bias is None else bias.to(dtype)

            def project(part: slice) -> None:  # a function, so that its buffer is gone before the next one is made
                h = hidden[part].to(dtype)
                product = F.linear(h, w, b)
                for few in targets.spans(part, product):
                    here = slice(few.start - part.start, few.stop - part.start)
                    logits = product[here].to(exact)
                    slope = _scale_and_cap(logits, head, any(wants))
                    clm[few], fusion[few] = targets[few].terms(logits, lam, floor, any(wants))
                    if not any(wants):
                        continue
                    d_logits = logits if slope is None else logits.mul_(slope)
                    if head.scale != 1:
                        d_logits.mul_(head.scale)
                    if d_bias is not None:
                        d_bias.add_(d_logits.sum(0))
                    product[here] = d_logits
                if d_hidden is not None:
                    d_hidden[part] = product @ w
                if d_weight is not None and dtype == exact:
                    d_weight.addmm_(product.T, h)
                elif d_weight is not None:
                    d_weight.add_(product.T @ h)

            for part in targets.parts(chunk):
                project(part)
        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return _sums(ctx, clm, fusion, lam)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, upstream[0]), None, None, None, None, None, None, None)


def _spans(whole: slice, size: int) -> list[slice]:
    """`whole` cut into slices of at most `size`."""
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


class _Given(torch.autograd.Function):
    """Values and gradient of logits[N, V]."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: _Targets | _WithTerm, lam: float, floor: float, chunk: int, grad: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = targets.clm_weight.dtype
        wanted = grad and ctx.needs_input_grad[0]
        d_logits = torch.empty_like(logits) if wanted else None
        clm, fusion = (torch.zeros(len(logits), dtype=exact, device=logits.device) for _ in range(2))
        for part in targets.parts(chunk):
            buffer = logits[part].to(exact, copy=True)
            clm[part], fusion[part] = targets[part].terms(buffer, lam, floor, wanted)
            if d_logits is not None:
                d_logits[part] = buffer
        ctx.gradients, ctx.dtypes = (d_logits,), (logits.dtype,)
        return _sums(ctx, clm, fusion, lam)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, upstream[0]), None, None, None, None, None)


def _terms(logits: Tensor, t: _Targets, lam: float, floor: float, grad: bool) -> tuple[Tensor, Tensor]:
    """Weighted CLM[C] and fusion[C] terms in nats; overwrites logits[C, V] with the gradient of the total if `grad`."""
    kept = t.ids >= 0
    at = t.ids.clamp(min=0)
    at_gold = t.gold.clamp(min=0)[:, None]
    nothing = -math.inf

    gold_logit = logits.gather(1, at_gold)[:, 0]
    kept_logits = logits.gather(1, at).masked_fill_(~kept, nothing)
    # Takes the kept ids out. Pads point at id 0 and must leave it alone: the lesser of itself and infinity is itself.
    logits.scatter_reduce_(1, at, torch.where(kept, nothing, math.inf).to(logits.dtype), "amin")

    top = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)  # finite, also where nothing is left outside
    outside = logits.sub_(top[:, None]).exp_()
    mass = outside.sum(1)
    # From here on relative to the greatest logit: a loss should not be rounded like the logits it is a difference of.
    shift = torch.cat([kept_logits, top[:, None]], 1).amax(1)
    gold_logit, kept_logits = gold_logit - shift, kept_logits - shift[:, None]
    log_outside = top - shift + mass.log()
    log_all = torch.cat([kept_logits, log_outside[:, None]], 1).logsumexp(1)

    log_rest = log_outside - log_all  # log(1 - Q)
    floored = log_rest < math.log(floor)
    tail_nats = -t.tail * log_rest.clamp(min=math.log(floor))
    kept_nats = torch.where(t.p != 0, t.p * (log_all[:, None] - kept_logits), 0).sum(1)
    clm = torch.where(t.clm_weight != 0, t.clm_weight * (log_all - gold_logit), 0)
    fusion = torch.where(t.fusion_weight != 0, t.fusion_weight * (kept_nats + tail_nats), 0)
    if not grad:
        return clm, fusion

    q, rest = (kept_logits - log_all[:, None]).exp(), log_rest.exp()
    kept_mass, tail = t.p.sum(1), torch.where(floored, 0, t.tail)
    w_clm, w_fusion = lam * t.clm_weight, (1 - lam) * t.fusion_weight
    on_outside = w_clm * rest + w_fusion * (kept_mass * rest - tail * q.sum(1))
    on_kept = w_clm[:, None] * q + w_fusion[:, None] * ((kept_mass + tail)[:, None] * q - t.p)
    # The kept ids hold exp(-inf) = 0 here and appear once each, so that adding is setting; pads add 0 to id 0.
    outside.mul_((on_outside / mass.clamp(min=torch.finfo(mass.dtype).tiny))[:, None])
    outside.scatter_add_(1, at, on_kept.masked_fill_(~kept, 0))
    outside.scatter_add_(1, at_gold, -w_clm[:, None])
    return clm, fusion


def _scale_and_cap(logits: Tensor, head: Head, grad: bool) -> Tensor | None:
    """Scales and caps in place; gives the cap's slope at each logit (None: 1), 1 - tanh^2, where it is asked for."""
    if head.scale != 1:
        logits.mul_(head.scale)
    if head.softcap is None:
        return None
    logits.div_(head.softcap).tanh_()
    slope = torch.addcmul(torch.ones_like(logits[:1]), logits, logits, value=-1) if grad else None
    logits.mul_(head.softcap)
    return slope


def _sums(ctx: Any, clm: Tensor, fusion: Tensor, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    clm, fusion = clm.sum(), fusion.sum()
    ctx.mark_non_differentiable(clm, fusion)
    return _mixed(clm, fusion, lam), clm, fusion


def _mixed(clm: Tensor, fusion: Tensor, lam: float) -> Tensor:
    # Not lam * clm + 0 * fusion at lam = 1: an infinite fusion term would make it NaN.
    return clm.clone() if lam == 1 else fusion.clone() if lam == 0 else lam * clm + (1 - lam) * fusion


def _scaled(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients made in the forward times upstream[], in place: they are large, and needed once."""
    if ctx.gradients is None:
        raise RuntimeError("the mixed loss was taken backward twice: its gradients are kept for one backward only")
    gradients, ctx.gradients = ctx.gradients, None
    return tuple(None if g is None else g.mul_(upstream).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True))


def _projection_dtype(hidden: Tensor, head: Head) -> torch.dtype:
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
    kind = hidden.device.type
    # As in autocast's own matrix products: double precision is left alone.
    if torch.is_autocast_enabled(kind) and torch.promote_types(dtype, torch.float32) == torch.float32:
        return torch.get_autocast_dtype(kind)
    return dtype


def _targets(
    dtype: torch.dtype,
    gold: Tensor,
    clm_weight: Tensor,
    ids: Tensor | None,
    p: Tensor | None,
    tail: Tensor | None,
    fusion_weight: Tensor | None,
    term: Term | None,
) -> _Targets | _WithTerm:
    gold = gold.long()
    clm_weight = torch.where(gold >= 0, clm_weight.to(dtype), 0)
    if term is not None:
        return _WithTerm(gold, clm_weight, term)
    if ids is None or p is None or tail is None or fusion_weight is None:
        zero = torch.zeros_like(clm_weight)
        none = gold.new_empty((len(gold), 0))
        return _Targets(gold, clm_weight, none, none.to(dtype), zero, zero)
    ids = ids.long()
    return _Targets(
        gold, clm_weight, ids, torch.where(ids >= 0, p.to(dtype), 0), tail.to(dtype), fusion_weight.to(dtype)
    )


def _active(rows: Tensor, targets: _Targets | _WithTerm) -> tuple[Tensor, _Targets | _WithTerm]:
    """The rows[N, ...] and targets of which at least one weight is not 0."""
    index = targets.active.nonzero()[:, 0]
    return (rows, targets) if len(index) == len(rows) else (rows[index], targets[index])


def _check_shapes(
    rows: Tensor,
    gold: Tensor,
    clm_weight: Tensor,
    ids: Tensor | None,
    p: Tensor | None,
    tail: Tensor | None,
    fusion_weight: Tensor | None,
    term: Term | None,
    lam: float,
    chunk: int,
) -> None:
    if rows.ndim != 2:
        raise ValueError(f"expected [N, D], got {list(rows.shape)}: flatten the batch first")
    if not 0 <= lam <= 1:
        raise ValueError(f"lam must be between 0 and 1, not {lam}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, not {chunk}")
    fusion = {"ids": ids, "p": p, "tail": tail, "fusion_weight": fusion_weight}
    missing = [name for name, array in fusion.items() if array is None]
    if term is not None and len(missing) < len(fusion):
        raise ValueError("a term and fusion arrays are given: give one or the other")
    if term is None and missing and (lam != 1 or len(missing) < len(fusion)):
        raise ValueError(f"lam = {lam} without {', '.join(missing)}: give all fusion arrays, or none and lam = 1")
    for name, array in {"gold": gold, "clm_weight": clm_weight, "tail": tail, "fusion_weight": fusion_weight}.items():
        if array is not None and array.shape != rows.shape[:1]:
            raise ValueError(f"{name} has shape {list(array.shape)}, not [{len(rows)}]")
    if ids is None or p is None:
        return
    if ids.shape != p.shape or ids.ndim != 2 or len(ids) != len(rows):
        raise ValueError(f"ids {list(ids.shape)} and p {list(p.shape)} must both be [{len(rows)}, K]")
    ordered = ids.sort(1).values
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("ids repeat within a position: sum their probabilities, or keep one, before the loss")
