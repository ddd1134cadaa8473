"""InfiFusion's distance: the greatest probabilities of standardised logits, sorted (arXiv 2501.02795)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusion.alignment.pairing import same_end
from fusion.errors import UserError
from fusion.losses.loss import LOSSES, LossResources, TeacherLoss, has_next, weighted
from fusion.types import LEAST_STD, SequencePredictions

if TYPE_CHECKING:
    from torch import Tensor


@LOSSES.register("infifusion", version=1, reference="arXiv 2501.02795; its abstract, as no code is published")
@dataclass(frozen=True)
class InfiFusionLoss(TeacherLoss):
    """sum over the K greatest of |p_(i) - q_(i)| with p = softmax(z / s), s the standard deviation of the logits z.

    p is the teacher's at the aligned position and q the target's, each sorted. s is taken over the whole vocabulary and
    divides by V. The teacher's s, and the sum that p is normalised by, are stored with the predictions, so that the
    distance is exact as long as K entries are stored; more than are stored are not compared. Positions are aligned by
    byte ends. The sum over positions is divided by the number of CLM labels.
    """

    top_k: int = 10
    """K, at most the number of stored entries."""

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """p float32[N, S, K], greatest first, NaN beyond a teacher's own entries, and weight float32[N, S]."""
        teachers = [self._aligned(name, resources.target, predictions) for name in self.teachers]
        p, paired = zip(*teachers, strict=True)
        width = max(x.shape[1] for x in p)
        p = [np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=np.nan) for x in p]
        return {
            "p": np.stack(p, 1),
            "weight": self.position_weights(paired, predictions, n_bytes, resources.target),
        }

    def _aligned(self, name: str, target: str, predictions: SequencePredictions) -> tuple[np.ndarray, np.ndarray]:
        """float32[N, K] probabilities of a teacher at the target's positions, and bool[N] which are aligned."""
        p, paired = [], []
        for passage in predictions:
            teacher, own = passage[name], passage[target]
            at = same_end(teacher.byte_ends, own.byte_ends)
            log_p = teacher.log_p[:, : self.top_k]
            if teacher.spread is None and not teacher.skipped:
                raise UserError(f"the predictions of {name} have no standard deviations of logits: extract them again.")
            spread = np.ones((len(log_p), 2), np.float32) if teacher.spread is None else teacher.spread
            p.append(np.exp(log_p / spread[:, :1] - spread[:, 1:])[at])
            paired.append((at >= 0) & has_next([own]) & (not teacher.skipped))
        return np.concatenate(p), np.concatenate(paired)

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        from torch.nn.functional import pad

        p, weight = features["p"], features["weight"]
        k = min(p.shape[-1], logits.shape[1])
        std = logits.std(-1, unbiased=False, keepdim=True).clamp(min=LEAST_STD)
        q = pad((logits / std).softmax(-1).topk(k).values, (0, p.shape[-1] - k))[:, None]
        distance = (p - q).abs().where(~p.isnan(), 0).sum(-1)
        return weighted(weight, distance).sum(1)
