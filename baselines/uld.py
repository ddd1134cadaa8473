"""Universal logit distillation: sorted probabilities, so that no tokenizer matters (arXiv 2402.12030)."""

from typing import Literal

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.method import Candidate, Context
from baselines.registry import method
from baselines.tuning import TunableShare
from fusion.losses.uld import ULDLoss


class ULDParameters(TeacherParameters):
    """The teachers and lambda."""

    lam: TunableShare = Field(
        0.4, alias="lambda", description="weight of the CLM term (paper: CLM + 1.5 ULD, which is 0.4)"
    )
    pairing: Literal["same_end", "index"] = Field(
        "same_end", description="positions that end at the same byte; index: as published, the n-th with the n-th"
    )
    temperature: float = Field(1.0, gt=0, description="of both sides; one of extraction.temperatures")


@method("uld", needs=("training", "teacher"), reference="arXiv 2402.12030")
def uld(context: Context, parameters: ULDParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * Wasserstein-1 distance of the sorted probabilities."""
    loss = ULDLoss(**parameters.teaching(context), pairing=parameters.pairing, temperature=parameters.temperature)
    return parameters.train_mixed(context, loss)
