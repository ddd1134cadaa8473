"""Universal logit distillation: sorted probabilities, so that no tokenizer matters (arXiv 2402.12030)."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.method import METHODS, Candidate, Context, Need, Parameters
from fusion.losses.specs import SortedDistillation


class ULDParameters(TeacherParameters):
    lam: float = Field(0.4, ge=0, le=1, alias="lambda", description="weight of the CLM term (paper: 1 to 1.5)")


@METHODS.register("uld", reference="arXiv 2402.12030")
class ULD:
    """The target trained on lambda * CLM + (1 - lambda) * Wasserstein-1 distance of the sorted probabilities."""

    schema: ClassVar[type[Parameters]] = ULDParameters
    needs: ClassVar[Sequence[Need]] = ("training", "teacher")

    def __init__(self, parameters: ULDParameters) -> None:
        self.parameters = parameters

    def build(self, context: Context) -> Candidate:
        learn = SortedDistillation(self.parameters.taught_by(context))
        return context.train(lam=self.parameters.lam, learn=learn)
