"""FuseLLM: the target learns from the aligned, fused distributions of the sources (arXiv 2401.10491)."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from baselines.method import Candidate, Context, Parameters, Role
from baselines.registry import method
from fusion.errors import UserError, did_you_mean
from fusion.losses.specs import Fusion
from fusion.switches import PRESETS, Switches

# A preset names switches and nothing else; these are the two that are not fusion's own.
MAP_PRESETS: Mapping[str, Mapping[str, str]] = {
    "corrected": {"map": "mined", "map_on": "bytes"},
    "published": {"map": "mined", "map_on": "strings"},
}


class FuseLLMParameters(Parameters):
    """A preset, and any switch set alone over it (see `fusion.switches.Switches` for what each one does)."""

    preset: str = Field("corrected", description="corrected, or published: what the published code computes")
    lam: float = Field(0.9, ge=0, le=1, alias="lambda", description="weight of the CLM term (paper: 0.9)")
    sources: list[Role] | None = Field(None, min_length=1, description="the sources that take part; all without")
    k: int | None = Field(None, gt=0, description="use only so many of the entries stored a position; all without")
    map: str | None = Field(None, description="vocabulary map: mined, em or first_piece")
    map_on: Literal["bytes", "strings"] | None = Field(None, description="what the map compares")
    alignment: str | None = None
    unaligned: str | None = None
    unmapped: str | None = None
    duplicates: str | None = None
    tail: str | None = None
    fusion: str | None = None
    select_over: str | None = None
    select_by: str | None = None
    weights: str | None = None
    weight_temperature: float | None = None
    loss_positions: str | None = None
    include_target: bool | None = None

    @model_validator(mode="after")
    def _switches_hold(self) -> "FuseLLMParameters":
        setting = self._setting(MAP_PRESETS, ["map", "map_on"])
        self.fused(self.sources or ["all sources"])
        if self.sources and len(set(self.sources)) < len(self.sources):
            raise UserError(f"sources {self.sources} names one twice: give each source once.")
        if setting["map"] == "first_piece" and setting["map_on"] != "bytes":
            raise UserError("the map first_piece compares bytes: set map_on to bytes.")
        return self

    def _setting(self, presets: Mapping[str, Mapping[str, Any]], names: list[str]) -> dict[str, Any]:
        if self.preset not in presets:
            hint = did_you_mean(self.preset, presets)
            raise UserError(f"there is no preset {self.preset!r}{hint}: presets are {', '.join(presets)}.")
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {**presets[self.preset], **own}

    def switches(self) -> Switches:
        """The preset's switches with those set alone over them."""
        return Switches(**self._setting(PRESETS, list(Switches.__dataclass_fields__)))

    def fused(self, sources: list[str]) -> Fusion:
        """How these parameters fuse the given sources."""
        setting = self._setting(MAP_PRESETS, ["map", "map_on"])
        return Fusion(sources=sources, switches=self.switches(), k=self.k, **setting)


@method("fusellm", needs=("training",), reference="arXiv 2401.10491")
def fusellm(context: Context, parameters: FuseLLMParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * fusion."""
    sources = parameters.sources or list(context.sources)
    if unknown := sorted(set(sources) - set(context.sources)):
        raise UserError(
            f"{context.label} names the source {unknown[0]!r}; the experiment's are {', '.join(context.sources)}."
        )
    return context.train(lam=parameters.lam, learn=parameters.fused(sources))
