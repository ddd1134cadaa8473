"""Approximate likelihood matching: the likelihoods of the same bytes, whatever the tokenizers (arXiv 2503.20083)."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.method import METHODS, Candidate, Context, Need, Parameters
from fusion.losses.specs import ChunkDistillation


class ALMParameters(TeacherParameters):
    temperature: float = Field(100.0, gt=0, description="chunk likelihoods are compared to the power 1/temperature")


@METHODS.register("alm", reference="arXiv 2503.20083")
class ALM:
    """The target trained on lambda * CLM + (1 - lambda) * divergence of chunk likelihoods."""

    schema: ClassVar[type[Parameters]] = ALMParameters
    needs: ClassVar[Sequence[Need]] = ("training", "teacher")

    def __init__(self, parameters: ALMParameters) -> None:
        self.parameters = parameters

    def build(self, context: Context) -> Candidate:
        learn = ChunkDistillation(self.parameters.taught_by(context), self.parameters.temperature)
        return context.train(lam=self.parameters.lam, learn=learn)
