"""Universal logit distillation: sorted probabilities, so that no tokenizer matters (arXiv 2402.12030)."""

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


@method("uld", needs=("training", "teacher"), reference="arXiv 2402.12030")
def uld(context: Context, parameters: ULDParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * Wasserstein-1 distance of the sorted probabilities."""
    return parameters.train_mixed(context, ULDLoss(**parameters.teaching(context)))
