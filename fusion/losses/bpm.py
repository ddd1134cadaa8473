"""Byte-prefix marginalisation: what a teacher says of the next bytes, in the target's tokens (arXiv 2607.22334)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.alignment.byte_prefixes import BytePrefixTargets, Targets
from fusion.errors import UserError
from fusion.losses.loss import LOSSES, LossRequirements, LossResources, TeacherLoss, weighted
from fusion.losses.shared_vocabulary import shared_outcomes, stacked
from fusion.registry import Choice
from fusion.types import SequencePredictions
from fusion.vocabulary.maps import MAPS

if TYPE_CHECKING:
    from torch import Tensor

LEAST_TARGET = 1e-12
"""Least probability of the teacher in the reverse KL over the whole vocabulary, as in the published code."""


@LOSSES.register("bpm", version=1, reference="arXiv 2607.22334")
@dataclass(frozen=True)
class BPMLoss(TeacherLoss):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, over the kept target tokens and the rest.

    p is what a teacher says of the bytes that follow, as a distribution over the target's tokens (equations 3 to 6, see
    `BytePrefixTargets`). With beta 0 it is the cross-entropy from p; with beta 1 it is KL(q || p) over the whole
    vocabulary with p at least 1e-12, or, where `mixture` is l > 0, KL(q || (1 - l) p + l q) over the outcomes. Where
    only the true next token can follow it is the cross-entropy of that token, whatever beta.
    """

    beta: float = 0.5
    """The part of the loss that is KL(p || m)."""
    mixture: float = 0.0
    """l, at beta 1."""
    chain: bool = True
    """Whether tokens of the target that go on beyond a token of the teacher's get their probability (equation 6)."""
    skip_spaces: bool = True
    """Whether positions whose next token is only spaces or tabs are left out, as in the published code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("beta", "mixture"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be between 0 and 1.")

    def requirements(self, target: str) -> LossRequirements:
        maps = [name for name in self.teachers if name != target]
        return LossRequirements(list(self.teachers), maps=maps, map="byte_prefix")

    def parts(self) -> Mapping[str, Choice[Any]]:
        return {"map": MAPS.choose("byte_prefix")}

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """ids int32[N, S, K], p float32[N, S, K], tail float32[N, S], forced float32[N, S], 1 where only the true token
        can follow, and weight float32[N, S].
        """
        found: list[Targets] = []
        for name in self.teachers:
            rule = resources.cached(("bpm", name, self.chain, self.skip_spaces), partial(self._rule, resources, name))
            own = [replace(passage[resources.target], skipped=False) for passage in predictions]
            found.append(rule([passage[name] for passage in predictions], own))
        paired = [one.trained for one in found]
        return {
            "ids": stacked([one.ids for one in found], -1),
            "p": stacked([one.p for one in found], 0),
            "tail": np.stack([one.tail for one in found], 1).astype(np.float32),
            "forced": np.stack([one.forced for one in found], 1).astype(np.float32),
            "weight": self.position_weights(paired, predictions, n_bytes, resources.target),
        }

    def _rule(self, resources: LossResources, name: str) -> BytePrefixTargets:
        vocabulary = resources.vocabularies[resources.target]
        return BytePrefixTargets(resources.source(name), vocabulary, self.chain, self.skip_spaces)

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        import torch

        nats = logits.new_zeros(len(logits))
        every = logits.new_ones(logits.shape[1], dtype=torch.bool)
        for s in range(len(self.teachers)):
            ids, p, tail, forced, weight = (features[name][:, s] for name in ("ids", "p", "tail", "forced", "weight"))
            log_p, log_q = shared_outcomes(logits, ids, p, tail, every)
            absent = log_p == -float("inf")
            log_p, log_q = log_p.masked_fill(absent, 0), log_q.masked_fill(absent, 0)
            p_k, q_k = (x.exp().masked_fill(absent, 0) for x in (log_p, log_q))
            cross = -(p_k * log_q).sum(1)
            nats = nats + weighted(weight, cross.where(forced > 0, self._divergence(logits, log_p, log_q, p_k, q_k)))
        return nats

    def _divergence(self, logits: Tensor, log_p: Tensor, log_q: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """Nats[C] of the class from p and q [C, K + 1] and their logarithms."""
        if self.beta == 0:
            return -(p * log_q).sum(1)
        if self.beta < 1 or self.mixture > 0:
            share = self.beta if self.beta < 1 else 1 - self.mixture
            log_m = (share * p + (1 - share) * q).clamp(min=1e-30).log()
            reverse = (q * (log_q - log_m)).sum(1)
            return reverse if self.beta == 1 else self.beta * (p * (log_p - log_m)).sum(1) + (1 - self.beta) * reverse
        log_all = logits.log_softmax(-1)
        beyond = (1 - q[:, :-1].sum(1)) * np.log(LEAST_TARGET)
        return (
            (log_all.exp() * log_all).sum(1)
            - (q[:, :-1] * log_p[:, :-1].clamp(min=np.log(LEAST_TARGET))).sum(1)
            - beyond
        )
