"""Converts a GGUF file or a pickle checkpoint to a model folder (safetensors, fast tokenizer, manifest), once.

No code of the model is executed: GGUF is data, and pickles are read by the weights-only loader, which only builds
tensors. The result is loaded again and compared with the original before it gets its name, so that a folder that exists
is complete and equal to the original.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError, message_line
from fusion.modeling.loading import check_loading, code_was_refused
from harness.models.checkpoints import control_tokens, load_tokenizer
from harness.models.manifest import CONVERTER, read_model_manifest, refuse_old_conversion, write_model_manifest
from harness.models.reproduction import SAMPLE_TEXTS, NotReproduced, as_resolved, save_checked, token_ids
from harness.models.resolution import PICKLE_FILES, SLOW_TOKENIZER_FILES, check_config_file
from harness.store.files import disk_errors, rename_durably
from harness.store.fingerprint import file_sha256

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

Notify = Callable[[str], None]

# How a byte-level vocabulary splits text before merging is only named in a GGUF file, and the library takes the GPT-2
# pattern for names that it does not know. These names mean that pattern ...
_GPT2_SPLIT = {"gpt-2", "mpt", "olmo", "jais", "phi-2"}
# ... and these mean every digit by itself first (SmolLM2 reads one bit per byte in 500 worse without).
_DIGITS_THEN_GPT2_SPLIT = {"smollm", "starcoder", "refact", "command-r", "codeshell"}


def convert(
    path: Path, out: Path, *, source: Mapping[str, Any] | None = None, licence: str = "", notify: Notify | None = None
) -> Path:
    """Converts a .gguf file or a checkpoint folder to the model folder `out`, and returns `out`.

    GGUF is de-quantised to float32, and stored as 16-bit floats where these hold every weight exactly. A pickle keeps
    its dtype. The logits are those of the original. `source` replaces the description of the origin in the manifest.

    Raises:
        UserError: `out` holds another model or one of another version, or the original cannot be reproduced exactly.
    """
    from filelock import FileLock

    path, out = Path(path).expanduser(), Path(out)
    is_gguf = path.is_file() and path.suffix == ".gguf"
    if not is_gguf and not path.is_dir():
        raise UserError(f"{path} is neither a .gguf file nor a model's folder: give one of these to convert.")
    tell = notify or (lambda message: None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.convert.lock"):
        if source is None:
            source = _describe(path, is_gguf)
        if out.exists():
            if read_model_manifest(out).get("source") == dict(source):
                refuse_old_conversion(out)
                tell(f"{out} is there already.")
                return out
            raise UserError(f"{out} exists already and holds something else: choose another name, or delete it.")
        beside = out.parent / f".{out.name}.partial"
        try:
            tell(f"Converting {path} to safetensors{' (a minute or two)' if is_gguf else ''} ...")
            try:
                _convert(path, beside)
            except NotReproduced as difference:
                tell(f"{difference}: converting once more ...")
                try:
                    _convert(path, beside)
                except NotReproduced as again:
                    raise again.refusal(path, out) from None
            write_model_manifest(beside, source=source, licence=licence, converter=CONVERTER)
            rename_durably(beside, out)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return out


def _convert(path: Path, beside: Path) -> None:
    """Fills the folder `beside` anew. Raises NotReproduced when it does not hold the original."""
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    with disk_errors(beside):
        (_convert_folder if path.is_dir() else _convert_gguf)(path, beside)


def _describe(path: Path, is_gguf: bool) -> dict[str, Any]:
    if is_gguf:
        return {"kind": "gguf", "file": path.name, "sha256": file_sha256(path), "size": path.stat().st_size}
    pickles = sorted({file for pattern in PICKLE_FILES for file in path.glob(pattern)})
    weights = pickles or sorted(path.glob("*.safetensors"))
    hashes = {file.name: file_sha256(file) for file in weights}
    return {"kind": "pickle" if pickles else "folder", "folder": path.resolve().name, "sha256": hashes}


def _convert_gguf(path: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _gguf_tokenizer(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise UserError(f"{path} cannot be read as a GGUF model ({type(error).__name__}: {error}).") from error
    model, info = loaded
    check_loading(info, model, str(path))
    # The marks of quantisation make saving and training refuse a model whose weights are plain floats by now.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    save_checked(model, tokenizer, out, str(path))


def _gguf_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer that a GGUF file describes, with the pre-tokenizer that it names."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    try:
        metadata, tensors = read_gguf_metadata(str(path), ())
    except Exception as error:  # the reader raises whatever a broken header leads it to
        raise UserError(f"{path} cannot be read as a GGUF file ({type(error).__name__}: {error}).") from error
    dropped = sorted(name for name in tensors if name.startswith("rope_"))
    if dropped:
        raise UserError(
            f"{path} scales rotary positions by a tensor ({dropped[0]}) that would be lost: use the hub's copy."
        )
    if "tokenizer.ggml.tokens" not in metadata:
        raise UserError(f"{path} has no tokenizer inside: use the hub's copy of the model.")
    tokenizer: Any = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, local_files_only=True, trust_remote_code=False
    )
    kind, split = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2":
        if split in _DIGITS_THEN_GPT2_SPLIT:
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif split not in _GPT2_SPLIT and split not in GGUF_PRE_TOKENIZER_SPLITS:
            raise UserError(
                f"{path} says that its tokenizer splits text the {split!r} way, which is not known here: "
                "use the hub's copy of the model."
            )
    elif kind == "llama":
        _spell_spaces_exactly(tokenizer, prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))
    return _without_default_tokens(tokenizer, metadata)


def _without_default_tokens(tokenizer: "PreTrainedTokenizerFast", metadata: Mapping[str, Any]) -> Any:
    """Removes the tokens and roles that the library's class adds by default, which the model does not have."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    size = metadata["tokenizer.ggml.tokens"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < size]
    backend = Tokenizer.from_str(json.dumps(state))
    roles = {}
    for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        # Every file names a bos; a model that was never given one (Qwen's) is worse with it before a text.
        if token_id is not None and (role != "bos" or metadata.get("tokenizer.ggml.add_bos_token") is not False):
            roles[f"{role}_token"] = backend.id_to_token(token_id)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=tokenizer.chat_template, **roles)


def _spell_spaces_exactly(tokenizer: "PreTrainedTokenizerFast", *, prefix: bool) -> None:
    """Writes spaces as SentencePiece does: Metaspace drops the space before a text that begins with one."""
    from tokenizers import normalizers, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.Metaspace):
        steps = [normalizers.Prepend("▁")] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None


def _convert_folder(folder: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    check_config_file(folder)
    tokenizer = _folder_tokenizer(folder)
    has_safetensors = any(folder.glob("*.safetensors"))
    dtype = None if has_safetensors else _pickle_dtype(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=has_safetensors,
            weights_only=True,
            local_files_only=True,
            trust_remote_code=False,  # without this it asks, and a `y` runs the code
            output_loading_info=True,
            generation_config=GenerationConfig(),  # the folder's own may be one that is refused
        )
    except pickle.UnpicklingError as error:
        raise _unsafe(folder) from error
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if code_was_refused(error):
            raise UserError(
                f"{folder} needs Python code that lies beside it, which a conversion never runs: convert it with its "
                "own tools to safetensors, and use that folder with trust_remote_code if you trust the code."
            ) from error
        raise UserError(f"{folder} cannot be loaded: {message_line(error)}") from error
    model, info = loaded
    check_loading(info, model, str(folder))
    model.generation_config = control_tokens(as_resolved(folder))
    save_checked(model, tokenizer, out, str(folder))


def _unsafe(folder: Path) -> UserError:
    return UserError(
        f"{folder} holds pickles that are damaged or have more in them than weights: they were not executed and cannot "
        "be used."
    )


def _pickle_dtype(folder: Path) -> "torch.dtype":
    """The float type of the checkpoint, which config.json may state wrongly; float32 where there are several."""
    import torch

    found = set()
    paths = sorted(folder.glob("pytorch_model*.bin"))
    if not paths:
        raise UserError(f"{folder} holds no weights that can be converted: neither safetensors nor pytorch_model.bin.")
    for path in paths:
        try:
            state = torch.load(path, map_location="meta", weights_only=True)
            found |= {value.dtype for value in state.values() if value.is_floating_point()}
        except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
            raise _unsafe(folder) from error
    return found.pop() if len(found) == 1 else torch.float32


def _folder_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The folder's fast tokenizer, or one made from its slow one that splits every sample equally."""
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(as_resolved(folder))
    passages = sorted(folder.glob("*.model"))
    if not passages:
        slow = [file.name for pattern in SLOW_TOKENIZER_FILES for file in folder.glob(pattern)]
        has = f"only {slow[0]}, from which no exact fast tokenizer can be made here" if slow else "no tokenizer"
        raise UserError(f"{folder} has {has}: put the model's tokenizer.json into it.")
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    try:
        slow_tokenizer = SentencePieceProcessor(model_file=str(passages[0]))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{passages[0]} cannot be read as a SentencePiece model: copy it again.") from error
    differing = ""
    for exact in (False, True):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise UserError(
                f"{folder}: no fast tokenizer can be made of {passages[0].name}: put a tokenizer.json into it."
            )
        if exact:
            _spell_spaces_exactly(tokenizer, prefix=slow_tokenizer.encode("a", out_type=str)[0].startswith("▁"))
        wrong = [text for text in SAMPLE_TEXTS if token_ids(tokenizer, text) != slow_tokenizer.encode(text)]
        if not wrong:
            fast: PreTrainedTokenizerFast = tokenizer
            return fast
        differing = wrong[0]
    raise UserError(
        f"The fast tokenizer made of {passages[0]} splits {differing!r} otherwise than the slow one: "
        "put the model's own tokenizer.json into the folder."
    )
