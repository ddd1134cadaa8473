"""GOLD: tokens that both vocabularies have are compared by name, all others by rank (hybrid ULD, TRL's GOLDTrainer)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusion.errors import UserError
from fusion.losses.chunks import chunk_of_positions, chunk_sums, chunk_term, shared_chunks, sums_of
from fusion.losses.loss import LOSSES, LossRequirements, LossResources, TeacherLoss, TeacherModel, weighted
from fusion.losses.shared_vocabulary import split_entries, stacked
from fusion.registry import Choice
from fusion.types import SequencePredictions
from fusion.vocabulary.maps import MAPS, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.term import Term

FLOOR = 1e-8
"""Least probability, as in the published code."""


@LOSSES.register("gold", version=1, reference="Unlocking On-Policy Distillation for Any Model Family (2025)")
@dataclass(frozen=True)
class GOLDLoss(TeacherLoss):
    """w_m sum_v D_beta(p_v, q_v) over shared tokens + w_u sum_i |p_(i) - q_(i)| over all others, each sorted.

    It is taken once in each chunk of text between byte ends that teacher and target share. p and q are the
    distributions at one position of the chunk, times the probabilities of the chunk's other tokens (see `merge`).
    D_beta(p, q) = beta p log(p / m) + (1 - beta) q log(q / m) with m = beta p + (1 - beta) q; at 0 and 1 it is
    p log(p / q) and q log(q / p). p and q are at least 1e-8, and nothing is normalised.

    From the top k: the rest of the teacher's mass is one more shared outcome, against the target's mass on shared
    tokens that are not kept. At k = V it is exact.
    """

    beta: float = 0.5
    """The part of D_beta that is KL(p || m)."""
    matched_weight: float | None = None
    """w_m. Default: the part of the teacher's vocabulary that is shared."""
    unmatched_weight: float | None = None
    """w_u. Default: 1 - w_m."""
    merge: Literal["bayesian", "observed"] = "bayesian"
    """How a chunk of several tokens becomes one distribution. `bayesian`: the one before its last token, so that it is
    of the chunk up to there and of what follows. `observed`, the default of the published code: the one after its first
    token, and each further token's probability at the position after it; what of that is not stored counts as 1e-8."""
    temperature: float = 1.0
    """Of both distributions; the teacher's predictions must have been extracted at it."""
    map_on: Unit = "bytes"
    """What makes two tokens the same: their bytes, or their strings as in the published code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise UserError(f"beta is {self.beta}; it must be between 0 and 1.")

    def requirements(self, target: str) -> LossRequirements:
        maps = [name for name in self.teachers if name != target]
        return LossRequirements(list(self.teachers), self.temperature, maps=maps, map="em", map_on=self.map_on)

    def parts(self) -> Mapping[str, Choice[Any]]:
        return {"map": MAPS.choose("em")}

    def constants(self, resources: LossResources) -> dict[str, np.ndarray]:
        """shared bool[S, V], the target's tokens that each teacher has, and matched_weight float32[S]."""
        images = [resources.shared(name) for name in self.teachers]
        ids = np.arange(len(resources.vocabularies[resources.target]))
        weight = [(image >= 0).mean() if self.matched_weight is None else self.matched_weight for image in images]
        return {
            "shared": np.stack([np.isin(ids, image) for image in images]),
            "matched_weight": np.array(weight, np.float32),
        }

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """ids int32[N, S, K], p float32[N, S, K], rest float32[N, S, R] and tail float32[N, S] at the position of each
        chunk's distribution, at_base float32[N, S] the weight of its loss there, chunk int32[N, S] the chunk that a
        position belongs to (-1 for none), and weight float32[N, S], that weight at all positions of a chunk.
        """
        n = sum(len(passage[resources.target].tokens) for passage in predictions)
        found: list[tuple[np.ndarray, ...]] = []
        for name in self.teachers:
            chunks = shared_chunks(name, resources.target, predictions, n_bytes)
            shift, base = (0, 1) if self.merge == "bayesian" else (1, 0)
            own, its = chunks.target + shift, chunks.teacher + shift
            partner = np.full(n, -1, np.int32)
            partner[own[:, base]] = its[:, base]
            read = split_entries(name, predictions, resources, partner, resources.shared(name))
            nll = self._factors(name, predictions)
            factor = np.zeros(n)
            factor[own[:, base]] = np.exp(nll[its[:, base]] - sums_of(nll, its))
            merged = (array * factor.reshape(-1, *[1] * (array.ndim - 1)) for array in read[1:])
            found.append((read.ids, *merged, chunk_of_positions(own, n), partner >= 0))
        ids, p, rest, tail, chunk, base_of = zip(*found, strict=True)
        weight = self.position_weights([c >= 0 for c in chunk], predictions, n_bytes, resources.target)
        return {
            "ids": stacked(ids, -1),
            "p": stacked(p, 0),
            "rest": stacked(rest, 0),
            "tail": np.stack(tail, 1).astype(np.float32),
            "chunk": np.stack(chunk, 1),
            "weight": weight,
            "at_base": np.where(np.stack(base_of, 1), weight, np.float32(0)),
        }

    def _factors(self, name: str, predictions: SequencePredictions) -> np.ndarray:
        """float64[M]: -log of the probability that enters the product at each position of the teacher."""
        read = [passage[name] for passage in predictions]
        if self.merge == "bayesian":
            nll = [one.nll for one in read]
        else:
            nll = [
                -np.where(one.ids == one.tokens[:, None], one.log_p, -np.inf).max(1, initial=-np.inf) for one in read
            ]
        return np.minimum(np.concatenate(nll), -math.log(FLOOR), dtype=np.float64)

    def term(self, batch: Mapping[str, Tensor], teachers: Mapping[str, TeacherModel]) -> Term:
        return chunk_term(self, batch, read=batch["input_ids"])

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        from torch.nn.functional import cross_entropy, pad

        logits = logits / self.temperature
        q = logits.softmax(-1)
        factors = features["labels"].clamp(min=-1) if self.merge == "bayesian" else features["read"]
        own = cross_entropy(logits, factors, ignore_index=-1, reduction="none").clamp(max=-math.log(FLOOR))
        nats = own.new_zeros(own.shape)
        for s in range(len(self.teachers)):
            ids, p, rest, tail, chunk, at_base = (
                features[name][:, s] for name in ("ids", "p", "rest", "tail", "chunk", "at_base")
            )
            shared, w_m = features["shared"][s], features["matched_weight"][s].to(q.dtype)
            w_u = 1 - w_m if self.unmatched_weight is None else self.unmatched_weight
            factor = (-chunk_sums(own.masked_fill(at_base != 0, 0), chunk)).exp()[:, None]
            kept = q.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
            others = (q * shared).sum(1) - kept.sum(1)
            apart = self._divergence(p.to(q.dtype), factor * kept).sum(1)
            apart = apart + self._divergence(tail.to(q.dtype), factor[:, 0] * others)
            unmatched = q.masked_fill(shared, 0)
            top = unmatched.topk(min(rest.shape[1], q.shape[1])).values
            beyond = (unmatched.sum(1) - top.sum(1)).clamp(min=0)
            distance = (rest - factor * pad(top, (0, rest.shape[1] - top.shape[1]))).abs().sum(1)
            distance = distance + factor[:, 0] * beyond
            nats = nats + weighted(at_base, w_m * apart + w_u * distance)
        return nats

    def _divergence(self, p: Tensor, q: Tensor) -> Tensor:
        """D_beta of the class, elementwise; 0 where both are at most 1e-8."""
        p, q = p.clamp(min=FLOOR), q.clamp(min=FLOOR)
        if self.beta == 0:
            return p * (p / q).log()
        if self.beta == 1:
            return q * (q / p).log()
        m = self.beta * p + (1 - self.beta) * q
        return self.beta * p * (p / m).log() + (1 - self.beta) * q * (q / m).log()
