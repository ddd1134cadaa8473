"""Which target token a string of bytes begins with: for source tokens, and for what is left of them after a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import EncodeTexts, encode_after_text, written_ids

Pieces = Callable[[Sequence[bytes]], np.ndarray]
"""int32[N]: the target token that each of N byte strings begins with, -1 for none."""

NOTHING = -1
"""In place of a target token: there is none."""
_TEXTS_AT_ONCE = 4096


def longest_prefix(target: Vocabulary, encode_target: EncodeTexts) -> Pieces:
    """The longest target token that is a prefix of the bytes (byte-prefix marginalisation, arXiv 2607.22334)."""
    written = np.flatnonzero(written_ids(target, encode_target)).tolist()
    # The last entry of equal bytes stays: an ordinary token before a byte-fallback one, the lowest id before others.
    order = sorted(written, key=lambda i: (i not in target.byte_fallback, -i))
    by_bytes = {target.token_bytes[i] or b"": i for i in order}
    longest = max(map(len, by_bytes), default=0)

    def prefix(text: bytes) -> int:
        for length in range(min(len(text), longest), 0, -1):
            if (token := by_bytes.get(text[:length])) is not None:
                return token
        return NOTHING

    return lambda texts: np.array([prefix(text) for text in texts], np.int32)


def encode_tokens(source: Vocabulary, target: Vocabulary, encode_target: EncodeTexts, n: int = 4) -> np.ndarray:
    """int32[V_source, n]: the first n target tokens of each source token's bytes, -1 beyond the last.

    They are what the target's tokenizer makes of the bytes in the middle of other text. Bytes that are not whole
    characters, and text that it does not reproduce, are cut into longest target tokens from the left, up to where there
    is none. Control tokens have no bytes and so no tokens.
    """
    longest = longest_prefix(target, encode_target)
    spelled = {i: token for i, token in enumerate(source.token_bytes) if token}
    readable = {}
    for i, token in spelled.items():
        with suppress(UnicodeDecodeError):
            readable[i] = token.decode("utf-8")
    encoded = dict(zip(readable, encode_after_text(encode_target, target, list(readable.values())), strict=True))
    result = np.full((len(source), n), NOTHING, np.int32)
    for i, token in spelled.items():
        ids = encoded.get(i, [])
        if b"".join(target.token_bytes[t] or b"" for t in ids if 0 <= t < len(target)) != token:
            ids, left = [], token
            while len(ids) < n and left and (piece := int(longest([left])[0])) != NOTHING:
                ids.append(piece)
                left = left[len(target.token_bytes[piece] or b"") :]
        result[i, : len(ids)] = ids[:n]
    return result


def first_piece(target: Vocabulary, encode_target: EncodeTexts) -> Pieces:
    """The first token when the target's tokenizer encodes the bytes; it favours short target tokens.

    Bytes that are not whole characters, and text that the tokenizer does not reproduce, take the longest target token
    that is a prefix of the bytes.
    """
    otherwise = longest_prefix(target, encode_target)

    def pieces(texts: Sequence[bytes]) -> np.ndarray:
        result, readable = np.full(len(texts), NOTHING, np.int32), dict[int, str]()
        for n, text in enumerate(texts):
            with suppress(UnicodeDecodeError):
                readable[n] = text.decode("utf-8")
        encoded = encode_after_text(encode_target, target, list(readable.values()))
        for n, ids in zip(readable, encoded, strict=True):
            spelled = target.token_bytes[ids[0]] if ids and 0 <= ids[0] < len(target) else None
            if spelled and texts[n].startswith(spelled):
                result[n] = ids[0]
        left = np.flatnonzero(result == NOTHING)
        result[left] = otherwise([texts[n] for n in left.tolist()])
        return result

    return pieces


PIECES: Mapping[str, Callable[[Vocabulary, EncodeTexts], Pieces]] = {
    "first_piece": first_piece,
    "byte_prefix": longest_prefix,
}
"""The kinds of vocabulary map that have an answer for any string of bytes."""


@dataclass(frozen=True)
class PieceMap:
    """The target token that every source token begins with, and that every rest of it begins with.

    A source token of n bytes has n + 2 places from `starts[id]` on. `spelling` holds its bytes there; `images` the
    target token of its bytes with a space before them, of the bytes themselves, of the bytes without the first, and so
    on. Control tokens and ids without bytes have n = 0, and control tokens the image of the vocabulary map.
    """

    starts: np.ndarray
    """int64[V + 1]."""
    spelling: np.ndarray
    """uint8[S], 0 beyond a token's bytes."""
    images: np.ndarray
    """int32[S] target ids, -1 for none."""

    @cached_property
    def highest(self) -> int:
        """The highest target id that is named, -1 for none."""
        return int(self.images.max(initial=NOTHING))

    @classmethod
    def of(cls, source: Vocabulary, images: np.ndarray) -> PieceMap:
        """The map with these stored `images`; the rest is the source vocabulary's."""
        spelling = b"".join((token or b"") + b"\0\0" for token in source.token_bytes)
        return cls(_starts(source), np.frombuffer(spelling, np.uint8), images)


def _starts(source: Vocabulary) -> np.ndarray:
    return np.concatenate([[0], np.cumsum([len(token or b"") + 2 for token in source.token_bytes], dtype=np.int64)])


def build_piece_map(
    kind: str,
    vocabulary_map: np.ndarray,
    source: Vocabulary,
    target: Vocabulary,
    encode_target: EncodeTexts,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PieceMap:
    """The piece map of a `kind` in `PIECES`.

    `vocabulary_map` int32[V] has the images of control tokens; `progress(done, total)` counts texts.
    """
    starts = _starts(source)
    numbers: dict[bytes, int] = {}
    which = np.full(starts[-1], -1, np.int64)  # the number of each place's text
    for start, token in zip(starts.tolist(), source.token_bytes, strict=False):
        if not token:
            continue
        if target.dummy_prefix:
            which[start] = numbers.setdefault(b" " + token, len(numbers))
        for offset in range(len(token)):
            which[start + 1 + offset] = numbers.setdefault(token[offset:], len(numbers))
    pieces, texts = PIECES[kind](target, encode_target), list(numbers)
    first = np.full(len(texts) + 1, NOTHING, np.int32)  # the last is the image of places without a text
    for begin in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[begin : begin + _TEXTS_AT_ONCE]
        first[begin : begin + len(some)] = pieces(some)
        progress(begin + len(some), len(texts))
    images = first[which]
    wordless = np.flatnonzero(np.diff(starts) == 2)
    images[starts[wordless]] = images[starts[wordless] + 1] = vocabulary_map[wordless]
    return PieceMap.of(source, images)
