"""The strict objective: only where teacher and target predict the same token, over shared tokens (arXiv 2610.08448)."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from baselines.distillation import TeacherParameters
from baselines.method import Candidate, Context
from baselines.registry import method
from baselines.tuning import TunableShare
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.strict import StrictLoss
from fusion.registry import PartName, Registered
from fusion.vocabulary.maps import Unit


class StrictParameters(TeacherParameters):
    """The divergence, its outcomes, and the term of longer spans."""

    lam: TunableShare = Field(0.0, alias="lambda", description="weight of the CLM term (paper: 0)")
    divergence: Annotated[PartName, Registered(DIVERGENCES)] = Field(
        "reverse_kl", description="divergence from the teacher's to the target's distribution"
    )
    renormalise: bool = Field(True, description="distributions over shared tokens only; false: the rest is one outcome")
    top: int | None = Field(
        None, ge=1, description="compact form: so many of the target's most probable kept tokens (paper: 16); null: all"
    )
    span_weight: float = Field(
        0.0, ge=0, description="factor of the squared difference of the log-probabilities of longer spans (paper: 0)"
    )
    map_on: Unit = Field("bytes", description="what makes tokens the same: their bytes or their strings")

    @model_validator(mode="after")
    def _check_loss(self) -> "StrictParameters":
        self.loss(teachers=self.named_teachers())
        return self

    def loss(self, **teaching: Any) -> StrictLoss:
        """The loss of these parameters with the given teachers."""
        given = self.model_dump(include={"divergence", "renormalise", "top", "span_weight", "map_on"})
        return StrictLoss(**teaching, **given)


@method("strict", needs=("training", "teacher"), reference="arXiv 2610.08448")
def strict(context: Context, parameters: StrictParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * divergence over shared tokens at strictly equal positions."""
    return parameters.train_mixed(context, parameters.loss(**parameters.teaching(context)))
