"""Whether texts are likelier under another prefix than the one that a model is given.

Every passage is preceded by one token. A model that never saw that token before a text predicts the text badly after
it: Qwen2.5-Coder needs a quarter more bits per byte after its end of text than after a line end.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fusion.errors import UserError
from fusion.modeling.context import context_length
from harness.models.checkpoints import load_config, load_model, load_tokenizer
from harness.models.resolution import ResolvedModel
from harness.store.artifacts import Estimate, Spec, Store
from harness.store.files import read_json, write_json
from harness.store.fingerprint import fingerprint

VERSION = 1
TEXTS = 8
"""Number of texts that are read under each prefix."""
_BYTES = 600  # of a text: where it begins is where prefixes differ
_CLEARLY = 0.01  # of the bits per byte that another prefix must save
_FILE = "prefixes.json"


def prefix_warning(store: Store, model: ResolvedModel, texts: Sequence[str], *, dtype: str, device: str) -> str | None:
    """A sentence where the texts are clearly likelier under bos, eos or a line end than under the model's prefix.

    Clearly: by one percent of the bits per byte, and by three standard errors over the texts. What was measured is an
    artifact, so that the model is loaded once.
    """
    context = context_length(load_config(model)) or _BYTES + 2
    size = min(_BYTES, context - 2)  # a token is a byte or more, but for those put before a text
    some = [text.encode("utf-8")[:size].decode("utf-8", "ignore") for text in texts[:TEXTS]]
    spec = Spec(
        "prefix_check",
        model.name,
        VERSION,
        {"model": model.fingerprint, "texts": fingerprint(some)},
        {**model.spec.computing(dtype), **model.spec.prefix_identity()},
    )

    def build(folder: Path) -> None:
        write_json(folder / _FILE, _bits_per_byte(model, some, dtype, device))

    folder = store.ensure(spec, build, Estimate())
    if not folder.exists():  # in a plan
        return None
    measured = read_json(folder / _FILE, f"remove {folder} to have it made again")
    return _sentence(model.name, *list(measured.items())) if measured else None


def _bits_per_byte(model: ResolvedModel, texts: Sequence[str], dtype: str, device: str) -> dict[str, list[float]]:
    """Bits per byte of each text under each prefix, by the prefix's token; the model's own prefix first.

    Empty where they cannot be had: the model's logits are not finite.
    """
    from fusion.inference.likelihood import document_nats
    from fusion.vocabulary.tokenization import encode_all, prefix_id

    tokenizer = load_tokenizer(model)
    prefixes = [prefix_id(tokenizer, model.spec.prefix)]
    for other in ("bos", "eos", "\n"):
        try:
            prefixes.append(prefix_id(tokenizer, other))
        except UserError:  # it has no such token
            continue
    loaded = load_model(model, dtype, device)  # type: ignore[arg-type]
    tokens = encode_all(tokenizer, texts)
    n_bytes = np.array([len(text.encode("utf-8")) for text in texts])
    window = max(map(len, tokens)) + 1
    measured = {}
    for prefix in dict.fromkeys(prefixes):
        try:
            nats = document_nats(loaded, tokens, prefix=prefix, window=window, batch_tokens=window)
        except UserError:
            return {}
        measured[str(tokenizer.decode([prefix]))] = (nats / n_bytes / np.log(2)).tolist()
    return measured


def _sentence(name: str, own: tuple[str, list[float]], *others: tuple[str, list[float]]) -> str | None:
    mean = float(np.mean(own[1]))
    better = []
    for token, bits in others:
        saved = np.array(own[1]) - np.array(bits)
        error = float(saved.std(ddof=1)) / np.sqrt(len(saved)) if len(saved) > 1 else np.inf
        if saved.mean() > max(_CLEARLY * mean, 3 * error):
            better.append((float(np.mean(bits)), token))
    if not better:
        return None
    bits_per_byte, token = min(better)
    return (
        f"{name} reads {len(own[1])} texts after the prefix {own[0]!r} at {mean:.3f} bits per byte and after "
        f"{token!r} at {bits_per_byte:.3f}: set its role's `prefix` to what it was trained with."
    )
