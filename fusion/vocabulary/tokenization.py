"""From text to token ids and back, and what is lost on the way.

What holds for every tokenizer, whatever its family:

- The tokens of a text spell it, or `lost_bytes` says how much of it they do not spell.
- The text of a continuation is the text of the whole without the text of the prompt (`decode_continuation`); the
  continuation's tokens decoded alone may lack a space.
- Not every id of a vocabulary is ever written (`written_ids`): two may stand for the same bytes, and an added token may
  hide the entries that it contains.
- What precedes a text is a choice (`prefix_id`), and the distributions depend on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, AnyStr

import numpy as np

from fusion.errors import UserError
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EncodeTexts = Callable[[Sequence[str]], list[list[int]]]
"""The ids of each of some texts, without special tokens."""

_LONGEST_COMPARED = 2**20  # bytes; of longer texts everything between the first and the last difference counts as lost
# What a tokenizer with a dummy prefix is given before a text, so that the text's first token carries no added space.
_SENTINELS = ("\n", "|", "=", "a", "0", "\u4e00")


def prefix_id(tokenizer: PreTrainedTokenizerFast, prefix: str | None = None) -> int:
    """The token that precedes every passage: `bos`, `eos`, or a token by its string or its text (such as a line end).

    Default: bos, else eos. Raises UserError if the tokenizer has no such token, and for `none`.
    """
    for role in ("bos", "eos") if prefix is None else (prefix,):
        token_id = getattr(tokenizer, f"{role}_token_id") if role in ("bos", "eos") else _named_token(tokenizer, role)
        if token_id is not None:
            return int(token_id)
    if prefix is None:
        raise UserError(
            f"The tokenizer of {tokenizer.name_or_path!r} has neither a bos nor an eos token: set one, every passage "
            "is preceded by it, or set the role's prefix."
        )
    if prefix == "none":
        raise UserError(
            "A passage needs a prefix, from which its first token is predicted: set the role's prefix to a token that "
            'says little, such as "\\n".'
        )
    raise UserError(
        f"The tokenizer of {tokenizer.name_or_path!r} has no token {prefix!r}: set the role's prefix to bos, eos, or a "
        "token of its vocabulary."
    )


def _named_token(tokenizer: PreTrainedTokenizerFast, name: str) -> int | None:
    if name == "none":
        return None
    token_id: int | None = tokenizer.backend_tokenizer.token_to_id(name)
    if token_id is not None:
        return token_id
    ids = encode_after_text(partial(encode_all, tokenizer), Vocabulary.from_tokenizer(tokenizer), [name])[0]
    return ids[0] if len(ids) == 1 else None


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids of `text`: no special tokens are added, nothing is truncated, and text that looks like a control token
    stays text.

    One exception: a Unigram model whose pieces include control tokens emits them where the text contains their string;
    `byte_ends` is -1 from there on.
    """
    return encode_all(tokenizer, [text])[0]


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text as from `encode`, computed on all cores."""
    # Not by calling the tokenizer: what transformers does around its backend takes as long as the backend itself.
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def encode_alike(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """True if two tokenizers give every text the same ids, apart from control and added tokens."""
    mine, theirs = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (one, other))
    return all(mine[part] == theirs[part] for part in ("normalizer", "pre_tokenizer", "model"))


def encode_after_text(encode_texts: EncodeTexts, vocabulary: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text as they are in the middle of other text; [] where that cannot be found out.

    A tokenizer with a dummy prefix is given another character before the text, one that does not merge with it.
    """
    if not vocabulary.dummy_prefix:
        return encode_texts(texts)
    found: list[list[int]] = [[] for _ in texts]
    left = list(range(len(texts)))
    for sentinel in _SENTINELS:
        before, *written = encode_texts([sentinel, *(sentinel + texts[n] for n in left)])
        merged = []
        for n, ids in zip(left, written, strict=True):
            if len(ids) > len(before) and ids[: len(before)] == before:
                found[n] = ids[len(before) :]
            else:
                merged.append(n)
        left = merged
        if not left:
            break
    return found


def written_ids(vocabulary: Vocabulary, encode_texts: EncodeTexts) -> np.ndarray:
    """bool[V], true for the ids that the tokenizer writes when it encodes their own bytes, in the middle of other text.

    GPT-NeoX's vocabulary, for one, has runs of spaces as entries and again as added tokens, and only the latter are
    written. Ids whose bytes are no text by themselves (a part of a character) cannot be asked for and count as written;
    ids without bytes do not.
    """
    written = np.array([bool(spelling) for spelling in vocabulary.token_bytes], dtype=bool)
    texts: dict[int, str] = {}
    for i in np.flatnonzero(written).tolist():
        try:
            texts[i] = (vocabulary.token_bytes[i] or b"").decode("utf-8")
        except UnicodeDecodeError:
            continue
    ids = encode_after_text(encode_texts, vocabulary, list(texts.values()))
    written[list(texts)] = [by_itself == [i] for i, by_itself in zip(texts, ids, strict=True)]
    return written


def decode_continuation(
    tokenizer: PreTrainedTokenizerFast, prompt: Sequence[int], new: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """The text that the ids `new` add to that of `prompt`.

    The new ids decoded alone may lack their first space: decoders of SentencePiece models (Llama 2's) strip the one
    that their tokenizer puts before every text.
    """
    before, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)) for ids in ([*prompt], [*prompt, *new])
    )
    # A prompt that ends inside a character shows a replacement character there, which the whole does not.
    return whole[_common_prefix(before, whole) :]


def lost_bytes(ids: Sequence[int], vocabulary: Vocabulary, text: bytes) -> int:
    """How many bytes of the text its tokens `ids` do not spell; 0 exactly where they spell all of it and nothing else.

    Bytes outside a longest common subsequence of the text and what the tokens spell. Text is lost where a tokenizer
    drops a character, normalises it, or has one unknown token for it.
    """
    ends = byte_ends(ids, vocabulary, text)
    if (int(ends[-1]) if len(ends) else 0) == len(text):
        return 0
    spelled = b"".join(vocabulary.token_bytes[i] or b"" for i in ids if 0 <= i < len(vocabulary))
    return max(1, _not_in(spelled, text))


def _not_in(spelled: bytes, text: bytes) -> int:
    """The length of `text` without that of the longest common subsequence (bit-parallel, Hyyrö 2004)."""
    start = _common_prefix(spelled, text)
    spelled, text = spelled[start:][::-1], text[start:][::-1]
    end = _common_prefix(spelled, text)
    spelled, text = spelled[end:], text[end:]
    if min(len(spelled), len(text)) > _LONGEST_COMPARED:
        return len(text)
    values = np.frombuffer(spelled, np.uint8)
    places = {c: int.from_bytes(np.packbits(values == c, bitorder="little").tobytes(), "little") for c in set(spelled)}
    whole = (1 << len(spelled)) - 1
    row = whole
    for c in text:
        matches = row & places.get(c, 0)
        row = ((row + matches) | (row - matches)) & whole
    return len(text) - (len(spelled) - row.bit_count())


def _common_prefix(one: AnyStr, other: AnyStr) -> int:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
