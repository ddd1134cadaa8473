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

from pydantic import BaseModel, Field

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


class JensenShannonParameters(BaseModel):
    """The weights of the two sides of the generalised Jensen-Shannon divergence."""

    beta: float = Field(0.5, gt=0, lt=1, description="weight of the teacher, in the mixture and of its own divergence")


@DIVERGENCES.register(
    "jensen_shannon", version=2, parameters=JensenShannonParameters, reference="arXiv 2306.13649, section 2"
)
def jensen_shannon(log_p: Tensor, log_q: Tensor, *, parameters: JensenShannonParameters) -> Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; at most log 2.

    Divided by beta it tends to the forward KL as beta falls to 0, divided by 1 - beta to the reverse KL as it rises to
    1. It is not made equal to them there, as TRL's does, since it would jump.
    """
    beta = parameters.beta
    log_m = _mixture(log_p, log_q, beta)
    return beta * _expectation(log_p, log_p, log_m) + (1 - beta) * _expectation(log_q, log_q, log_m)


class SkewParameters(BaseModel):
    """How far a skewed divergence moves its second side towards the first."""

    alpha: float = Field(0.1, ge=0, lt=1, description="share of the first distribution in the second")


@DIVERGENCES.register(
    "skewed_forward_kl", parameters=SkewParameters, reference="arXiv 2402.03898, section 3.1 (DistiLLM's SKL)"
)
@on_teacher_support
def skewed_forward_kl(log_p: Tensor, log_q: Tensor, *, parameters: SkewParameters) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), whose gradient stays bounded where q has little of p's mass."""
    return _expectation(log_p, log_p, _mixture(log_p, log_q, parameters.alpha))


@DIVERGENCES.register(
    "skewed_reverse_kl", parameters=SkewParameters, reference="arXiv 2402.03898, section 3.1 (DistiLLM's SRKL)"
)
def skewed_reverse_kl(log_p: Tensor, log_q: Tensor, *, parameters: SkewParameters) -> Tensor:
    """KL(q || alpha q + (1 - alpha) p), finite also where p has no mass, unless alpha is 0."""
    return _expectation(log_q, log_q, _mixture(log_q, log_p, parameters.alpha))


@DIVERGENCES.register("total_variation", reference="arXiv 2307.15190 (f-distill), total variation distance")
def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum |p - q| / 2, a probability and not nats: the largest difference that the two give to any event."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def _mixture(log_one: Tensor, log_other: Tensor, share: float) -> Tensor:
    """log(share * one + (1 - share) * other); 0, a number, where neither has the outcome."""
    if share == 0:
        return log_other
    absent = _absent(log_one) & _absent(log_other)
    one, other = (log_p.masked_fill(absent, 0) for log_p in (log_one, log_other))
    return (one + math.log(share)).logaddexp(other + math.log1p(-share))


def _expectation(log_weight: Tensor, log_one: Tensor, log_other: Tensor) -> Tensor:
    """sum weight (log one - log other) over the outcomes that have a weight."""
    absent = _absent(log_weight)
    difference = log_one.masked_fill(absent, 0) - log_other.masked_fill(absent, 0)
    return (log_weight.exp() * difference).sum(-1)


def _absent(log_p: Tensor) -> Tensor:
    return log_p == -math.inf
