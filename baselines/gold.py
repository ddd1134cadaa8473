"""GOLD: shared tokens are compared by name, all others by rank (hybrid ULD, as in TRL's GOLDTrainer)."""

from typing import Literal

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.method import Candidate, Context
from baselines.registry import method
from baselines.tuning import TunableShare
from fusion.losses.gold import GOLDLoss
from fusion.vocabulary.maps import Unit


class GOLDParameters(TeacherParameters):
    """The two parts of the loss, their weights, and how a chunk of several tokens becomes one distribution."""

    lam: TunableShare = Field(0.0, alias="lambda", description="weight of the CLM term (published code: 0)")
    beta: float = Field(0.5, ge=0, le=1, description="shared tokens: 0 forward KL, 1 reverse KL, 0.5 Jensen-Shannon")
    matched_weight: float | None = Field(
        None, ge=0, description="weight of shared tokens; null: the part of the teacher's vocabulary that is shared"
    )
    unmatched_weight: float | None = Field(None, ge=0, description="weight of all others; null: 1 - matched_weight")
    merge: Literal["bayesian", "observed"] = Field(
        "bayesian",
        description="the distribution of a chunk is the one before its last token, or (observed, the default of the "
        "published code) the one after its first",
    )
    temperature: float = Field(1.0, gt=0, description="of both sides; one of extraction.temperatures")
    map_on: Unit = Field("bytes", description="what makes tokens the same: bytes, or strings as in the published code")


@method("gold", needs=("training", "teacher"), reference="TRL GOLDTrainer (Unlocking On-Policy Distillation, 2025)")
def gold(context: Context, parameters: GOLDParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * (JSD on shared tokens + sorted distance of all others)."""
    given = parameters.model_dump(
        include={"beta", "matched_weight", "unmatched_weight", "merge", "temperature", "map_on"}
    )
    return parameters.train_mixed(context, GOLDLoss(**parameters.teaching(context), **given))
