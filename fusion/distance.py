"""Levenshtein distances by Myers' bit-parallel algorithm, for the search of nearest tokens and for warping paths.

Strings are rows of small integer codes: `codes[offsets[i]:offsets[i + 1]]` is string i. Code 0 is a wildcard that
equals nothing, itself included: a character that the other side never uses can only be edited, so which one it is
makes no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

_WORD = 64  # characters in one machine word of the bit-parallel algorithm


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
    """Both sides in the targets' alphabet 1..A, commonest first; pattern characters outside it become wildcards."""
    alphabet, counts = np.unique(targets.codes, return_counts=True)
    code = np.empty(len(alphabet), dtype=np.int32)
    code[np.argsort(-counts, kind="stable")] = np.arange(1, len(alphabet) + 1)

    def translate(side: Codes) -> Codes:
        if not len(alphabet):
            return Codes(np.zeros(len(side.codes), dtype=np.int32), side.offsets)
        place = np.minimum(np.searchsorted(alphabet, side.codes), len(alphabet) - 1)
        return Codes(np.where(alphabet[place] == side.codes, code[place], 0).astype(np.int32), side.offsets)

    return translate(patterns), translate(targets), len(alphabet)


@numba.njit(cache=True, nogil=True, inline="always")
def _popcount(x: Any) -> Any:
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@numba.njit(cache=True, nogil=True)
def _plain(pattern: np.ndarray, text: np.ndarray) -> int:
    """The textbook recurrence, for patterns longer than a word."""
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


@numba.njit(cache=True, nogil=True, inline="always")
def _myers(equal: np.ndarray, m: int, text: np.ndarray, start: int, stop: int, limit: int) -> Any:
    """The distance of a pattern of 0 < m <= 64 characters to text[start:stop], or limit + 1 if it exceeds `limit`.

    `equal[c]` has bit i set where the pattern's character i is c (Myers 1999, in Hyyrö's form).
    """
    last = np.uint64(m - 1)
    one = np.uint64(1)
    plus = ~np.uint64(0)
    minus = np.uint64(0)
    score: Any = m
    for j in range(start, stop):
        match = equal[text[j]]
        diagonal = (((match & plus) + plus) ^ plus) | match | minus
        horizontal_plus = minus | ~(diagonal | plus)
        horizontal_minus = plus & diagonal
        score += np.int64((horizontal_plus >> last) & one) - np.int64((horizontal_minus >> last) & one)
        if score - (stop - 1 - j) > limit:
            return limit + 1
        horizontal_plus = (horizontal_plus << one) | one
        horizontal_minus = horizontal_minus << one
        plus = horizontal_minus | ~(diagonal | horizontal_plus)
        minus = horizontal_plus & diagonal
    return score


@numba.njit(cache=True, nogil=True)
def _character_masks(codes: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    masks = np.zeros(len(offsets) - 1, dtype=np.uint64)
    for i in range(len(masks)):
        for c in codes[offsets[i] : offsets[i + 1]]:
            if c > 0:
                masks[i] |= np.uint64(1) << np.uint64((c - 1) % _WORD)
    return masks


@dataclass(frozen=True)
class Targets:
    """Strings to be found, sorted by length and within a length by their place in the order of preference."""

    strings: Codes
    order: np.ndarray  # int64[N]: the place of each in the order of preference
    masks: np.ndarray  # uint64[N]: which characters occur, folded into 64 bits
    starts: np.ndarray  # int64[longest + 2]: where the strings of each length begin
    alphabet: int

    @classmethod
    def build(cls, strings: Codes, alphabet: int) -> Targets:
        order = np.argsort(strings.lengths, kind="stable")
        lengths = strings.lengths[order]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        codes = strings.codes[np.repeat(strings.offsets[:-1][order], lengths) + within]
        starts = np.searchsorted(lengths, np.arange(int(lengths.max(initial=0)) + 2))
        return cls(Codes(codes, offsets), order, _character_masks(codes, offsets), starts, alphabet)


@numba.njit(cache=True, nogil=True)
def _nearest(
    codes: np.ndarray,
    offsets: np.ndarray,
    target_codes: np.ndarray,
    target_offsets: np.ndarray,
    order: np.ndarray,
    masks: np.ndarray,
    starts: np.ndarray,
    alphabet: int,
) -> np.ndarray:
    found = np.full(len(offsets) - 1, -1, dtype=np.int64)
    pattern_masks = _character_masks(codes, offsets)
    equal = np.zeros(alphabet + 1, dtype=np.uint64)
    longest = len(starts) - 2
    for p in range(len(found)):
        pattern = codes[offsets[p] : offsets[p + 1]]
        m = len(pattern)
        wild = 0
        for i in range(m):
            if pattern[i] == 0:
                wild += 1
            elif m <= _WORD:
                equal[pattern[i]] |= np.uint64(1) << np.uint64(i)
        mask = pattern_masks[p]
        best = m + longest + 1  # larger than any distance there is
        best_order = np.int64(-1)
        # Outwards from the pattern's own length: the difference in length is a lower bound of the distance.
        for difference in range(max(m, longest) + 1):
            if difference > best:
                break
            for side in range(1 if difference == 0 else 2):
                n = m - difference if side == 0 else m + difference
                if n < 0 or n > longest:
                    continue
                for t in range(starts[n], starts[n + 1]):
                    preferred = order[t] < best_order
                    limit = best if preferred else best - 1
                    if difference > limit:
                        break  # within a length the order ascends: nothing further on is preferred either
                    # k characters can match at most, of those that occur on both sides; the longer side's rest is edits
                    other = masks[t]
                    here = m - wild - _popcount(mask & ~other)
                    there = n - _popcount(other & ~mask)
                    if max(m, n) - min(here, there) > limit:
                        continue
                    if m > _WORD:
                        distance = _plain(pattern, target_codes[target_offsets[t] : target_offsets[t + 1]])
                    elif m == 0:
                        distance = n
                    else:
                        distance = _myers(equal, m, target_codes, target_offsets[t], target_offsets[t + 1], limit)
                    if distance <= limit:
                        best = distance
                        best_order = order[t]
        found[p] = best_order
        for i in range(m):
            equal[pattern[i]] = np.uint64(0)
    return found


def nearest(patterns: Codes, targets: Targets) -> np.ndarray:
    """int64[N]: for each pattern the target at the least distance, ties to the one that comes first in preference; -1
    where there are no targets. Patterns must be in the targets' alphabet (`to_alphabet`). Releases the GIL.
    """
    return _nearest(
        patterns.codes,
        patterns.offsets,
        targets.strings.codes,
        targets.strings.offsets,
        targets.order,
        targets.masks,
        targets.starts,
        targets.alphabet,
    )


@numba.njit(cache=True, nogil=True)
def _distances(
    codes: np.ndarray, offsets: np.ndarray, target_codes: np.ndarray, target_offsets: np.ndarray, alphabet: int
) -> np.ndarray:
    rows, columns = len(offsets) - 1, len(target_offsets) - 1
    table = np.empty((rows, columns), dtype=np.int32)
    masks, target_masks = _character_masks(codes, offsets), _character_masks(target_codes, target_offsets)
    equal = np.zeros(alphabet + 1, dtype=np.uint64)
    for r in range(rows):
        pattern = codes[offsets[r] : offsets[r + 1]]
        m = len(pattern)
        if m <= _WORD:
            for i in range(m):
                if pattern[i] > 0:
                    equal[pattern[i]] |= np.uint64(1) << np.uint64(i)
        for c in range(columns):
            start, stop = target_offsets[c], target_offsets[c + 1]
            if not masks[r] & target_masks[c]:  # nothing in common: every character is an edit
                table[r, c] = max(m, stop - start)
            elif m > _WORD:
                table[r, c] = _plain(pattern, target_codes[start:stop])
            else:
                table[r, c] = _myers(equal, m, target_codes, start, stop, m + stop - start)
        for i in range(m):
            equal[pattern[i]] = np.uint64(0)
    return table


def distances(patterns: Sequence[str], targets: Sequence[str]) -> np.ndarray:
    """int32[N, M]: the Levenshtein distance, in characters, of every pattern to every target."""
    left, right, alphabet = to_alphabet(code_points(patterns), code_points(targets))
    return _distances(left.codes, left.offsets, right.codes, right.offsets, alphabet)
