"""Second terms of the objective other than a fused distribution: see `fusion.losses.specs` for what each one means.

Each is a `Term` of the objective: a differentiable function of a chunk of logits, which autograd takes the gradient of
while only that chunk exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusion.losses.divergences import DIVERGENCES
from fusion.losses.objective import TAIL_FLOOR
from fusion.modeling.heads import find_head, project
from fusion.modeling.packing import attending_by_passage, check_packing, device_of, dtype_of, own_forward, packed_inputs


class Teacher:
    """A model that reads along and is not trained."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._packing = check_packing(model)
        self._whole = find_head(model) is None  # its logits are taken from itself, dense

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """[B * L, D] of packed rows [B, L]; what `logits` makes logits of."""
        inputs = packed_inputs(self._packing, input_ids, position_ids, dtype_of(self.model))
        backbone: Any = self.model.base_model
        # In its own precision, as when it is extracted, whatever the target is trained in.
        with attending_by_passage(self.model, self._packing), torch.autocast(input_ids.device.type, enabled=False):
            if self._whole:
                found = own_forward(self.model, **inputs).logits
            else:
                found = backbone(**inputs).last_hidden_state
        flat: Tensor = found.flatten(0, 1)
        return flat

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[C, V] of hidden[C, D]."""
        if self._whole:
            return hidden
        with torch.autocast(device_of(self.model).type, enabled=False):
            return project(self.model, hidden)


@dataclass(frozen=True)
class Outcomes:
    """Divergence from S teachers' distributions over k + 1 outcomes: the kept ids, and everything else.

    Without tail there is no such outcome, and of a target's distribution only what it gives the kept ids counts.
    """

    divergence: str
    temperature: float
    ids: Tensor  # [N, S, K], -1 pads
    p: Tensor  # [N, S, K]
    tail: Tensor  # [N, S]
    weight: Tensor  # [N, S]

    cuts = None

    @property
    def active(self) -> Tensor:
        return (self.weight != 0).any(1)

    def __getitem__(self, index: Any) -> Outcomes:
        return replace(self, **{n: getattr(self, n)[index] for n in ("ids", "p", "tail", "weight")})

    def __call__(self, logits: Tensor) -> Tensor:
        logits = _centred(logits / self.temperature)
        total = logits.logsumexp(-1)
        nats = torch.zeros_like(total)
        for s in range(self.ids.shape[1]):
            log_p, log_q = self._outcomes(s, logits, total)
            nats = nats + _weighed(self.weight[:, s], DIVERGENCES.get(self.divergence)(log_p, log_q))
        return self.temperature**2 * nats

    def _outcomes(self, s: int, logits: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [C, K + 1] under the teacher and under the target."""
        ids, p, tail = self.ids[:, s], self.p[:, s].to(logits.dtype), self.tail[:, s].to(logits.dtype)
        pads, size = ids < 0, logits.shape[1]
        inside = logits.new_zeros((len(logits), size + 1), dtype=torch.bool)
        inside = inside.scatter_(1, ids.masked_fill(pads, size), True)[:, :size]  # pads point beyond the vocabulary
        nothing = inside.all(1) | (tail == 0)  # no such outcome
        outside = logits.masked_fill(inside & ~nothing[:, None], -math.inf).logsumexp(1) - total
        kept = (logits.gather(1, ids.clamp(min=0)) - total[:, None]).masked_fill(pads, -math.inf)
        rest = outside.clamp(min=math.log(TAIL_FLOOR)).masked_fill(nothing, -math.inf)
        log_p = torch.cat(
            [
                p.clamp(min=TAIL_FLOOR).log().masked_fill(pads, -math.inf),
                tail.log().masked_fill(nothing, -math.inf)[:, None],
            ],
            1,
        )
        return log_p, torch.cat([kept, rest[:, None]], 1)


@dataclass(frozen=True)
class Watched:
    """Divergence from teachers that have read the same positions, over the whole vocabulary.

    Teachers project a chunk when the target does. Rows of either's projection beyond the other's have no token.
    """

    divergence: str
    temperature: float
    teachers: Sequence[Teacher]
    hidden: Sequence[Tensor]  # [N, D] of each
    weight: Tensor  # [N]

    cuts = None

    @property
    def active(self) -> Tensor:
        return self.weight != 0

    def __getitem__(self, index: Any) -> Watched:
        return replace(self, hidden=[h[index] for h in self.hidden], weight=self.weight[index])

    def __call__(self, logits: Tensor) -> Tensor:
        nats = logits.new_zeros(len(logits))
        for teacher, hidden in zip(self.teachers, self.hidden, strict=True):
            theirs = teacher.logits(hidden).to(logits.dtype)
            size = min(theirs.shape[1], logits.shape[1])
            log_p, log_q = ((z[:, :size] / self.temperature).log_softmax(-1) for z in (theirs, logits))
            nats = nats + _weighed(self.weight, DIVERGENCES.get(self.divergence)(log_p, log_q))
        return self.temperature**2 * nats


@dataclass(frozen=True)
class Sorted:
    """Sum of the differences of sorted probabilities, S teachers' k greatest and the mass of the rest."""

    p: Tensor  # [N, S, K], greatest first
    tail: Tensor  # [N, S]
    weight: Tensor  # [N, S]

    cuts = None

    @property
    def active(self) -> Tensor:
        return (self.weight != 0).any(1)

    def __getitem__(self, index: Any) -> Sorted:
        return Sorted(self.p[index], self.tail[index], self.weight[index])

    def __call__(self, logits: Tensor) -> Tensor:
        k = self.p.shape[-1]
        top = logits.softmax(-1).topk(min(k, logits.shape[1])).values
        rest = 1 - top.sum(1, keepdim=True)
        top = F.pad(top, (0, k - top.shape[1]))
        apart = (self.p - top[:, None]).abs().sum(-1) + (self.tail - rest).abs()
        return _weighed(self.weight, apart).sum(1)


@dataclass(frozen=True)
class Chunks:
    """Binary divergence of the likelihoods of chunks, consecutive positions' next tokens; S teachers, each its own.

    A chunk's nats stand at its positions in equal parts, so that no position but its own has them.
    """

    temperature: float
    gold: Tensor  # [N], -1 for none
    chunk: Tensor  # [N, S], -1 for none
    nats: Tensor  # [N, S], the chunk's under the teacher

    @property
    def active(self) -> Tensor:
        return (self.chunk >= 0).any(1)

    @property
    def cuts(self) -> Tensor:
        """bool[N], whether no teacher's chunk goes on from the position before."""
        goes_on = (self.chunk[1:] == self.chunk[:-1]) & (self.chunk[1:] >= 0)
        return F.pad(~goes_on.any(1), (1, 0), value=True)[: len(self.chunk)]

    def __getitem__(self, index: Any) -> Chunks:
        return Chunks(self.temperature, self.gold[index], self.chunk[index], self.nats[index])

    def __call__(self, logits: Tensor) -> Tensor:
        own = F.cross_entropy(logits, self.gold, ignore_index=-1, reduction="none")
        nats, teachers = torch.zeros_like(own), self.chunk.shape[1]
        for s in range(teachers):
            numbers, place, count = self.chunk[:, s].unique(return_inverse=True, return_counts=True)
            ours = own.new_zeros(len(numbers)).index_add(0, place, own)
            theirs = own.new_zeros(len(numbers)).index_copy(0, place, self.nats[:, s].to(own.dtype))
            apart = binary_divergence(theirs, ours, self.temperature) / count
            nats = nats + _weighed((numbers >= 0).to(own.dtype) / teachers, apart)[place]
        return nats


def binary_divergence(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """T KL(p || q) of the two outcomes of probability p = exp(-a / T) and 1 - p, with b for q; a and b in nats."""
    # Below 1e-6 nats there is no telling a chunk from a certain one, and the logarithm of 1 - q would be infinite.
    a, b = (x.clamp(min=1e-6) / temperature for x in (a, b))
    p, not_p = (-a).exp(), -(-a).expm1()
    return temperature * (p * (b - a) + not_p * (not_p.log() - (-(-b).expm1()).log()))


def _centred(logits: Tensor) -> Tensor:
    """Less each row's greatest: a loss should not be rounded like the logits it is a difference of."""
    return logits - logits.detach().amax(-1, keepdim=True)


def _weighed(weight: Tensor, nats: Tensor) -> Tensor:
    """weight * nats, and 0 where nothing is weighed, whatever stands there."""
    return torch.where(weight != 0, weight.to(nats.dtype) * nats, 0)
