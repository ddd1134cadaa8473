"""Distillation: the target learns from teachers' distributions, stored or in memory.

The paper's KD (arXiv 2401.10491, table 6) is a larger model of the target's family as the teacher with forward KL:
`{method: distillation, teachers: [teacher], online: true, lambda: 0.9}`.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from baselines.method import METHODS, Candidate, Context, Need, Parameters, Role
from fusion.errors import UserError
from fusion.losses.specs import Distillation, Learning, OnlineDistillation

OFFLINE = ("map", "map_on", "alignment", "tail")


class TeacherParameters(Parameters):
    """From whom is learnt, and how much."""

    lam: float = Field(0.9, ge=0, le=1, alias="lambda", description="weight of the CLM term")
    teachers: list[Role] | None = Field(None, min_length=1, description="roles that teach; all sources without")

    def taught_by(self, context: Context) -> list[str]:
        return list(context.sources) if self.teachers is None else self.teachers


class DistillationParameters(TeacherParameters):
    divergence: str = Field("forward_kl", description="forward_kl, reverse_kl or jensen_shannon")
    temperature: float = Field(1.0, gt=0, description="of both sides; offline one of extraction.temperatures")
    online: bool = Field(False, description="teachers in memory, the whole vocabulary, the target's own tokenizer")
    map: str | None = Field(None, description="offline: mined, em or first_piece (as for fusellm)")
    map_on: Literal["bytes", "strings"] | None = Field(None, description="offline: what the map compares")
    alignment: str | None = Field(None, description="offline: same_end or dtw")
    tail: Literal["bucket", "renormalise", "gold"] | None = Field(
        None, description="offline: the mass outside the top k; bucket without, and with all but forward_kl"
    )

    @model_validator(mode="after")
    def _asks_for_what_there_is(self) -> "DistillationParameters":
        if self.online and (given := [name for name in OFFLINE if getattr(self, name) is not None]):
            raise UserError(f"{given[0]} is about stored distributions: leave it out, or set online to false.")
        self.learning(self.teachers or ["all sources"])
        return self

    def learning(self, teachers: list[str]) -> Learning:
        """What these parameters ask for."""
        if self.online:
            return OnlineDistillation(teachers, self.divergence, self.temperature)
        given = {name: value for name in OFFLINE if (value := getattr(self, name)) is not None}
        return Distillation(teachers, self.divergence, self.temperature, **given)


@METHODS.register("distillation", reference="arXiv 1503.02531; as KD in arXiv 2401.10491, table 6")
class DistillationMethod:
    """The target trained on lambda * CLM + (1 - lambda) * divergence from the teachers."""

    schema: ClassVar[type[Parameters]] = DistillationParameters
    needs: ClassVar[Sequence[Need]] = ("training", "teacher")

    def __init__(self, parameters: DistillationParameters) -> None:
        self.parameters = parameters

    def build(self, context: Context) -> Candidate:
        teachers = self.parameters.taught_by(context)
        return context.train(lam=self.parameters.lam, learn=self.parameters.learning(teachers))
