from typing import Annotated
from pydantic import Field
from baselines.fusellm import FuseLLM, FuseLLMParameters
from baselines.method import Candidate, Context, Parameters


class Settings(Parameters):
    lambdas: list[Annotated[float, Field(ge=0, le=1)]] = [0.5, 0.9]


class TunedLambda:
    """FuseLLM with the lambda that is best on validation text."""

    schema = Settings
    needs = ("training",)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def build(self, context: Context) -> Candidate:
        trained = [FuseLLM(FuseLLMParameters(lam=lam)).build(context) for lam in self.settings.lambdas]
        return min(trained, key=context.score)
