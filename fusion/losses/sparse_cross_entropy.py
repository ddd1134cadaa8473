"""Cross-entropy from sparse distributions and their tails, mixed with CLM, with a gradient written by hand.

At one position, with kept entries p_k over distinct ids and `tail` the mass outside them, the loss is

    - sum_k p_k log q_k  -  tail * log(1 - Q),    Q = sum_k q_k

which is the cross-entropy over k + 1 outcomes. Leaving the tail out of a p with sum S < 1 would be least at p / S, a
silent renormalisation. With tail = 0 it is the plain -sum p log q with gradient S q - p. (S is not assumed to be 1.)

1 - Q is never formed by subtraction. The logits outside the kept ids are summed by themselves, which costs nothing
(each logit is exponentiated once either way) and keeps log(1 - Q) = logsumexp(outside) - logsumexp(all) exact however
near Q is to 1. Writing R for 1 - Q and c for the softmax over the outside alone (q = R c), the gradient on the
logits is

    (S + tail) q - p       on the kept ids
    (S R - tail Q) c       outside

which for S + tail = 1 is q - p, and q (S - Q) / (1 - Q), without the division. (Method: arXiv 2401.10491, section 3.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fusion.losses.loss import TAIL_FLOOR
from fusion.losses.term import Term


@dataclass(frozen=True)
class SparseCrossEntropy(Term):
    """Weighted cross-entropy from N sparse distributions; computed in the dtype of the logits, in their buffer."""

    ids: Tensor
    """int[N, K], distinct target ids, -1 at pads."""
    p: Tensor
    """float[N, K], their probabilities; ignored at pads."""
    tail: Tensor
    """float[N], probability outside the ids."""
    weight: Tensor
    """float[N], weight of the cross-entropy at each position."""
    floor: float = TAIL_FLOOR
    """Lower bound of 1 - Q: below it the tail's term is constant, with gradient 0."""

    cuts: None = field(default=None, init=False)
    in_place: ClassVar[bool] = True

    @classmethod
    def zero(cls, n: int, device: torch.device) -> SparseCrossEntropy:
        """No loss at any of n positions, so that CLM is all that is computed."""
        none = torch.zeros(n, device=device)
        return cls(torch.empty((n, 0), dtype=torch.long, device=device), none[:, None][:, :0], none, none)

    @property
    def active(self) -> Tensor:
        return self.weight != 0

    def __getitem__(self, index: Any) -> SparseCrossEntropy:
        return SparseCrossEntropy(self.ids[index], self.p[index], self.tail[index], self.weight[index], self.floor)

    def check(self, n: int) -> None:
        for name, array in {"tail": self.tail, "weight": self.weight}.items():
            if array.shape != (n,):
                raise ValueError(f"{name} has shape {list(array.shape)}, not [{n}]")
        if self.ids.shape != self.p.shape or self.ids.ndim != 2 or len(self.ids) != n:
            raise ValueError(f"ids {list(self.ids.shape)} and p {list(self.p.shape)} must both be [{n}, K]")
        ordered = self.ids.sort(1).values
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise ValueError("ids repeat within a position: sum their probabilities, or keep one, before the loss")

    def values_and_gradient(
        self, logits: Tensor, *, gold: Tensor, clm_weight: Tensor, lam: float, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        ids = self.ids.long()
        kept = ids >= 0
        at = ids.clamp(min=0)
        at_gold = gold.clamp(min=0)[:, None]
        p = torch.where(kept, self.p.to(logits.dtype), 0)
        tail, weight = self.tail.to(logits.dtype), self.weight.to(logits.dtype)

        gold_logit = logits.gather(1, at_gold)[:, 0]
        kept_logits = logits.gather(1, at).masked_fill_(~kept, -math.inf)
        # Takes the kept ids out. Pads point at id 0 and must not change it, which a minimum with infinity does not.
        logits.scatter_reduce_(1, at, torch.where(kept, -math.inf, math.inf).to(logits.dtype), "amin")

        top = logits.amax(1).clamp_(min=torch.finfo(logits.dtype).min)  # finite, also where nothing is left outside
        outside = logits.sub_(top[:, None]).exp_()
        mass = outside.sum(1)
        # From here on relative to the greatest logit: a loss should not be rounded like the logits it is a difference
        # of.
        shift = torch.cat([kept_logits, top[:, None]], 1).amax(1)
        gold_logit, kept_logits = gold_logit - shift, kept_logits - shift[:, None]
        log_outside = top - shift + mass.log()
        log_all = torch.cat([kept_logits, log_outside[:, None]], 1).logsumexp(1)

        log_rest = log_outside - log_all  # log(1 - Q)
        floored = log_rest < math.log(self.floor)
        tail_nats = -tail * log_rest.clamp(min=math.log(self.floor))
        kept_nats = torch.where(p != 0, p * (log_all[:, None] - kept_logits), 0).sum(1)
        clm = torch.where(clm_weight != 0, clm_weight * (log_all - gold_logit), 0)
        nats = torch.where(weight != 0, weight * (kept_nats + tail_nats), 0)
        if not gradient:
            return clm, nats

        q, rest = (kept_logits - log_all[:, None]).exp(), log_rest.exp()
        kept_mass, tail = p.sum(1), torch.where(floored, 0, tail)
        w_clm, w_loss = lam * clm_weight, (1 - lam) * weight
        on_outside = w_clm * rest + w_loss * (kept_mass * rest - tail * q.sum(1))
        on_kept = w_clm[:, None] * q + w_loss[:, None] * ((kept_mass + tail)[:, None] * q - p)
        # The kept ids hold exp(-inf) = 0 here and appear once each, so that adding is setting; pads add 0 to id 0.
        outside.mul_((on_outside / mass.clamp(min=torch.finfo(mass.dtype).tiny))[:, None])
        outside.scatter_add_(1, at, on_kept.masked_fill_(~kept, 0))
        outside.scatter_add_(1, at_gold, -w_clm[:, None])
        return clm, nats
