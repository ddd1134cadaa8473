from typing import Annotated
from pydantic import Field
from baselines.fusellm import FuseLLMParameters, fusellm
from baselines.method import Candidate, Context, Parameters
from baselines.registry import method


class TunedLambdaParameters(Parameters):
    lambdas: list[Annotated[float, Field(ge=0, le=1)]] = Field([0.3, 0.9], description="values that are tried")


@method("tuned_lambda", needs=("training",))
def tuned_lambda(context: Context, parameters: TunedLambdaParameters) -> Candidate:
    """FuseLLM with the lambda that is best on validation text."""
    trained = [fusellm(context, FuseLLMParameters(lam=lam)) for lam in parameters.lambdas]
    return min(trained, key=context.validation_nll)
