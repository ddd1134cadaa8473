"""The models as they are: the target before training, and every source."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from baselines.method import METHODS, Candidate, Context, Need, Parameters, Role


class AsIsParameters(Parameters):
    role: Role = Field("target", description="target, or a source's name")


@METHODS.register("as_is")
class AsIs:
    """A role's model without any change."""

    schema: ClassVar[type[Parameters]] = AsIsParameters
    needs: ClassVar[Sequence[Need]] = ()

    def __init__(self, parameters: AsIsParameters) -> None:
        self.parameters = parameters

    def build(self, context: Context) -> Candidate:
        return context.model(self.parameters.role)
