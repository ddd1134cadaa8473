"""The manifest of a fetched or converted model: its source, its licence, its converter and the hash of every file."""

import importlib.metadata
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.store.files import read_json_object, write_atomically
from harness.store.fingerprint import file_sha256

MANIFEST = "fusellm-model.json"
CONVERTER = 3
"""Version of `harness.models.convert`, raised where it would convert a file otherwise than before.

Version 1 gave models a bos that they were never trained with, and version 2 settings of decoding.
"""
_CONVERTED = {"gguf", "pickle", "folder", "wheels"}  # kinds of sources that are always converted


def write_model_manifest(
    folder: Path, *, source: Mapping[str, Any], licence: str, converter: int | None = None
) -> None:
    """Writes the manifest: source, licence, versions of what made the folder, and SHA-256 of each file in it.

    converter: the version of the converter; None for files that are as they were fetched.
    """
    manifest = {
        "source": dict(source),
        **({} if converter is None else {"converter": converter}),
        "licence": licence,
        "made_by": {name: importlib.metadata.version(name) for name in ("fusellm-harness", "transformers", "torch")},
        "files": {
            file.relative_to(folder).as_posix(): file_sha256(file)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != MANIFEST
        },
    }
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def read_model_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a model folder; empty for a folder of the user's own, which has none."""
    path = folder / MANIFEST
    return read_json_object(path, f"delete {folder} and fetch or convert the model again") if path.is_file() else {}


def refuse_old_conversion(folder: Path) -> None:
    """Raises UserError for a model folder that another version of the converter made."""
    manifest = read_model_manifest(folder)
    converted = "converter" in manifest or manifest.get("source", {}).get("kind") in _CONVERTED
    if converted and manifest.get("converter") != CONVERTER:
        raise UserError(
            f"{folder} was converted by another version of this program, which may have made another tokenizer of the "
            "same file: delete that folder and fetch or convert the model again."
        )


def check_model_manifest(folder: Path, hashes: Mapping[str, str], optional: Iterable[str]) -> None:
    """Raises UserError where the hash of a file differs from the one in the manifest, if there is a manifest.

    hashes: those of the files that are read. optional: files that would be read if they were there.
    """
    recorded = read_model_manifest(folder).get("files")
    if not isinstance(recorded, dict):
        return
    for name in [*hashes, *(name for name in optional if name in recorded)]:
        if recorded.get(name) != hashes.get(name):
            raise UserError(
                f"{folder / name} is not the file that was put there (its SHA-256 differs from {MANIFEST}): "
                f"delete {folder} and fetch or convert the model again."
            )
