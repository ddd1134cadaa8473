"""Distillation from stored top-k distributions of teachers with any tokenizers (arXiv 1503.02531)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fusion.alignment.fuse import FusedSequence, fuse_sequence
from fusion.alignment.pairing import ALIGNMENTS
from fusion.errors import UserError, did_you_mean
from fusion.losses.divergences import DIVERGENCES, needs_all_outcomes
from fusion.losses.loss import (
    LOSSES,
    TAIL_FLOOR,
    LossRequirements,
    LossResources,
    TeacherLoss,
    check_map,
    weighted,
)
from fusion.registry import Choice, PartName
from fusion.switches import Switches
from fusion.types import SequencePredictions
from fusion.vocabulary.maps import MAPS, Unit

if TYPE_CHECKING:
    from torch import Tensor

Tail = Literal["bucket", "renormalise", "gold"]
LEAST_TAIL = 1e-8
"""Least probability of a tail that is an outcome: an exact 0 comes from rounding, and its logarithm is infinite."""


@LOSSES.register("top_k_distillation", version=4, reference="arXiv 1503.02531")
@dataclass(frozen=True)
class TopKDistillationLoss(TeacherLoss):
    """T^2 D(p^(1/T) || q^(1/T)) over k + 1 outcomes: a teacher's k most probable tokens, and everything else.

    p is a teacher's distribution at the aligned position, projected onto the target's tokens as a source's is for
    `FusionLoss`; q is the target's. The factor T^2 keeps the size of the gradient. The sum over positions is divided by
    the number of CLM labels, aligned or not, so that its share falls with the part of positions that are aligned. With
    a `tail` other than `bucket` there is no outcome for the rest.

    The target itself may be a teacher. Raises UserError for names that are not registered, and for a divergence of all
    outcomes without the tail.
    """

    divergence: PartName = "forward_kl"
    """D, in the registry of divergences."""
    temperature: float = 1.0
    """T, at which the predictions must have been extracted."""
    map: str = "first_piece"
    """Vocabulary map of teachers with other token ids than the target's, in the registry of maps."""
    map_on: Unit = "bytes"
    """What the map compares."""
    alignment: PartName = "same_end"
    """Alignment of positions, in the registry of alignments."""
    tail: Tail = "bucket"
    """Mass outside the kept entries (see `Switches.tail`)."""
    projection: Literal["path", "token"] = "path"
    """How a teacher's entries become the target's (see `Switches.projection`)."""
    inside: Literal["prefix", "none"] = "prefix"
    """Entries at positions inside a teacher's token (see `Switches.inside`)."""
    true_token: Literal["always", "top_k"] = "always"
    """Whether the teacher's true next token is always an entry (see `Switches.true_token`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail not in get_args(Tail):
            hint = did_you_mean(self.tail, get_args(Tail))
            raise UserError(f"tail is {self.tail!r}{hint}; it takes one of {', '.join(get_args(Tail))}.")
        check_map(self.map, self.switches())
        divergence = DIVERGENCES.choose(self.divergence).part
        if self.tail != "bucket" and needs_all_outcomes(divergence.value):
            raise UserError(
                f"{divergence.name} compares all outcomes, and tail {self.tail!r} leaves out those beyond the top k: "
                "set tail to bucket, or online to true."
            )

    def requirements(self, target: str) -> LossRequirements:
        return LossRequirements(
            predictions=list(self.teachers),
            temperature=self.temperature,
            maps=[name for name in self.teachers if name != target],
            map=self.map,
            map_on=self.map_on,
        )

    def parts(self) -> Mapping[str, Choice[Any]]:
        return {
            "divergence": DIVERGENCES.choose(self.divergence),
            "map": MAPS.choose(self.map),
            "alignment": ALIGNMENTS.choose(self.alignment),
        }

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """ids int32[N, S, K], p float32[N, S, K], tail and weight float32[N, S] of the S teachers."""
        teachers = [self._projected(name, predictions, n_bytes, resources) for name in self.teachers]
        width = max(teacher.targets.ids.shape[1] for teacher in teachers)
        shape = (len(teachers[0].gold), len(teachers), width)
        ids, p = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for s, teacher in enumerate(teachers):
            k = teacher.targets.ids.shape[1]
            ids[:, s, :k], p[:, s, :k] = teacher.targets.ids, teacher.targets.p
        tail = np.stack([teacher.targets.tail for teacher in teachers], 1)
        paired = [teacher.paired[0] & (teacher.fusion_weight > 0) for teacher in teachers]
        return {
            "ids": ids,
            "p": p,
            "tail": np.maximum(tail, LEAST_TAIL) if self.tail == "bucket" else tail,
            "weight": self.position_weights(paired, predictions, n_bytes, resources.target),
        }

    def _projected(
        self, name: str, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> FusedSequence:
        """The teacher's distributions at the target's positions, as the fusion of this one source."""
        is_target = name == resources.target
        return fuse_sequence(
            predictions,
            n_bytes,
            target=resources.target,
            sources=[] if is_target else [resources.source(name)],
            target_vocabulary=resources.vocabularies[resources.target],
            switches=self.switches(include_target=is_target),
        )

    def switches(self, include_target: bool = False) -> Switches:
        """How a teacher's distributions are aligned and projected; `include_target` where the target is one."""
        return Switches(
            alignment=self.alignment,
            tail=self.tail,
            projection=self.projection,
            inside=self.inside,
            true_token=self.true_token,
            include_target=include_target,
        )

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        divergence = DIVERGENCES.choose(self.divergence).value
        ids, p, tail, weight = (features[name] for name in ("ids", "p", "tail", "weight"))
        logits = logits / self.temperature
        # Relative to the greatest: a loss should not be rounded like the logits it is a difference of.
        logits = logits - logits.detach().amax(-1, keepdim=True)
        total = logits.logsumexp(-1)
        nats = total.new_zeros(total.shape)
        for s in range(ids.shape[1]):
            log_p, log_q = _outcomes(logits, total, ids[:, s], p[:, s], tail[:, s])
            nats = nats + weighted(weight[:, s], divergence(log_p, log_q))
        return self.temperature**2 * nats


def _outcomes(logits: Tensor, total: Tensor, ids: Tensor, p: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [C, K + 1] of one teacher's K kept ids and of the rest, under the teacher and the target.

    `total`[C] is the logsumexp of logits[C, V]; pads of ids[C, K] are -1; where tail[C] is 0 the rest is no outcome.
    """
    import torch

    p, tail = p.to(logits.dtype), tail.to(logits.dtype)
    pads, size = ids < 0, logits.shape[1]
    inside = logits.new_zeros((len(logits), size + 1), dtype=torch.bool)
    inside = inside.scatter_(1, ids.masked_fill(pads, size), True)[:, :size]  # pads point beyond the vocabulary
    no_rest = inside.all(1) | (tail == 0)
    outside = logits.masked_fill(inside & ~no_rest[:, None], -math.inf).logsumexp(1) - total
    kept = (logits.gather(1, ids.clamp(min=0)) - total[:, None]).masked_fill(pads, -math.inf)
    rest = outside.clamp(min=math.log(TAIL_FLOOR)).masked_fill(no_rest, -math.inf)
    log_p = torch.cat(
        [
            p.clamp(min=TAIL_FLOOR).log().masked_fill(pads, -math.inf),
            tail.log().masked_fill(no_rest, -math.inf)[:, None],
        ],
        1,
    )
    return log_p, torch.cat([kept, rest[:, None]], 1)
