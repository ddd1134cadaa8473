"""Approximate likelihood matching: the likelihoods of the same bytes, whatever the tokenizers (arXiv 2503.20083)."""

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.method import Candidate, Context
from baselines.registry import method
from fusion.losses.alm import ALMLoss


class ALMParameters(TeacherParameters):
    """The teachers, lambda and the temperature of the chunks' likelihoods."""

    temperature: float = Field(100.0, gt=0, description="chunk likelihoods are compared to the power 1/temperature")


@method("alm", needs=("training", "teacher"), reference="arXiv 2503.20083")
def alm(context: Context, parameters: ALMParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * divergence of chunk likelihoods."""
    loss = ALMLoss(**parameters.teaching(context), temperature=parameters.temperature)
    return parameters.train_mixed(context, loss)
