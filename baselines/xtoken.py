"""X-Token: distillation in the teacher's vocabulary, by a sparse projection matrix (arXiv 2605.21699)."""

from typing import Annotated, Literal

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.method import Candidate, Context
from baselines.registry import method
from baselines.tuning import TunableShare
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.loss import Balance
from fusion.losses.xtoken import XTokenLoss
from fusion.registry import PartName, Registered


class XTokenParameters(TeacherParameters):
    """The objective, the projection matrix, and how the two terms are weighed."""

    lam: TunableShare = Field(
        0.5, alias="lambda", description="weight of the CLM term (paper: equal parts, the other term rescaled)"
    )
    balance: Balance = Field(
        "rescale", description="rescale: the other term is brought to the size of the CLM term (paper: dynamic scaling)"
    )
    objective: Literal["p_kl", "h_kl"] = Field(
        "p_kl", description="KL over the teacher's vocabulary; or KL of paired tokens and a sorted distance of others"
    )
    divergence: Annotated[PartName, Registered(DIVERGENCES)] = Field(
        "forward_kl", description="divergence from the teacher's to the target's distribution"
    )
    temperature: float = Field(1.0, gt=0, description="of both sides; one of extraction.temperatures")
    projection: Literal["paper", "published"] = Field(
        "paper", description="the matrix is of the target's tokens; or of the teacher's too (published code)"
    )
    unmapped: Literal["bucket", "renormalise"] = Field(
        "bucket",
        description="p_kl: the target's tokens without a row are in the rest, or (published code) left out",
    )
    least_weight: float = Field(
        0.6,
        gt=0,
        le=1,
        description="h_kl: weight in the matrix from which two tokens are a pair (published code: 0.6)",
    )
    most_unpaired: int = Field(8192, ge=1, description="h_kl: greatest number of ranks that are compared")


@method("xtoken", needs=("training", "teacher"), reference="arXiv 2605.21699")
def xtoken(context: Context, parameters: XTokenParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * divergence in the teacher's vocabulary."""
    own = {"objective", "divergence", "temperature", "projection", "unmapped", "least_weight", "most_unpaired"}
    given = parameters.model_dump(include=own)
    return parameters.train_mixed(context, XTokenLoss(**parameters.teaching(context), **given))
