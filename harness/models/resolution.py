"""From a model's name to its folder and fingerprint; nothing is loaded.

A model is used from one folder: config.json, safetensors weights and a fast tokenizer (tokenizer.json). Any other form
(GGUF, pickle checkpoints, slow tokenizers) is refused with the one command that converts it to such a folder.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusion.errors import UserError
from harness.config.errors import ConfigurationError, problems_of
from harness.models.catalogue import CONVERT, FETCH, find_entry, is_hub_id, unknown_model
from harness.models.manifest import check_model_manifest, read_model_manifest, refuse_old_conversion
from harness.runtime.device import DType
from harness.store.files import read_json_object, remembered
from harness.store.fingerprint import file_sha256, fingerprint
from harness.store.paths import HASHES

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SLOW_TOKENIZER_FILES = ("*.model", "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken", "tokenization_*.py")
PICKLE_FILES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


class ModelSpec(BaseModel):
    """A model as a configuration names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="catalogue name, hub id, local folder, or .gguf file")
    revision: str | None = Field(default=None, description="hub revision. Default: the catalogue's, else main")
    dtype: DType = Field(default="auto", description="computing precision; auto: bfloat16 where it is native")
    trust_remote_code: bool = Field(default=False, description="run Python code from the model's folder")
    attn_implementation: str | None = None
    prefix: str | None = Field(
        default=None, description="token that precedes every passage. Default: bos, else eos (see `prefix_id`)"
    )

    def prefix_identity(self) -> dict[str, str]:
        """The prefix, for the key of what is read with it; empty for the default."""
        return {} if self.prefix is None else {"prefix": self.prefix}

    def computing(self, dtype: str) -> dict[str, str]:
        """How the model computes, as the key of a stored result holds it: its precision, made definite, and attention.

        The attention implementation is part of it where one is asked for; else it follows from the libraries.
        """
        attention = self.attn_implementation
        return {"dtype": dtype, **({} if attention is None else {"attn_implementation": attention})}


def model_spec(**given: Any) -> ModelSpec:
    """A model from what a caller gives. Raises ConfigurationError for wrong values, in one sentence each."""
    try:
        return ModelSpec.model_validate(given)
    except ValidationError as error:
        where = f"the model {given.get('name')}"
        raise ConfigurationError(where, problems_of(error, ModelSpec, given, where)) from None


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this machine.

    `fingerprint` is a SHA-256 of configuration, end tokens, tokenizer, weights and code that is run, not of the place.
    """

    folder: Path
    name: str
    fingerprint: str
    spec: ModelSpec = field(compare=False)


def model_folder(name: str, revision: str | None, models_dir: Path) -> Path:
    """The folder of a fetched model: the catalogue's name or `owner--name`, with `@revision` where one is given."""
    entry = find_entry(name)
    folder = entry[0] if entry else name.replace("/", "--")
    default = entry[1].revision if entry else "main"
    if revision is None or revision == default:
        return models_dir / folder
    return models_dir / f"{folder}@{revision.replace('/', '--')}"


def resolve(spec: ModelSpec, models_dir: Path) -> ResolvedModel:
    """The folder of a model and the fingerprint of its files.

    Raises UserError, naming the command that helps, when the model is not on this machine, is not in safetensors, has
    no fast tokenizer, differs from its manifest, or was converted by another version.
    """
    folder = _locate(spec, models_dir)
    refuse_old_conversion(folder)
    check_config_file(folder)
    weights = weight_files(folder)
    check_tokenizer_files(folder)
    code = sorted(path.name for path in folder.glob("*.py")) if spec.trust_remote_code else []
    optional = (GENERATION_FILE, *TOKENIZER_FILES)
    names = ["config.json", *(name for name in optional if (folder / name).exists()), *code]
    hashes = _hashes(folder, [*names, *weights], models_dir / HASHES)
    check_model_manifest(folder, hashes, optional)
    entry = find_entry(spec.name)
    return ResolvedModel(folder, entry[0] if entry else folder.name, fingerprint(hashes), spec)


def tokenizer_fingerprint(folder: Path, models_dir: Path) -> str:
    """SHA-256 of the files that a model's tokenizer is read from: the same for all checkpoints that share them."""
    names = [name for name in TOKENIZER_FILES if (folder / name).exists()]
    return fingerprint(_hashes(folder, names, models_dir / HASHES))


def _locate(spec: ModelSpec, models_dir: Path) -> Path:
    name = spec.name
    if find_entry(name) is None:
        path = Path(name).expanduser()
        if name.endswith(".gguf"):
            return _converted_gguf(path, models_dir)
        if path.is_dir():
            if spec.revision is not None:
                raise UserError(f"{name} is a local folder and has no revision {spec.revision!r}: leave revision out.")
            return path.resolve()
        if not is_hub_id(name) and not (models_dir / name).is_dir():
            raise unknown_model(name)
    folder = model_folder(name, spec.revision, models_dir)
    if not folder.is_dir():
        revision = f" --revision {spec.revision}" if spec.revision else ""
        fetch = f"run `{FETCH} {name}{revision}`"
        if find_entry(name) is None:
            raise UserError(
                f"The model {name} is neither a folder here nor in {models_dir}: correct the path, or {fetch} if it is "
                "on the hub."
            )
        raise UserError(f"The model {name} is not in {models_dir}: {fetch}.")
    return folder.resolve()


def _converted_gguf(path: Path, models_dir: Path) -> Path:
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the path of a .gguf file, or a model's name.")
    folder = models_dir / path.stem
    source = read_model_manifest(folder).get("source", {}) if folder.is_dir() else {}
    hashes = _hashes(path.parent, [path.name], models_dir / HASHES)
    if source.get("sha256") != hashes[path.name]:
        raise UserError(f"{path} is a GGUF file and not yet converted to safetensors: run `{CONVERT} {path}`.")
    return folder.resolve()


def check_config_file(folder: Path) -> None:
    """Raises UserError unless the folder has a config.json that can be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no model: it has no config.json.")
    read_json_object(path, "fetch or copy the model again")


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a checkpoint and of their index.

    Raises UserError when there are none, or one is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json_object(index, "fetch or copy the model again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} names no weights: fetch or copy the model again.")
        names = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which its index names: fetch or copy the model again.")
        return [index.name, *names]
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if _has_any(folder, PICKLE_FILES):
        raise UserError(
            f"{folder} holds its weights as pickles, which are not read here: run `{CONVERT} {folder}` "
            "and name the folder that it writes."
        )
    raise UserError(f"{folder} holds no weights: there is no model.safetensors in it.")


def check_tokenizer_files(folder: Path) -> None:
    """Raises UserError unless the folder has a fast tokenizer (tokenizer.json)."""
    if (folder / "tokenizer.json").is_file():
        return
    if _has_any(folder, SLOW_TOKENIZER_FILES):
        raise UserError(
            f"{folder} has only a slow tokenizer (no tokenizer.json): run `{CONVERT} {folder}`, "
            "which makes a fast one and checks it against the slow one."
        )
    raise UserError(f"{folder} has no tokenizer: put the model's tokenizer.json beside its weights.")


def _has_any(folder: Path, patterns: Sequence[str]) -> bool:
    return any(path for pattern in patterns for path in folder.glob(pattern))


def count_parameters(folder: Path) -> int:
    """The number of stored parameters, from the headers of the safetensors files; no weight is read.

    Raises UserError for a file that is not safetensors, or whose size is not the one that its header states.
    """
    from safetensors import SafetensorError, safe_open

    total = 0
    for path in (folder / name for name in weight_files(folder) if name.endswith(".safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                total += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118  no dict
        except SafetensorError as error:
            if "not fully covered" in str(error):
                raise UserError(
                    f"{path} has {path.stat().st_size:,} bytes, which is not the size that its header states: "
                    "fetch or copy the model again."
                ) from None
            raise UserError(f"{path} is no safetensors file: fetch or copy the model again.") from None
    return total


def _hashes(folder: Path, names: Sequence[str], record: Path) -> dict[str, str]:
    """SHA-256 by file name, remembered in `record`."""
    paths = {name: (folder / name).resolve() for name in names}
    return {name: remembered(record, [path], partial(file_sha256, path)) for name, path in paths.items()}
