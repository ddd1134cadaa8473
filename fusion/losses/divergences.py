"""Divergences between two distributions, in nats; the losses of distillation minimise one of them.

A divergence is registered by name and takes log-probabilities of the same O outcomes under teacher and target:

    @DIVERGENCES.register("forward_kl", version=1, reference="...")
    def forward_kl(log_p[..., O], log_q[..., O]) -> nats[...]

One with parameters is registered with their schema (a pydantic model), gets them by the keyword `parameters`, and is
chosen as `{name: NAME, PARAMETER: VALUE}`. An outcome that neither distribution has (a pad) is -inf in both and adds
nothing; nor does one of probability 0 where the divergence weights by that probability. Only `log_q` carries a
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fusion.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Callable[..., "Tensor"]
DIVERGENCES: Registry[Divergence] = Registry("divergence", "fusellm.divergences")
F = TypeVar("F", bound=Callable[..., Any])


def on_teacher_support(divergence: F) -> F:
    """Marks a divergence that depends only on outcomes to which the teacher gives mass.

    Such a divergence may be computed from a teacher's k most probable tokens alone, without an outcome for the rest.
    """
    divergence.on_teacher_support = True  # type: ignore[attr-defined]
    return divergence


def needs_all_outcomes(divergence: Divergence) -> bool:
    """True unless the divergence is marked by `on_teacher_support`."""
    return not getattr(divergence, "on_teacher_support", False)


@DIVERGENCES.register("forward_kl", reference="arXiv 1503.02531: KL(teacher || target), which covers all modes")
@on_teacher_support
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q)."""
    return _expectation(log_p, log_p, log_q)


@DIVERGENCES.register("reverse_kl", reference="arXiv 2306.08543: KL(target || teacher), which seeks a mode")
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum q (log q - log p); infinite where q has mass and p has none."""
    return _expectation(log_q, log_q, log_p)


@DIVERGENCES.register("jensen_shannon", reference="arXiv 2306.13649, generalised JSD at beta = 1/2")
def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2; at most log 2."""
    log_m = log_p.logaddexp(log_q.masked_fill(_absent(log_p) & _absent(log_q), 0)) - math.log(2)
    return (_expectation(log_p, log_p, log_m) + _expectation(log_q, log_q, log_m)) / 2


def _expectation(log_weight: Tensor, log_one: Tensor, log_other: Tensor) -> Tensor:
    """sum weight (log one - log other) over the outcomes that have a weight."""
    absent = _absent(log_weight)
    difference = log_one.masked_fill(absent, 0) - log_other.masked_fill(absent, 0)
    return (log_weight.exp() * difference).sum(-1)


def _absent(log_p: Tensor) -> Tensor:
    return log_p == -math.inf
