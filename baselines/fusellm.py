"""FuseLLM: the target learns from the aligned, fused distributions of the sources (arXiv 2401.10491)."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

from pydantic import BeforeValidator, ConfigDict, Field, create_model, model_validator

from baselines.method import Candidate, Context, Role
from baselines.registry import method
from baselines.training import MixedParameters
from fusion.alignment.pairing import ALIGNMENTS
from fusion.alignment.selection import FUSIONS
from fusion.docstrings import field_docstrings
from fusion.errors import UnknownName, UserError
from fusion.losses.fusion_loss import FusionLoss
from fusion.losses.loss import check_map
from fusion.registry import Registered, Registry
from fusion.switches import PRESETS, Switches
from fusion.vocabulary.maps import MAPS, Unit
from fusion.vocabulary.pieces import PIECES

_MAP_PRESETS: Mapping[str, Mapping[str, str]] = {
    "corrected": {"map": "first_piece", "map_on": "bytes"},
    "published": {"map": "mined", "map_on": "strings"},
}
_PRESETS: Mapping[str, Mapping[str, Any]] = {name: {**_MAP_PRESETS[name], **PRESETS[name]} for name in PRESETS}
"""All that a preset sets: the vocabulary map, which is made before a training, and the switches of fusion."""


def _check_preset(preset: Any) -> Any:
    """Refuses an unknown preset with the nearest spelling."""
    if not isinstance(preset, str) or preset not in _PRESETS:
        raise UnknownName("preset", preset, _PRESETS)
    return preset


class _PresetParameters(MixedParameters):
    """The parameters of FuseLLM beside the switches of fusion."""

    model_config = ConfigDict(json_schema_extra={"presets": {name: dict(values) for name, values in _PRESETS.items()}})

    preset: Annotated[Literal["corrected", "published"], BeforeValidator(_check_preset)] = Field(
        "corrected",
        description="values of all switches that are not set: corrected, or published as in the published code",
    )
    sources: list[Role] | None = Field(
        None, min_length=1, description="the sources that take part; null: all of the experiment"
    )
    k: int | None = Field(
        None, gt=0, description="entries used per position, at most those stored; null: all that are stored"
    )
    map: Annotated[str, Registered(MAPS)] = Field("first_piece", description="kind of the vocabulary map")
    map_on: Unit = Field(
        "bytes", description="what the map compares: the bytes that tokens stand for, or their strings"
    )


def _switch_fields() -> dict[str, Any]:
    """A field for every switch of fusion, with its type, its default and its description."""
    registries: dict[str, Registry[Any]] = {"alignment": ALIGNMENTS, "fusion": FUSIONS}
    types, descriptions = get_type_hints(Switches), field_docstrings(Switches)
    definitions = {}
    for switch in fields(Switches):
        name, annotation = switch.name, types[switch.name]
        if name in registries:
            annotation = Annotated[annotation, Registered(registries[name])]
        elif get_args(annotation):
            annotation = Annotated[annotation, BeforeValidator(_check_switch(name))]
        definitions[name] = (annotation, Field(switch.default, description=descriptions.get(name)))
    return definitions


def _check_switch(name: str) -> Callable[[Any], Any]:
    """A validator with the sentence of `Switches` for a value that the switch does not have."""

    def check(value: Any) -> Any:
        Switches(**{name: value})
        return value

    return check


if TYPE_CHECKING:
    _SwitchParameters = _PresetParameters
else:
    _SwitchParameters = create_model("_SwitchParameters", __base__=_PresetParameters, **_switch_fields())


class FuseLLMParameters(_SwitchParameters):
    """A preset and every switch of fusion; after validation each holds its effective value.

    A switch that is not given, or given as null, has the value of the preset.
    """

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        preset = given.get("preset", "corrected")
        # One that is unknown is refused by its own field, beside whatever else is wrong.
        values = _PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        null = {name for name in [*values, *Switches.__dataclass_fields__] if given.get(name) is None}
        return {**values, **{key: value for key, value in given.items() if key not in null}}

    @model_validator(mode="after")
    def _check(self) -> "FuseLLMParameters":
        self.switches()
        if self.sources and len(set(self.sources)) < len(self.sources):
            raise UserError(f"sources {self.sources} names one twice: give each source once.")
        if self.map in PIECES and self.map_on != "bytes":
            raise UserError(f"the map {self.map} compares bytes: set map_on to bytes.")
        check_map(self.map, self.switches())
        return self

    def switches(self) -> Switches:
        """The effective values of the switches of fusion."""
        return Switches(**{switch.name: getattr(self, switch.name) for switch in fields(Switches)})

    def loss(self, sources: list[str]) -> FusionLoss:
        """The fusion loss of these parameters over the given sources."""
        return FusionLoss(sources=sources, switches=self.switches(), k=self.k, map=self.map, map_on=self.map_on)


def source_roles(context: Context, parameters: FuseLLMParameters) -> list[str]:
    """The sources that take part. Raises UserError for one that the experiment does not have."""
    sources = parameters.sources or list(context.sources)
    if unknown := sorted(set(sources) - set(context.sources)):
        raise UserError(
            f"{context.label} names the source {unknown[0]!r}; the experiment's are {', '.join(context.sources)}."
        )
    return sources


@method("fusellm", needs=("training",), reference="arXiv 2401.10491")
def fusellm(context: Context, parameters: FuseLLMParameters) -> Candidate:
    """The target trained on lambda * CLM + (1 - lambda) * fusion."""
    return parameters.train_mixed(context, parameters.loss(source_roles(context, parameters)))
