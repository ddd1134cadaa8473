"""The models as they are: the target before training, and every source."""

from pydantic import Field

from baselines.method import Candidate, Context, Parameters, Role
from baselines.registry import method


class AsIsParameters(Parameters):
    """Which model is evaluated."""

    role: Role = Field("target", description="role whose model is evaluated: target, teacher or a source's name")


@method("as_is")
def as_is(context: Context, parameters: AsIsParameters) -> Candidate:
    """The model of a role without any change."""
    return context.model(parameters.role)
