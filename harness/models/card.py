"""The metadata of a model card: base model, licence, data sets and tags, as the Hugging Face Hub reads them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.models.catalogue import find_entry, is_hub_id
from harness.models.manifest import read_model_manifest
from harness.models.resolution import ResolvedModel

_HUB_LICENCES = {"Gemma terms": "gemma", "Llama 2 Community License": "llama2"}
_NOT_STATED = ("", "not stated")


@dataclass(frozen=True)
class Origin:
    """The hub id of a model and its licence, each None where it is not known."""

    hub: str | None
    licence: str | None


def origin(model: ResolvedModel) -> Origin:
    """Where a model comes from, by the catalogue or else by the manifest of a fetched or converted model."""
    if (entry := find_entry(model.spec.name) or find_entry(model.name)) is not None:
        return Origin(entry[1].hub, entry[1].licence)
    manifest = read_model_manifest(model.folder)
    licence = str(manifest.get("licence", ""))
    return Origin(manifest.get("source", {}).get("hub"), None if licence in _NOT_STATED else licence)


def card_metadata(base: ResolvedModel, *, corpus: str, tags: Sequence[str] = ()) -> str:
    """The YAML header of the card of a model that was trained from `base` on the corpus of that path.

    `base_model` and `datasets` are hub ids and are left out where there is none; a licence that the hub has no name for
    is given as `other` with its own name.
    """
    import yaml

    found = origin(base)
    metadata: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if found.hub is not None:
        metadata["base_model"] = found.hub
    if found.licence is not None:
        licence = _HUB_LICENCES.get(found.licence, found.licence.lower())
        is_identifier = re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence) is not None
        metadata |= {"license": licence} if is_identifier else {"license": "other", "license_name": found.licence}
    if is_hub_id(corpus) and not Path(corpus).expanduser().exists():
        metadata["datasets"] = [corpus]
    metadata["tags"] = ["fusellm-harness", *tags]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"
