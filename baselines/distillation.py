"""Distillation: the target learns from teachers' distributions, stored or in memory.

The paper's KD (arXiv 2401.10491, table 6) is a larger model of the target's family as the teacher with forward KL:
`{method: distillation, teachers: [teacher], online: true, lambda: 0.9}`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from baselines.method import Candidate, Context, Role
from baselines.registry import method
from baselines.training import MixedParameters
from fusion.alignment.pairing import ALIGNMENTS
from fusion.errors import UserError
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.loss import Loss, check_teacher_weights
from fusion.losses.online_distillation import OnlineDistillationLoss
from fusion.losses.top_k_distillation import TopKDistillationLoss
from fusion.registry import PartName, Registered
from fusion.vocabulary.maps import MAPS

# Parameters of stored distributions; teachers in memory have none of these choices.
_OFFLINE = ("map", "map_on", "alignment", "tail", "projection", "inside", "true_token")


class TeacherParameters(MixedParameters):
    """The teachers and the weight of the language-modelling term: what all distillation methods share."""

    teachers: list[Role] | None = Field(None, min_length=1, description="roles of the teachers; null: all sources")
    teacher_weights: Literal["uniform", "mince"] | list[float] = Field(
        "uniform",
        description="of several teachers: uniform, their mean; one number a teacher, of which the shares count; mince, "
        "in each passage the one with the least nats per byte",
    )

    @model_validator(mode="after")
    def _check_weights(self) -> "TeacherParameters":
        check_teacher_weights(self.teacher_weights, self.named_teachers())
        return self

    def named_teachers(self) -> list[str]:
        """The teachers as far as the parameters name them, for checks; else names that stand for all sources."""
        if self.teachers is not None:
            return self.teachers
        n = 1 if isinstance(self.teacher_weights, str) else len(self.teacher_weights)
        return [f"source {i}" for i in range(n)]

    def teacher_roles(self, context: Context) -> list[str]:
        """The roles that teach: those named, or every source of the experiment."""
        return list(context.sources) if self.teachers is None else self.teachers

    def teaching(self, context: Context) -> dict[str, Any]:
        """The arguments `teachers` and `teacher_weights` of a `TeacherLoss`."""
        return {"teachers": self.teacher_roles(context), "teacher_weights": self.teacher_weights}


class DistillationParameters(TeacherParameters):
    """The divergence and its temperature, and how stored distributions reach the target's vocabulary."""

    divergence: Annotated[PartName, Registered(DIVERGENCES)] = Field(
        "forward_kl", description="divergence from the teacher's to the target's distribution"
    )
    temperature: float = Field(1.0, gt=0, description="of both sides; offline one of extraction.temperatures")
    online: bool = Field(False, description="teachers in memory, the whole vocabulary, the target's own tokenizer")
    map: Annotated[str, Registered(MAPS)] | None = Field(
        None,
        description="offline: kind of the vocabulary map",
        json_schema_extra={"effective": TopKDistillationLoss.map},
    )
    map_on: Literal["bytes", "strings"] | None = Field(
        None, description="offline: what the map compares", json_schema_extra={"effective": TopKDistillationLoss.map_on}
    )
    alignment: Annotated[PartName, Registered(ALIGNMENTS)] | None = Field(
        None,
        description="offline: which teacher position is paired with a target position",
        json_schema_extra={"effective": str(TopKDistillationLoss.alignment)},
    )
    tail: Literal["bucket", "renormalise", "gold"] | None = Field(
        None,
        description="offline: mass outside the top k; all divergences but forward_kl require bucket",
        json_schema_extra={"effective": TopKDistillationLoss.tail},
    )
    projection: Literal["path", "token"] | None = Field(
        None,
        description="offline: entries become the target's along the text, or token by token",
        json_schema_extra={"effective": TopKDistillationLoss.projection},
    )
    inside: Literal["prefix", "none"] | None = Field(
        None,
        description="offline: entries at positions inside a teacher's token",
        json_schema_extra={"effective": TopKDistillationLoss.inside},
    )
    true_token: Literal["always", "top_k"] | None = Field(
        None,
        description="offline: whether the teacher's true next token is always an entry",
        json_schema_extra={"effective": TopKDistillationLoss.true_token},
    )

    @model_validator(mode="after")
    def _check_loss(self) -> "DistillationParameters":
        if self.online and (given := [name for name in _OFFLINE if getattr(self, name) is not None]):
            raise UserError(f"{given[0]} is about stored distributions: leave it out, or set online to false.")
        self.loss(self.named_teachers())
        return self

    def loss(self, teachers: list[str]) -> Loss:
        """The loss of these parameters with the given teachers."""
        if self.online:
            return OnlineDistillationLoss(
                teachers, self.divergence, self.temperature, teacher_weights=self.teacher_weights
            )
        given = {name: value for name in _OFFLINE if (value := getattr(self, name)) is not None}
        return TopKDistillationLoss(
            teachers, self.divergence, self.temperature, teacher_weights=self.teacher_weights, **given
        )


@method(
    "distillation",
    needs=("training", "teacher"),
    reference="arXiv 1503.02531; as KD in arXiv 2401.10491, table 6",
)
def distillation(context: Context, parameters: DistillationParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * divergence from the teachers."""
    return parameters.train_mixed(context, parameters.loss(parameters.teacher_roles(context)))
