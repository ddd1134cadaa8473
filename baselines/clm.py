"""Plain continued training of the target on the same tokens: what fusion must beat."""

from collections.abc import Sequence
from typing import ClassVar

from baselines.method import METHODS, Candidate, Context, Need, Parameters


@METHODS.register("clm", reference="arXiv 2401.10491, section 4.1 (Llama-2 CLM)")
class CLM:
    """The objective at lambda = 1."""

    schema: ClassVar[type[Parameters]] = Parameters
    needs: ClassVar[Sequence[Need]] = ("training",)

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters

    def build(self, context: Context) -> Candidate:
        return context.train(lam=1.0)
