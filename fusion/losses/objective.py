"""The training objective, lambda * CLM + (1 - lambda) * loss, computed together with the output projection.

With a vocabulary of tens of thousands the logits of one sequence outweigh everything else in memory, and autograd would
hold several copies. Here a chunk of positions is projected, its loss *and* its gradient on the logits are computed, the
gradient is multiplied back onto the hidden states and the projection, and the buffer is dropped: [N, V] never exists.
The backward pass only scales by the incoming gradient.

What is computed on a chunk of logits is a `Term`: CLM and cross-entropy from sparse distributions have a gradient
written by hand, in the buffer of the logits (`fusion.losses.sparse_cross_entropy`). Of any other loss autograd takes
the gradient while its chunk exists; it holds a chunk several times over, so that the chunks are smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fusion.losses.loss import Balance
from fusion.losses.sparse_cross_entropy import SparseCrossEntropy
from fusion.losses.term import Term, mixed

CHUNK = 512
"""Positions projected at once: large enough for a full matrix product, small beside a sequence of 2,048."""
GPU_CHUNK_BYTES = 3 * 2**29
"""What a chunk's logits take on a GPU, where every chunk also reads and writes the projection's gradient: 1.5 GB."""
LOGIT_BYTES = 6
"""Bytes of a logit, in the dtype of the projection and in float32."""
CACHED = 2**20
"""Logits that a CPU works on at once, in float32: they stay in its cache from one operation to the next."""
CAST = 2**24
"""Numbers of a projection in a shorter dtype that exist in float32 at one time: 64 MB."""
AUTOGRAD_COPIES = 4
"""Chunks are smaller by this factor where autograd takes the gradient."""


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


@dataclass(frozen=True)
class Objective:
    """lam * CLM + (1 - lam) * term, summed over N positions. Sums, not means: the caller divides by what it counts.

    Positions at which neither part has a weight are not projected.
    """

    gold: Tensor
    """int[N], target ids of the next tokens, -1 where there is none."""
    clm_weight: Tensor
    """float[N], weight of -log q(gold) at each position."""
    lam: float
    """Weight of CLM in [0, 1] (arXiv 2401.10491, section 3.3, equation 5)."""
    term: Term | None = None
    """The other part. Default: none, with `lam` 1."""
    chunk: int | None = None
    """Maximum number of positions whose logits are held at once. Default: by the vocabulary's size (`chunk_size`)."""
    balance: Balance = "none"
    """rescale: the objective is lam * CLM + (1 - lam) * r * term with r = CLM / term, their sums over these N positions
    and a constant for the gradient, so that the values weigh as lam says. r is 1 where a sum is not positive.
    """

    def check(self, n: int) -> None:
        """Raises ValueError unless everything is of `n` positions, lam in [0, 1] and chunk positive."""
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam must be between 0 and 1, not {self.lam}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, not {self.chunk}")
        for name, array in {"gold": self.gold, "clm_weight": self.clm_weight}.items():
            if array.shape != (n,):
                raise ValueError(f"{name} has shape {list(array.shape)}, not [{n}]")
        if self.term is not None:
            self.term.check(n)
        elif self.lam != 1:
            raise ValueError(f"lam = {self.lam} without a term: give one, or lam = 1")


class MixedLoss(NamedTuple):
    """Sums over positions, in nats; total = lam * clm + (1 - lam) * fusion, with fusion as it is before it is rescaled.

    Only `total` carries a gradient.
    """

    total: Tensor
    clm: Tensor
    fusion: Tensor


def mixed_loss(hidden: Tensor, head: Head, objective: Objective) -> MixedLoss:
    """The objective at hidden[N, D] projected by `head`, never holding more than a chunk of logits.

    The projection runs in the wider dtype of hidden and weight (or autocast's), as the model's own would; everything
    after it in float32, float64 if that dtype is float64, and the projection's gradient is summed in the same.
    Under `torch.no_grad` only the values are computed. Backward may run once.

    Raises ValueError for shapes that do not fit, repeated ids, lam outside [0, 1], and lam < 1 without a term.
    """
    return _mixed_loss(hidden, head, objective, _projection_dtype(hidden, head))


def mixed_loss_from_logits(logits: Tensor, objective: Objective) -> MixedLoss:
    """`mixed_loss` on given logits[N, V], for models whose head has an unknown form: same numbers, dense memory."""
    return _mixed_loss(logits, None, objective, logits.dtype)


def logits_of(hidden: Tensor, head: Head) -> Tensor:
    """The logits[..., V] of hidden[..., D], as the model itself would give them; for checks, not for training."""
    logits = F.linear(hidden, head.weight, head.bias)
    _scale_and_cap(logits, head, gradient=False)
    return logits


def float32_logits_of(hidden: Tensor, head: Head) -> Tensor:
    """The logits[N, V] of hidden[N, D] in float32, also of a model in a shorter dtype (float64 of one in float64).

    The model itself would round them: logits between 16 and 32 to multiples of 0.125 in bfloat16, so that the first
    tokens tie at one position in twenty.
    """
    dtype = torch.promote_types(hidden.dtype, head.weight.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and dtype != exact and hidden.dtype == head.weight.dtype:
            logits = torch.mm(hidden, head.weight.T, out_dtype=exact)
        else:
            # A part of the vocabulary at a time, since a float32 copy of the whole projection may not fit.
            size = len(head.weight) if head.weight.dtype == exact else max(1, CAST // head.weight.shape[1])
            hidden = hidden.to(exact)
            logits = torch.cat([F.linear(hidden, part.to(exact)) for part in head.weight.split(size)], -1)
    if head.bias is not None:
        logits += head.bias
    _scale_and_cap(logits, head, gradient=False)
    return logits


def _mixed_loss(rows: Tensor, head: Head | None, objective: Objective, dtype: torch.dtype) -> MixedLoss:
    if rows.ndim != 2:
        raise ValueError(f"expected [N, D], got {list(rows.shape)}: flatten the batch first")
    objective.check(len(rows))
    exact = torch.promote_types(dtype, torch.float32)
    gold = objective.gold.long()
    clm_weight = torch.where(gold >= 0, objective.clm_weight.to(exact), 0)
    term = SparseCrossEntropy.zero(len(rows), rows.device) if objective.term is None else objective.term
    index = ((clm_weight != 0) | term.active).nonzero()[:, 0]
    if len(index) < len(rows):
        rows, gold, clm_weight, term = rows[index], gold[index], clm_weight[index], term[index]
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    active = Objective(gold, clm_weight, objective.lam, term, objective.chunk)

    def computed(objective: Objective) -> MixedLoss:
        return MixedLoss(*_MixedLoss.apply(rows, weight, bias, head, objective, dtype, torch.is_grad_enabled()))

    if objective.balance == "none" or objective.term is None:
        return computed(active)
    # A chunk's gradient is made when its logits are, so that the ratio must be known before: the values come first, in
    # a projection of their own. Then lam C + (1 - lam) r F = scale * (lam' C + (1 - lam') F), lam' = lam / scale.
    with torch.no_grad():
        sums = computed(active)
    clm, fusion = float(sums.clm), float(sums.fusion)
    ratio = clm / fusion if clm > 0 and fusion > 0 else 1.0
    scale = active.lam + (1 - active.lam) * ratio
    result = computed(replace(active, lam=active.lam / scale))
    return result._replace(total=result.total * scale)


class _MixedLoss(torch.autograd.Function):
    """Values and gradients of hidden states (or logits) rows[N, D], weight[V, D] and bias[V], all in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        head: Head | None,
        objective: Objective,
        dtype: torch.dtype,
        gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gold, clm_weight, lam, term = objective.gold, objective.clm_weight, objective.lam, objective.term
        assert term is not None
        exact = clm_weight.dtype
        wants = [gradient and wanted for wanted in ctx.needs_input_grad[:3]]
        d_rows = torch.empty_like(rows) if wants[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wants[1] and weight is not None else None
        d_bias = torch.zeros_like(bias, dtype=exact) if wants[2] and bias is not None else None
        clm, nats = (torch.zeros(len(rows), dtype=exact, device=rows.device) for _ in range(2))

        def add(span: slice, logits: Tensor, gradient: bool) -> None:
            clm[span], nats[span] = term[span].values_and_gradient(
                logits, gold=gold[span], clm_weight=clm_weight[span], lam=lam, gradient=gradient
            )

        # Autocast is honoured by `dtype`, once; left on, it would cast the whole weight anew in every chunk.
        with torch.autocast(rows.device.type, enabled=False):
            w, b = None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)

            def given(part: slice) -> None:
                logits = rows[part].to(exact, copy=True)
                add(part, logits, wants[0])
                if d_rows is not None:
                    d_rows[part] = logits

            def project(part: slice, head: Head, w: Tensor) -> None:
                hidden = rows[part].to(dtype)
                product = F.linear(hidden, w, b)
                for span in _spans(part, product, term):
                    here = slice(span.start - part.start, span.stop - part.start)
                    logits = product[here].to(exact)
                    slope = _scale_and_cap(logits, head, any(wants))
                    add(span, logits, any(wants))
                    if not any(wants):
                        continue
                    d_logits = logits if slope is None else logits.mul_(slope)
                    if head.scale != 1:
                        d_logits.mul_(head.scale)
                    if d_bias is not None:
                        d_bias.add_(d_logits.sum(0))
                    product[here] = d_logits
                if d_rows is not None:
                    d_rows[part] = product @ w
                if d_weight is not None and dtype == exact:
                    d_weight.addmm_(product.T, hidden)
                elif d_weight is not None:
                    d_weight.add_(product.T @ hidden)

            # Functions, so that the buffers of a chunk are gone before the next one's are made.
            size = objective.chunk or chunk_size(rows.shape[1] if weight is None else len(weight), rows.device)
            for part in _chunks(len(rows), size, term):
                if head is None or w is None:
                    given(part)
                else:
                    project(part, head, w)
        ctx.gradients = (d_rows, d_weight, d_bias)
        ctx.dtypes = tuple(None if x is None else x.dtype for x in (rows, weight, bias))
        clm_sum, nats_sum = clm.sum(), nats.sum()
        ctx.mark_non_differentiable(clm_sum, nats_sum)
        return mixed(clm_sum, nats_sum, lam), clm_sum, nats_sum

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return (*_scaled(ctx, upstream[0]), None, None, None, None)


def chunk_size(vocabulary: int, device: torch.device) -> int:
    """The number of positions that are projected at once: on a GPU as many as keep to `GPU_CHUNK_BYTES`."""
    return CHUNK if device.type == "cpu" else max(CHUNK, GPU_CHUNK_BYTES // (LOGIT_BYTES * vocabulary))


def _chunks(n: int, size: int, term: Term) -> Iterator[slice]:
    """The positions projected at once: at most `size`, fewer where autograd holds copies, more between distant cuts."""
    if term.in_place:
        yield from _slices(slice(0, n), size)
        return
    size = max(1, size // AUTOGRAD_COPIES)
    allowed = range(1, n) if term.cuts is None else term.cuts[1:].nonzero()[:, 0].add(1).tolist()
    start = 0
    for here, after in pairwise([*allowed, n, math.inf]):
        if after > start + size and here > start:
            yield slice(start, int(here))
            start = int(here)


def _spans(part: slice, logits: Tensor, term: Term) -> list[slice]:
    """The positions of a part[C] whose logits[C, V] are worked on at once."""
    if not term.in_place or logits.device.type != "cpu":
        return [part]
    return _slices(part, max(1, CACHED // logits.shape[1]))


def _slices(whole: slice, size: int) -> list[slice]:
    """`whole` cut into slices of at most `size`."""
    return [slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size)]


def _scale_and_cap(logits: Tensor, head: Head, gradient: bool) -> Tensor | None:
    """Scales and caps in place; gives the cap's slope at each logit (None: 1), 1 - tanh^2, where it is asked for."""
    if head.scale != 1:
        logits.mul_(head.scale)
    if head.softcap is None:
        return None
    logits.div_(head.softcap).tanh_()
    slope = torch.addcmul(torch.ones_like(logits[:1]), logits, logits, value=-1) if gradient else None
    logits.mul_(head.softcap)
    return slope


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
