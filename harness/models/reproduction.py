"""Saving a converted model and proving that what was saved is the original: tokens, weights and logits."""

import gc
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from harness.models.checkpoints import load_model, load_tokenizer
from harness.models.resolution import ModelSpec, ResolvedModel
from harness.store.files import write_atomically
from harness.store.provenance import made_by

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Texts on which tokenizers that look alike come apart: spaces at both ends, runs of spaces and line ends, digits,
# scripts with and without spaces, combining marks, joined emoji, compatibility characters, control characters.
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces before, two after  ",
    " one before",
    "a\n\n\nb\r\nc\td \n e",
    "def f(x):\n    return {'a': x[1:], \"b\": 10 ** -3}  # why?\n",
    "In 1984, 2,023.5 and 007 cost $1,000 (12%) at 10:45; ½ ² ٣٤",
    "It's they'll WE'RE don't I'd",
    "Größe, naïve café, ﬁne, ＡＢＣ, e\u0301 and é",
    "Привет, мир! Γειά σου Κόσμε",
    "東京は日本の首都です。中文分词没有空格。한국어 문장",
    "مرحبا بالعالم हिन्दी में पाठ ไทยไม่มีช่องว่าง עברית",
    "🙂 👩‍👩‍👧‍👦 🇩🇪 👍🏽",
    "zero\u200bwidth, nb\u00a0space, \x01control, \ufeffmark",
    "https://example.org/a_b?c=d&e=%20#f <tag> </tag>",
)


class NotReproduced(Exception):
    """What was saved is not the original; the message says in a clause what differs, and by how much."""

    def __init__(self, difference: str, **evidence: "torch.Tensor") -> None:
        super().__init__(difference)
        self.evidence = evidence
        """What was compared: ids[1, T], expected logits[1, T, V] and those found; empty where it was not logits."""

    def refusal(self, path: Path, out: Path) -> UserError:
        """The error for the user, after what was compared is kept beside `out`."""
        from safetensors.torch import save_file

        folder = out.with_name(f"{out.name}.difference")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        report = {"original": str(path), "difference": str(self), **made_by()}
        write_atomically(folder / "difference.json", json.dumps(report, indent=1))
        if self.evidence:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.evidence.items()}, folder / "logits.safetensors"
            )
        return UserError(
            f"The model converted from {path} is not the original, in two attempts: {self}. It was not kept; {path} is "
            f"unchanged, and what was compared is in {folder}. Check the memory and the disk of this machine and run "
            "the same command again, or use the hub's copy of the model."
        )


def token_ids(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """The ids of a text, without tokens that the tokenizer puts around it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def as_resolved(folder: Path) -> ResolvedModel:
    """A folder as a model that can be loaded, without a fingerprint."""
    return ResolvedModel(folder, folder.name, "", ModelSpec(name=str(folder)))


def _exact_dtype(model: "PreTrainedModel") -> "torch.dtype":
    """The smallest float type that holds every weight exactly."""
    import torch

    weights = list(model.state_dict().values())
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            return dtype
    return model.dtype


def _logits(model: "PreTrainedModel", ids: "torch.Tensor") -> "torch.Tensor":
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model.eval()(ids).logits.float()
    return logits


def _check_finite(model: "PreTrainedModel", origin: str) -> None:
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{origin} has weights that are not finite (first {name}): it was not converted.")


def save_checked(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerFast", out: Path, origin: str) -> None:
    """Saves the model, loads it again and compares tokens of every sample, special tokens, weights and logits.

    The original is freed half-way, so that one copy at a time is in memory. Raises NotReproduced for any difference,
    and UserError for a model, called `origin`, that cannot be used.
    """
    import torch
    from safetensors import safe_open

    _check_finite(model, origin)
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"The tokenizer has {len(tokenizer)} tokens and the model has fewer embeddings: they do not belong."
        )
    dtype = model.dtype
    ids = torch.tensor([[token for text in SAMPLE_TEXTS[:6] for token in token_ids(tokenizer, text)][:128]])
    expected = _logits(model, ids)
    stored = _exact_dtype(model) if dtype == torch.float32 else dtype
    model.to(stored)  # type: ignore[arg-type]
    weights = model.state_dict()
    model.save_pretrained(out)
    _save_tokenizer(tokenizer, out)
    for file in out.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no mapping)
                if name in weights and not torch.equal(tensors.get_tensor(name), weights[name]):
                    raise NotReproduced(f"the weight {name} is not in {file.name} as it was in memory")
    del model, weights
    gc.collect()
    again = load_tokenizer(as_resolved(out))
    same_roles = again.all_special_ids == tokenizer.all_special_ids and again.eos_token_id == tokenizer.eos_token_id
    different = [text for text in SAMPLE_TEXTS if token_ids(again, text) != token_ids(tokenizer, text)]
    if not same_roles or different:
        what = f"splits {different[0]!r} in another way" if different else "has other special tokens"
        raise NotReproduced(f"the tokenizer that was saved {what}")
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}[dtype]
    got = _logits(load_model(as_resolved(out), name), ids)  # type: ignore[arg-type]
    if difference := _difference(expected, got, 1e-5 if dtype == torch.float32 else 1e-2):
        raise NotReproduced(f"{difference} (computed in {name})", ids=ids, expected=expected, found=got)


def _difference(expected: "torch.Tensor", got: "torch.Tensor", relative: float) -> str:
    """What differs between two logits[1, T, V], in a clause; "" where they are equal.

    Equal weights give equal logits. What is allowed, as a share `relative` of the greatest logit, is for kernels whose
    sums depend on where memory lies.
    """
    bad = [int((~logits.isfinite()).sum()) for logits in (expected, got)]
    if any(bad):
        return (
            f"of {expected.numel():,} logits {bad[0]:,} of the original's and {bad[1]:,} of the converted model's are "
            "not finite"
        )
    apart, allowed = (got - expected).abs(), float(relative * expected.abs().max())
    if float(apart.max()) <= allowed:
        return ""
    position, token = divmod(int(apart.argmax()), expected.shape[-1])
    return (
        f"its logits differ by up to {float(apart.max()):.3g}, where {allowed:.3g} is allowed, in "
        f"{int((apart > allowed).sum()):,} of {expected.numel():,} numbers (most at position {position} for token "
        f"{token}: {float(got[0, position, token]):.6g} instead of {float(expected[0, position, token]):.6g})"
    )


def _save_tokenizer(tokenizer: "PreTrainedTokenizerFast", out: Path) -> None:
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "vocab_file", "gguf_file"):
        config.pop(key, None)
    # tokenizer.json alone is to decide: a named class would rebuild it from the vocabulary (see load_tokenizer).
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_atomically(path, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
