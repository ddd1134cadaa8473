"""Byte-prefix marginalisation: what a teacher says of the next bytes, in the target's tokens (arXiv 2607.22334)."""

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.method import Candidate, Context
from baselines.registry import method
from baselines.tuning import TunableShare
from fusion.losses.bpm import BPMLoss


class BPMParameters(TeacherParameters):
    """The divergence, and at which positions and for which tokens the teacher's distribution is translated."""

    lam: TunableShare = Field(0.0, alias="lambda", description="weight of the CLM term (paper: 0)")
    beta: float = Field(0.5, ge=0, le=1, description="0 forward KL, 1 reverse KL, 0.5 Jensen-Shannon")
    mixture: float = Field(0.0, ge=0, le=1, description="beta 1: part of the target in what it is compared with")
    chain: bool = Field(True, description="whether target tokens beyond the teacher's token get their probability")
    skip_spaces: bool = Field(True, description="leave out positions whose next token is only spaces or tabs")


@method("bpm", needs=("training", "teacher"), reference="arXiv 2607.22334")
def bpm(context: Context, parameters: BPMParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * divergence from what the teacher says of the next bytes."""
    given = parameters.model_dump(include={"beta", "mixture", "chain", "skip_spaces"})
    return parameters.train_mixed(context, BPMLoss(**parameters.teaching(context), **given))
