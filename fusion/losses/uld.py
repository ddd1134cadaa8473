"""Universal logit distillation: sorted probabilities, so that tokenizers do not matter (arXiv 2402.12030)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from fusion.alignment.pairing import same_end
from fusion.errors import UserError
from fusion.losses.loss import (
    LOSSES,
    LossRequirements,
    LossResources,
    TeacherLoss,
    has_next,
    weighted,
)
from fusion.types import SequencePredictions

if TYPE_CHECKING:
    from torch import Tensor

Pairing = Literal["same_end", "index"]


@LOSSES.register("uld", version=3, reference="arXiv 2402.12030")
@dataclass(frozen=True)
class ULDLoss(TeacherLoss):
    """Wasserstein-1 distance sum_i |p_(i) - q_(i)| of teacher's and target's probabilities, each sorted (section 3.2).

    The k stored probabilities of the teacher, its greatest, are compared one by one with the target's k greatest, and
    the mass of the rest with the rest; with k the vocabulary that is the whole distance. Positions are aligned by the
    byte at which the text before them ends, or as in the published code: the n-th token of one with the n-th of the
    other, whatever text they stand for. The sum over positions is divided by the number of CLM labels, aligned or not,
    so that its share falls with the part of positions that are aligned; the published code takes the mean of a sample,
    then of the samples.
    """

    pairing: Pairing = "same_end"
    """Which positions are compared: those that end at the same byte, or have the same index."""
    temperature: float = 1.0
    """Temperature of both distributions, at which the predictions must have been extracted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairing not in get_args(Pairing):
            raise UserError(f"pairing is {self.pairing!r}: it is same_end or index.")

    def requirements(self, target: str) -> LossRequirements:
        return LossRequirements(predictions=list(self.teachers), temperature=self.temperature)

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """p float32[N, S, K], greatest first, tail and weight float32[N, S] of the S teachers."""
        teachers = [self._aligned(name, resources.target, predictions) for name in self.teachers]
        p, tail, paired = zip(*teachers, strict=True)
        width = max(x.shape[1] for x in p)
        p = [np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in p]
        weight = self.position_weights(paired, predictions, n_bytes, resources.target)
        return {"p": np.stack(p, 1), "tail": np.stack(tail, 1), "weight": weight}

    def _aligned(
        self, name: str, target: str, predictions: SequencePredictions
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32[N, k] probabilities and float32[N] tail of a teacher at the target's N positions, and bool[N], which
        are aligned and have a next token.
        """
        p, tail, paired = [], [], []
        for passage in predictions:
            teacher, own = passage[name], passage[target]
            if self.pairing == "same_end":
                at = same_end(teacher.byte_ends, own.byte_ends)
            else:  # a teacher's last position has no next token
                index = np.arange(len(own.tokens))
                at = np.where(index < len(teacher.tokens) - 1, index, -1)
            paired.append((at >= 0) & has_next([own]) & (not teacher.skipped))
            p.append(np.exp(teacher.log_p)[at])
            tail.append(teacher.tail[at])
        return np.concatenate(p), np.concatenate(tail), np.concatenate(paired)

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        from torch.nn.functional import pad

        p, tail, weight = (features[name] for name in ("p", "tail", "weight"))
        k = p.shape[-1]
        top = (logits / self.temperature).softmax(-1).topk(min(k, logits.shape[1])).values
        rest = 1 - top.sum(1, keepdim=True)
        top = pad(top, (0, k - top.shape[1]))
        distance = (p - top[:, None]).abs().sum(-1) + (tail - rest).abs()
        return weighted(weight, distance).sum(1)
