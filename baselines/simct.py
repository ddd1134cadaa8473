"""SimCT: shared tokens and the shortest texts that both tokenizers can write as outcomes (arXiv 2605.07711)."""

from typing import Annotated, Literal

from pydantic import Field

from baselines.distillation import TeacherParameters
from baselines.method import Candidate, Context
from baselines.registry import method
from baselines.tuning import TunableShare
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.simct import SimCTLoss
from fusion.registry import PartName, Registered
from fusion.vocabulary.maps import Unit


class SimCTParameters(TeacherParameters):
    """The divergence, and what the text is cut into."""

    lam: TunableShare = Field(0.0, alias="lambda", description="weight of the CLM term (published scripts: 0)")
    divergence: Annotated[PartName, Registered(DIVERGENCES)] = Field(
        "reverse_kl", description="divergence from the teacher's to the target's distribution"
    )
    segments: Literal["shared_ends", "published"] = Field(
        "shared_ends",
        description="chunks end at every byte end that both share, or (published code) only behind a token of both",
    )
    map_on: Unit = Field("bytes", description="what makes tokens the same: bytes, or strings as in the published code")


@method("simct", needs=("training", "teacher"), reference="arXiv 2605.07711")
def simct(context: Context, parameters: SimCTParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * divergence over shared tokens and the text of each chunk."""
    given = parameters.model_dump(include={"divergence", "segments", "map_on"})
    return parameters.train_mixed(context, SimCTLoss(**parameters.teaching(context), **given))
