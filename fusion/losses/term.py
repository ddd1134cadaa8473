"""Terms of the objective beside CLM: a loss at given positions, and its gradient on their logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F


class Term(ABC):
    """A loss at N positions, a function of their logits.

    `term[index]` is the term of some of the positions, in their order.
    """

    in_place: ClassVar[bool]
    """True if the gradient is computed in the buffer of the logits and a position's loss depends on no other's."""

    @property
    @abstractmethod
    def active(self) -> Tensor:
        """bool[N], false where the loss is 0 whatever the logits."""

    cuts: Tensor | None
    """bool[N], positions at which a chunk may begin: positions between two are never separated. None for all."""

    @abstractmethod
    def __getitem__(self, index: Any) -> Self: ...

    @abstractmethod
    def values_and_gradient(
        self, logits: Tensor, *, gold: Tensor, clm_weight: Tensor, lam: float, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """Weighted nats of CLM and of this loss, both [C], from logits[C, V], gold[C] (-1 for none) and clm_weight[C].

        With `gradient`, logits are overwritten with the gradient of lam * CLM + (1 - lam) * loss, summed over the C
        positions, on them.
        """

    def check(self, n: int) -> None:
        """Raises ValueError if this is not a term of `n` positions."""
        if self.active.shape != (n,):
            raise ValueError(f"the term is of {list(self.active.shape)} positions, not of [{n}]")


@dataclass(frozen=True)
class LossTerm(Term):
    """A loss whose gradient is autograd's, taken while the chunk of logits exists."""

    loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    """Weighted nats[C] of logits[C, V] and the features of these positions."""
    features: Mapping[str, Tensor]
    """Tensors [N, ...], among them `weight`, which is 0 exactly where the loss is 0 whatever the logits."""
    cuts: Tensor | None = None
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    """What the loss is given beside the features, the same at all positions (`Loss.constants`)."""

    in_place: ClassVar[bool] = False

    @property
    def active(self) -> Tensor:
        return (self.features["weight"] != 0).unsqueeze(-1).flatten(1).any(1)

    def __getitem__(self, index: Any) -> LossTerm:
        features = {name: array[index] for name, array in self.features.items()}
        return replace(self, features=features, cuts=None if self.cuts is None else self.cuts[index])

    def values_and_gradient(
        self, logits: Tensor, *, gold: Tensor, clm_weight: Tensor, lam: float, gradient: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(gradient):
            leaf = logits.detach().requires_grad_(gradient)
            clm = torch.where(
                clm_weight != 0, clm_weight * F.cross_entropy(leaf, gold, ignore_index=-1, reduction="none"), 0
            )
            nats = self.loss(leaf, {**self.features, **self.constants})
            if gradient:
                logits.copy_(torch.autograd.grad(mixed(clm.sum(), nats.sum(), lam), leaf)[0])
        return clm.detach(), nats.detach()


def mixed(clm: Tensor, nats: Tensor, lam: float) -> Tensor:
    """lam * clm + (1 - lam) * nats; a term whose factor is 0 does not enter, since infinity times 0 is not a number."""
    return clm.clone() if lam == 1 else nats.clone() if lam == 0 else lam * clm + (1 - lam) * nats
