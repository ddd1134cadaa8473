"""Which checkpoints can be merged: those of one architecture, one size and one tokenizer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError

# Properties of a configuration that say nothing about the weights: names, library, precision, special tokens; and the
# tokenizer of a shape, which is compared by itself.
_NOT_COMPARED = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range",
    "max_position_embeddings", "pad_token_id", "tokenizer", "transformers_version", "use_cache",
}  # fmt: skip
# Compared first, since the other sizes follow from them: the message then names the cause.
_COMPARED_FIRST = ("model_type", "hidden_size", "vocab_size")
_PER_LAYER = {"num_hidden_layers", "layer_types"}  # may differ where a mergekit configuration has slices


def check_mergeable(
    shapes: Mapping[str, Path | Mapping[str, Any]], label: str, *, sliced: bool = False, tokenizers: bool = True
) -> None:
    """Raises UserError, naming the first difference, unless all models have one architecture, size and tokenizer.

    shapes: for each model its checkpoint folder, or what is known before that exists (see `Candidate.shape`), of which
    only values known of both models are compared. Reads configurations and tokenizers, no weights. sliced: the number
    of layers may differ. tokenizers: False when the tokenizers may differ.
    """
    from transformers import AutoConfig

    (first, *others) = shapes or [""]
    skipped = _NOT_COMPARED | (_PER_LAYER if sliced else set())

    def read_config(name: str) -> dict[str, Any]:
        shape = shapes[name]
        if isinstance(shape, Path):
            shape = AutoConfig.from_pretrained(shape, local_files_only=True).get_text_config().to_dict()
        return {key: value for key, value in shape.items() if key not in skipped}

    for name in others:
        left, right = read_config(first), read_config(name)
        keys = left.keys() | right.keys()
        for shape, known in ((shapes[first], left), (shapes[name], right)):
            keys = keys if isinstance(shape, Path) else keys & known.keys()
        for key in [*(k for k in _COMPARED_FIRST if k in keys), *sorted(keys - set(_COMPARED_FIRST))]:
            if left.get(key) != right.get(key):
                raise UserError(
                    f"{label} cannot merge {first} and {name}, which differ in {key} ({left.get(key)} and "
                    f"{right.get(key)}): choose models of one architecture and size."
                )
        if tokenizers and (difference := _tokenizers_differ(shapes[first], shapes[name])):
            raise UserError(
                f"{label} cannot merge {first} and {name}, whose tokenizers differ ({difference}): choose models with "
                "one tokenizer."
            )


def _tokenizers_differ(first: Path | Mapping[str, Any], second: Path | Mapping[str, Any]) -> str:
    """The first difference of two tokenizers, in words; "" when they encode every text alike or one is not known."""
    from tokenizers import Tokenizer

    if not (isinstance(first, Path) and isinstance(second, Path)):
        names = [None if isinstance(shape, Path) else shape.get("tokenizer") for shape in (first, second)]
        return "" if None in names or names[0] == names[1] else f"{names[0]} and {names[1]}"
    left, right = (Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (first, second))
    if differing := left.get_vocab().items() ^ right.get_vocab().items():
        token, number = min(differing, key=lambda pair: (pair[1], pair[0]))
        return f"first in token {number}, {token!r}"
    # Compared as this version of the library writes them: another version may have written the same in another form.
    left_parts, right_parts = json.loads(left.to_str()), json.loads(right.to_str())
    for part in ("normalizer", "pre_tokenizer", "model"):
        if left_parts[part] != right_parts[part]:
            return f"in their {part}"
    return ""
