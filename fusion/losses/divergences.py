"""How far one distribution is from another, in nats: what distillation makes small.

A divergence is registered by name and takes log-probabilities of the same O outcomes, the teacher's and the target's:

    @DIVERGENCES.register("forward_kl", reference="...")
    def forward_kl(log_p[..., O], log_q[..., O]) -> nats[...]

An outcome that neither has (a pad) is -inf in both and adds nothing; nor does one of probability 0 where the divergence
weighs by that probability. Only `log_q` carries a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusion.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Callable[["Tensor", "Tensor"], "Tensor"]
DIVERGENCES: Registry[Divergence] = Registry("divergence", "fusellm.divergences")
ANY_TAIL = ("forward_kl",)
"""Divergences that look at nothing but what the teacher gives mass to, and so can do without the rest of it."""


@DIVERGENCES.register("forward_kl", reference="arXiv 1503.02531: KL(teacher || target), which covers what it says")
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q)."""
    return _mean(log_p, log_p, log_q)


@DIVERGENCES.register("reverse_kl", reference="arXiv 2306.08543: KL(target || teacher), which keeps to its modes")
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum q (log q - log p); infinite where q has mass and p has none."""
    return _mean(log_q, log_q, log_p)


@DIVERGENCES.register("jensen_shannon", reference="arXiv 2306.13649, generalised JSD at beta = 1/2")
def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; at most log 2."""
    log_m = log_p.logaddexp(log_q.masked_fill(_none(log_p) & _none(log_q), 0)) - math.log(2)
    return (_mean(log_p, log_p, log_m) + _mean(log_q, log_q, log_m)) / 2


def _mean(log_weight: Tensor, log_one: Tensor, log_other: Tensor) -> Tensor:
    """sum weight (log one - log other) over the outcomes that have a weight."""
    none = _none(log_weight)
    difference = log_one.masked_fill(none, 0) - log_other.masked_fill(none, 0)
    return (log_weight.exp() * difference).sum(-1)


def _none(log_p: Tensor) -> Tensor:
    return log_p == -math.inf
