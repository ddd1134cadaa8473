"""Distillation from teachers that predict every batch with the target, over the whole vocabulary (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import UserError
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.loss import (
    LOSSES,
    LossRequirements,
    LossResources,
    TeacherLoss,
    TeacherModel,
    flat,
    has_next,
    weighted,
)
from fusion.registry import Choice, PartName
from fusion.types import SequencePredictions

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.term import Term


@LOSSES.register("online_distillation", version=2, reference="arXiv 1503.02531")
@dataclass(frozen=True)
class OnlineDistillationLoss(TeacherLoss):
    """T^2 D(p^(1/T) || q^(1/T)), the (weighted) mean over teachers p with the target's tokenizer, over all tokens.

    It is taken at every position with a next token in its passage, and the sum is divided by the number of CLM labels.
    A teacher's hidden states are computed for the whole batch, its logits for a chunk when the target's are. Entries of
    either's logits beyond the other's have no token.
    """

    divergence: PartName = "forward_kl"
    """D, in the registry of divergences."""
    temperature: float = 1.0
    """T."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_weights == "mince":
            raise UserError(
                "teacher_weights: mince chooses by stored predictions: set online to false, or give numbers."
            )

    def requirements(self, target: str) -> LossRequirements:
        return LossRequirements(models=list(self.teachers))

    def parts(self) -> Mapping[str, Choice[Any]]:
        return {"divergence": DIVERGENCES.choose(self.divergence)}

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """weight float32[N], 1 at positions with a next token in their passage."""
        return {"weight": has_next([passage[resources.target] for passage in predictions]).astype(np.float32)}

    def term(self, batch: Mapping[str, Tensor], teachers: Mapping[str, TeacherModel]) -> Term:
        from fusion.losses.term import LossTerm

        models = [teachers[name] for name in self.teachers]
        features = flat(batch)
        for s, model in enumerate(models):
            features[f"hidden{s}"] = model.hidden(batch["input_ids"], batch["position_ids"])
        return LossTerm(partial(self, teachers=models), features)

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor], teachers: Sequence[TeacherModel] = ()) -> Tensor:
        divergence = DIVERGENCES.choose(self.divergence).value
        nats = logits.new_zeros(len(logits))
        weights = [1.0] * len(teachers) if isinstance(self.teacher_weights, str) else self.teacher_weights
        for s, teacher in enumerate(teachers):
            teacher_logits = teacher.logits(features[f"hidden{s}"]).to(logits.dtype)
            size = min(teacher_logits.shape[1], logits.shape[1])
            log_p, log_q = ((z[:, :size] / self.temperature).log_softmax(-1) for z in (teacher_logits, logits))
            nats = nats + weights[s] / sum(weights) * weighted(features["weight"], divergence(log_p, log_q))
        return self.temperature**2 * nats
