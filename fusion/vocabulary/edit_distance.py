"""Levenshtein distances by Myers' bit-parallel algorithm, for nearest-token search and for warping paths.

A block of patterns, one a vector lane, is compared with one text at a time, so that every operation is a vector
instruction without branches. Texts are visited in lexicographic order, so that the columns of a common prefix of
neighbours are computed once. On real vocabularies this is faster than any bound that would allow pairs to be skipped.

Strings are rows of small integer codes: `codes[offsets[i]:offsets[i + 1]]` is string i. Code 0 is a wildcard that
equals nothing, itself included: it stands for characters that the other side never uses, which can only be edited.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numba
import numpy as np

_WORD = 64  # characters in one machine word of the bit-parallel algorithm
_LANES = 128  # patterns that go through the texts together: their state stays in the innermost cache
_PLACE_BITS = 32  # of a search's score, a distance and below it a place in the order of preference


@dataclass(frozen=True)
class Codes:
    """N strings as codes: `codes` int32[sum of lengths], `offsets` int64[N + 1]."""

    codes: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """int64[N]: characters (or bytes) of each string."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1


def code_points(strings: Sequence[str | bytes]) -> Codes:
    """The code points of N strings, or the bytes of N byte strings (all of one kind)."""
    parts = [s if isinstance(s, bytes) else s.encode("utf-32-le", "surrogatepass") for s in strings]
    width = 1 if strings and isinstance(strings[0], bytes) else 4
    codes = np.frombuffer(b"".join(parts), dtype=np.uint8 if width == 1 else "<u4").astype(np.int64)
    lengths = np.array([len(part) // width for part in parts], dtype=np.int64)
    return Codes(codes, np.concatenate([[0], np.cumsum(lengths)]))


def to_alphabet(patterns: Codes, targets: Codes) -> tuple[Codes, Codes, int]:
    """Both sides in the targets' alphabet 1..A; pattern characters outside it become wildcards."""
    alphabet = np.unique(targets.codes)

    def translate(side: Codes) -> Codes:
        if not len(alphabet):
            return Codes(np.zeros(len(side.codes), dtype=np.int32), side.offsets)
        place = np.minimum(np.searchsorted(alphabet, side.codes), len(alphabet) - 1)
        return Codes(np.where(alphabet[place] == side.codes, place + 1, 0).astype(np.int32), side.offsets)

    return translate(patterns), translate(targets), len(alphabet)


@numba.njit(cache=True, nogil=True, inline="always")
def _popcount(x: Any) -> Any:
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(cache=True, nogil=True)
def _plain(pattern: np.ndarray, text: np.ndarray) -> int:
    """The textbook recurrence, for patterns longer than a machine word."""
    m = len(pattern)
    row = np.arange(m + 1)
    for j in range(len(text)):
        diagonal = row[0]
        row[0] = j + 1
        for i in range(1, m + 1):
            substituted = diagonal + (0 if pattern[i - 1] == text[j] and text[j] != 0 else 1)
            diagonal = row[i]
            row[i] = min(substituted, diagonal + 1, row[i - 1] + 1)
    return row[m]


@numba.njit(cache=True, nogil=True)
def _read(
    text: np.ndarray,
    known: int,
    equal: np.ndarray,
    within: np.ndarray,
    plus: np.ndarray,
    minus: np.ndarray,
    distance: np.ndarray,
) -> None:
    """The distance[B] of the lanes' patterns to a text (Myers 1999, in Hyyrö's form).

    equal[A + 1, B] has bit i set where a lane's pattern has the character at i, within[B] the bits of its characters.
    Bit i of plus[n, B] and minus[n, B], column n of the dynamic program, is set where cell i + 1 is one more or one
    less than cell i. The columns up to `known` are given.
    """
    one = np.uint64(1)
    for n in range(known, len(text)):
        matches = equal[text[n]]
        for lane in range(len(within)):
            match, up, down = matches[lane], plus[n, lane], minus[n, lane]
            diagonal = (((match & up) + up) ^ up) | match | down
            right_up = ((down | ~(diagonal | up)) << one) | one
            right_down = (up & diagonal) << one
            plus[n + 1, lane] = right_down | ~(diagonal | right_up)
            minus[n + 1, lane] = right_up & diagonal
    last, last_minus = plus[len(text)], minus[len(text)]
    for lane in range(len(within)):
        distance[lane] = len(text) + _popcount(last[lane] & within[lane]) - _popcount(last_minus[lane] & within[lane])


@numba.njit(cache=True, nogil=True)
def _lanes(codes: np.ndarray, offsets: np.ndarray, first: int, equal: np.ndarray, within: np.ndarray) -> None:
    """Loads the patterns from `first` into the lanes: equal[A + 1, B] and within[B] of `_read`.

    A pattern longer than a machine word is left out: its lane is not used.
    """
    equal[:] = 0
    within[:] = 0
    for lane in range(min(len(within), len(offsets) - 1 - first)):
        pattern = codes[offsets[first + lane] : offsets[first + lane + 1]]
        if len(pattern) <= _WORD:
            for i in range(len(pattern)):
                bit = np.uint64(1) << np.uint64(i)
                within[lane] |= bit
                if pattern[i] > 0:
                    equal[pattern[i], lane] |= bit


@numba.njit(cache=True, nogil=True)
def _columns(alphabet: int, text_offsets: np.ndarray) -> Any:
    """Buffers for equal, within, plus, minus and distance of `_read`, sized for the longest text."""
    depth = 1
    for t in range(len(text_offsets) - 1):
        depth = max(depth, text_offsets[t + 1] - text_offsets[t] + 1)
    return (
        np.empty((alphabet + 1, _LANES), dtype=np.uint64),
        np.empty(_LANES, dtype=np.uint64),
        np.empty((depth, _LANES), dtype=np.uint64),
        np.zeros((depth, _LANES), dtype=np.uint64),
        np.empty(_LANES, dtype=np.int64),
    )


@dataclass(frozen=True)
class Targets:
    """N texts in lexicographic order."""

    strings: Codes
    order: np.ndarray  # int64[N]: the place of each among the texts as given
    shared: np.ndarray  # int64[N]: how many characters each begins with that the one before it begins with, too
    alphabet: int

    @classmethod
    def build(cls, strings: Codes, alphabet: int) -> Targets:
        """The strings in alphabetical order, so that each shares a beginning with the one before it."""
        spelled, ends = strings.codes.astype(">u4").tobytes(), (4 * strings.offsets).tolist()
        keys = [spelled[start:end] for start, end in pairwise(ends)]
        order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
        lengths = strings.lengths[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        codes = strings.codes[np.repeat(strings.offsets[:-1][order], lengths) + within]
        return cls(Codes(codes, offsets), order, _shared(codes, offsets), alphabet)


@numba.njit(cache=True, nogil=True)
def _shared(codes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    shared = np.zeros(len(offsets) - 1, dtype=np.int64)
    for t in range(1, len(shared)):
        before, here = codes[offsets[t - 1] : offsets[t]], codes[offsets[t] : offsets[t + 1]]
        while shared[t] < min(len(before), len(here)) and before[shared[t]] == here[shared[t]]:
            shared[t] += 1
    return shared


@numba.njit(cache=True, nogil=True)
def _nearest(
    codes: np.ndarray,
    offsets: np.ndarray,
    target_codes: np.ndarray,
    target_offsets: np.ndarray,
    order: np.ndarray,
    shared: np.ndarray,
    alphabet: int,
) -> np.ndarray:
    count = len(offsets) - 1
    best = np.full(-(-count // _LANES) * _LANES, np.iinfo(np.int64).max)
    equal, within, plus, minus, distance = _columns(alphabet, target_offsets)
    for first in range(0, count, _LANES):
        _lanes(codes, offsets, first, equal, within)
        plus[0] = within
        score = best[first : first + _LANES]
        for t in range(len(order)):
            text, place = target_codes[target_offsets[t] : target_offsets[t + 1]], order[t]
            _read(text, shared[t], equal, within, plus, minus, distance)
            for lane in range(_LANES):
                score[lane] = min(score[lane], (distance[lane] << _PLACE_BITS) | place)
    for p in range(count):
        m = offsets[p + 1] - offsets[p]
        if m > _WORD:
            best[p] = np.iinfo(np.int64).max
            for t in range(len(order)):
                text = target_codes[target_offsets[t] : target_offsets[t + 1]]
                if abs(m - len(text)) <= best[p] >> _PLACE_BITS:  # the difference in length is a lower bound
                    best[p] = min(best[p], (_plain(codes[offsets[p] : offsets[p + 1]], text) << _PLACE_BITS) | order[t])
    return best[:count] & ((1 << _PLACE_BITS) - 1)


def nearest(patterns: Codes, targets: Targets) -> np.ndarray:
    """int64[N]: for each pattern the target at the least distance, ties to the one that comes first in preference; -1
    where there are no targets. Patterns must be in the targets' alphabet (`to_alphabet`). Releases the GIL.
    """
    if not len(targets.order):
        return np.full(len(patterns), -1, dtype=np.int64)
    return _nearest(
        patterns.codes,
        patterns.offsets,
        targets.strings.codes,
        targets.strings.offsets,
        targets.order,
        targets.shared,
        targets.alphabet,
    )


@numba.njit(cache=True, nogil=True)
def _distances(
    codes: np.ndarray,
    offsets: np.ndarray,
    text_codes: np.ndarray,
    text_offsets: np.ndarray,
    order: np.ndarray,
    shared: np.ndarray,
    alphabet: int,
) -> np.ndarray:
    count = len(offsets) - 1
    table = np.empty((len(order), count), dtype=np.int32)
    equal, within, plus, minus, distance = _columns(alphabet, text_offsets)
    for first in range(0, count, _LANES):
        _lanes(codes, offsets, first, equal, within)
        plus[0] = within
        for t in range(len(order)):
            text, row = text_codes[text_offsets[t] : text_offsets[t + 1]], table[order[t], first : first + _LANES]
            _read(text, shared[t], equal, within, plus, minus, distance)
            row[:] = distance[: len(row)]
    for p in range(count):
        if offsets[p + 1] - offsets[p] > _WORD:
            for t in range(len(order)):
                text = text_codes[text_offsets[t] : text_offsets[t + 1]]
                table[order[t], p] = _plain(codes[offsets[p] : offsets[p + 1]], text)
    return table


def distances(texts: Sequence[str], patterns: Sequence[str]) -> np.ndarray:
    """int32[N, M]: the Levenshtein distance, in characters, of every text to every pattern."""
    left, right, alphabet = to_alphabet(code_points(texts), code_points(patterns))
    targets = Targets.build(left, alphabet)
    return _distances(
        right.codes,
        right.offsets,
        targets.strings.codes,
        targets.strings.offsets,
        targets.order,
        targets.shared,
        alphabet,
    )
