"""Which target token a text begins with, for source tokens and for what is left of them after their first bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusion.vocabulary.token_bytes import Vocabulary

EncodeAll = Callable[[Sequence[str]], list[list[int]]]
"""A tokenizer's ids of each text, without special tokens."""
Pieces = Callable[[Sequence[bytes], Vocabulary, EncodeAll], np.ndarray]
"""int32[N]: the first target token of each of N byte strings, -1 for none."""

NOTHING = -1
# What a target with a dummy prefix is given before the text, so that the text's own first token carries no added space.
_SENTINELS = ("\n", "|", "=", "a", "0", "\u4e00")


@dataclass(frozen=True)
class PieceMap:
    """The first target token of every source token's bytes, and of every rest of them.

    A source token u of n bytes has n + 2 places from `starts[u]` on: n of its bytes in `spelling`; in `images` the
    first target token of its bytes with a space before them, of the bytes themselves, of the bytes without the first,
    and so on. Control tokens and ids without bytes have n = 0.
    """

    starts: np.ndarray
    """int64[V + 1]."""
    spelling: np.ndarray
    """uint8[S], 0 beyond a token's bytes."""
    images: np.ndarray
    """int32[S] target ids, -1 for none."""

    @cached_property
    def ids(self) -> np.ndarray:
        """int32[V], the target id of every source id: the vocabulary map."""
        return self.images[self.starts[:-1] + 1]

    @classmethod
    def of(cls, source: Vocabulary, images: np.ndarray) -> PieceMap:
        """The map with these stored `images`; bytes and places are the source vocabulary's."""
        spelled = [token or b"" for token in source.token_bytes]
        lengths = np.array([len(token) for token in spelled], np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths + 2)])
        spelling = np.frombuffer(b"".join(token + b"\0\0" for token in spelled), np.uint8)
        return cls(starts, spelling, images)


def build_piece_map(
    pieces: Pieces, vocabulary_map: np.ndarray, source: Vocabulary, target: Vocabulary, encode_all: EncodeAll
) -> PieceMap:
    """The piece map by the kind `pieces`; `vocabulary_map` int32[V] has the images of control tokens."""
    lengths = np.array([len(token or b"") for token in source.token_bytes], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths + 2)])
    numbers: dict[bytes, int] = {}
    which = np.full(starts[-1], -1, np.int64)  # the distinct text of each place
    for start, token in zip(starts.tolist(), source.token_bytes, strict=False):
        if not token:
            continue
        if target.dummy_prefix:
            which[start] = numbers.setdefault(b" " + token, len(numbers))
        for offset in range(len(token)):
            which[start + 1 + offset] = numbers.setdefault(token[offset:], len(numbers))
    first = np.append(pieces(list(numbers), target, encode_all), NOTHING).astype(np.int32)
    images = first[which]
    wordless = np.flatnonzero(lengths == 0)
    images[starts[wordless]] = images[starts[wordless] + 1] = vocabulary_map[wordless]
    return PieceMap.of(source, images)


def first_pieces(texts: Sequence[bytes], target: Vocabulary, encode_all: EncodeAll) -> np.ndarray:
    """int32[N]: the first token when the target's tokenizer encodes each text; it favours short target tokens.

    Bytes that are not whole characters, and text that the tokenizer does not reproduce, take the longest target token
    that is a prefix of the bytes (`longest_prefixes`).
    """
    result = np.full(len(texts), NOTHING, np.int32)
    readable = [(n, text.decode("utf-8")) for n, text in enumerate(texts) if _is_text(text)]
    before: Sequence[str] = _SENTINELS if target.dummy_prefix else ("",)
    for sentinel in before:
        skip = encode_all([sentinel])[0] if sentinel else []
        waiting = []
        for (n, text), ids in zip(readable, encode_all([sentinel + text for _, text in readable]), strict=True):
            if len(ids) <= len(skip) or ids[: len(skip)] != skip:  # the sentinel merged with the text
                waiting.append((n, text))
                continue
            token = ids[len(skip)]
            spelled = target.token_bytes[token] if token < len(target) else None
            if spelled and texts[n].startswith(spelled):
                result[n] = token
        readable = waiting
    left = np.flatnonzero(result == NOTHING)
    result[left] = longest_prefixes([texts[n] for n in left], target, encode_all)
    return result


def longest_prefixes(texts: Sequence[bytes], target: Vocabulary, encode_all: EncodeAll | None = None) -> np.ndarray:
    """int32[N]: the longest target token that is a prefix of each text; ordinary tokens precede byte-fallback tokens
    (byte-prefix marginalisation, arXiv 2607.22334).
    """
    by_bytes = {token: i for i, token in enumerate(target.token_bytes) if token and i in target.byte_fallback}
    ordinary = ((token, i) for i, token in enumerate(target.token_bytes) if token and i not in target.byte_fallback)
    by_bytes.update(reversed([*ordinary]))  # the lowest of ids with equal bytes
    longest = max(map(len, by_bytes), default=0)
    return np.array([_longest_prefix(text, by_bytes, longest) for text in texts], np.int32)


def _longest_prefix(text: bytes, by_bytes: dict[bytes, int], longest: int) -> int:
    for length in range(min(len(text), longest), 0, -1):
        if (token := by_bytes.get(text[:length])) is not None:
            return token
    return NOTHING


def _is_text(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
