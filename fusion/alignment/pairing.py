"""Pairing: which position of a source is aligned with each position of the target in the same passage.

A position holds the distribution over what follows the tokens up to it. Position 0 is the prefix token.
"""

from __future__ import annotations

from typing import Protocol

import numba
import numpy as np

from fusion.registry import Registry
from fusion.vocabulary.edit_distance import distances
from fusion.vocabulary.token_bytes import BYTE_LEVEL_SPACE, Vocabulary, respace

_LANES = 32  # columns of the warping's dynamic program that are computed at once


class Alignment(Protocol):
    """From two tokenisations of a passage to int32[Mt]: the source position aligned with each target position, or -1.

    `source_tokens[Ms]`, `target_tokens[Mt]` are ids, prefix first; `source_ends`, `target_ends` the byte ends of the
    same positions (-1 where unknown); `vocabulary_map[Vs]` the target id of every source id (-1 nothing).
    """

    def __call__(
        self,
        source_tokens: np.ndarray,
        source_ends: np.ndarray,
        target_tokens: np.ndarray,
        target_ends: np.ndarray,
        source_vocabulary: Vocabulary,
        target_vocabulary: Vocabulary,
        vocabulary_map: np.ndarray,
    ) -> np.ndarray: ...


ALIGNMENTS: Registry[Alignment] = Registry("alignment", "fusellm.alignments")


def same_end(source_ends: np.ndarray, target_ends: np.ndarray) -> np.ndarray:
    """int32[Mt]: the source position whose prefix ends at the same byte, or -1.

    A prediction depends on nothing but the text before it, so equal byte ends mean predictions of the same text. Both
    arrays ascend except for unknown ends (-1), which never pair. Of several positions with one end (zero-length tokens)
    on either side the last is taken: only its next token adds text, and a target position before it must predict the
    zero-length token itself.
    """
    known = np.flatnonzero(source_ends >= 0)
    ends = source_ends[known]
    last = np.searchsorted(ends, target_ends, side="right") - 1
    pairs = np.full(len(target_ends), -1, dtype=np.int32)
    found = (last >= 0) & (target_ends >= 0)
    found[found] = ends[last[found]] == target_ends[found]
    found[:-1] &= target_ends[:-1] != target_ends[1:]
    pairs[found] = known[last[found]]
    return pairs


@ALIGNMENTS.register(
    "same_end", version=2, reference="same text before, same question; replaces the published warping path"
)
def _same_end(
    source_tokens: np.ndarray,
    source_ends: np.ndarray,
    target_tokens: np.ndarray,
    target_ends: np.ndarray,
    source_vocabulary: Vocabulary,
    target_vocabulary: Vocabulary,
    vocabulary_map: np.ndarray,
) -> np.ndarray:
    return same_end(source_ends, target_ends)


@numba.njit(cache=True, nogil=True)
def _path(cost: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """int32[L, 2]: the cheapest warping path over cost[rows[i], columns[j]], from its end to (0, 0).

    total[i, j] = cost[i, j] + min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]) is a chain along a row in
    which each cell needs the one before. With spent[j], the cost of the row before column j, it becomes a running
    minimum: total[j] = spent[j + 1] + min over k <= j of entered[k], where entered[k], the lesser of diagonal and up
    minus spent[k], is the cost of a path that enters the row at column k. A minimum can be computed in parts: the first
    W columns go to lane 0, the next W to lane 1, and so on; all lanes run at once and are combined afterwards.
    """
    n, m = len(rows), len(columns)
    width = (m + _LANES - 1) // _LANES
    spent = np.empty((len(cost), width + 1, _LANES), dtype=np.int32)
    for row in range(len(cost)):
        so_far = np.int32(0)
        for lane in range(_LANES):
            for w in range(width):
                spent[row, w, lane] = so_far
                if lane * width + w < m:
                    so_far += cost[row, columns[lane * width + w]]
            spent[row, width, lane] = so_far
    far = np.int32(1 << 30)
    moves = np.empty((n, width, _LANES), dtype=np.uint8)
    # Of the row before: [w + 1] is a lane's column w, [0] the one left of its first.
    total = np.full((width + 1, _LANES), far, dtype=np.int32)
    total[0, 0] = 0
    entered, least = np.empty((2, width, _LANES), dtype=np.int32)
    run, lanes_before = np.empty((2, _LANES), dtype=np.int32)
    for i in range(n):
        before, move = spent[rows[i]], moves[i]
        run[:] = np.iinfo(np.int32).max
        for w in range(width):
            for lane in range(_LANES):
                diagonal, up = total[w, lane], total[w + 1, lane]
                entered[w, lane] = min(diagonal, up) - before[w, lane]
                run[lane] = min(run[lane], entered[w, lane])
                least[w, lane] = run[lane]
                move[w, lane] = up < diagonal
        lanes_before[0] = np.iinfo(np.int32).max
        for lane in range(1, _LANES):
            lanes_before[lane] = min(lanes_before[lane - 1], run[lane - 1])
        for w in range(width):
            for lane in range(_LANES):
                best = min(least[w, lane], lanes_before[lane])
                move[w, lane] |= np.uint8(best < entered[w, lane]) * np.uint8(2)
                total[w + 1, lane] = best + before[w + 1, lane]
        total[0, 0] = far
        total[0, 1:] = total[width, :-1]
    path = np.empty((n + m, 2), dtype=np.int32)
    i, j, length = n - 1, m - 1, 0
    while i > 0 or j > 0:
        path[length, 0], path[length, 1] = i, j
        length += 1
        move_here = moves[i, j % width, j // width]
        if move_here >= 2:  # left is strictly less than both others
            j -= 1
        elif move_here == 1:
            i -= 1
        else:
            i -= 1
            j -= 1
    path[length, 0], path[length, 1] = 0, 0
    return path[: length + 1]


def warping_path(
    source_tokens: list[str], target_tokens: list[str], source_space: str, target_space: str
) -> list[list[int]]:
    """For each target position the source positions, ascending, that dynamic time warping pairs with it.

    The published alignment (arXiv 2401.10491, section 3.3): the cost of a pair is the Levenshtein distance of the two
    strings without their space marks; going back from the end, ties go to the diagonal, then up (the source steps
    back), then left (the target does).
    """
    if not source_tokens or not target_tokens:
        return [[] for _ in target_tokens]
    # Text repeats its tokens: distances are computed once for every pair of distinct strings.
    sources, rows = _distinct([token.replace(source_space, "") for token in source_tokens])
    targets, columns = _distinct([token.replace(target_space, "") for token in target_tokens])
    paired: list[list[int]] = [[] for _ in target_tokens]
    for i, j in _path(distances(sources, targets), rows, columns)[::-1].tolist():
        paired[j].append(i)
    return paired


def _distinct(strings: list[str]) -> tuple[list[str], np.ndarray]:
    place: dict[str, int] = {}
    indices = [place.setdefault(string, len(place)) for string in strings]
    return list(place), np.array(indices, dtype=np.int64)


@ALIGNMENTS.register("dtw", reference="arXiv 2401.10491, section 3.3, as its published code computes it")
def dtw(
    source_tokens: np.ndarray,
    source_ends: np.ndarray,
    target_tokens: np.ndarray,
    target_ends: np.ndarray,
    source_vocabulary: Vocabulary,
    target_vocabulary: Vocabulary,
    vocabulary_map: np.ndarray,
) -> np.ndarray:
    """int32[Mt]: the published pairing, one-to-one by dynamic time warping and with strings equal or mapped onto each
    other.

    A target position is aligned when the warping path pairs exactly one source position with it and that token's
    string, its space mark replaced, equals the target token's or maps onto it. Where a byte-level source meets a target
    whose first token begins with the space mark (a dummy prefix), the missing mark is added: the published code does so
    for GPT-2's and GPT-NeoX's tokenizer classes, the only byte-level ones it knows. Prefix tokens, which it does not
    have, pair with each other outside the path. Byte ends are not used.
    """
    pairs = np.full(len(target_tokens), -1, dtype=np.int32)
    source, target = source_tokens.tolist(), target_tokens.tolist()
    first = 0
    if source and target and source[0] in source_vocabulary.control and target[0] in target_vocabulary.control:
        pairs[0], first = 0, 1
    mark, target_mark = source_vocabulary.space, target_vocabulary.space
    source_strings = [source_vocabulary.tokens[i] for i in source[first:]]
    target_strings = [target_vocabulary.tokens[i] for i in target[first:]]
    paired = warping_path(source_strings, target_strings, mark, target_mark)
    for i, candidates in enumerate(paired):
        if len(candidates) != 1:
            continue
        j = candidates[0]
        source_id: int | None = source[first + j]
        string = respace(source_strings[j], mark, target_mark)
        if (
            i == 0
            and mark == BYTE_LEVEL_SPACE
            and target_strings[0].startswith(target_mark)
            and not string.startswith(target_mark)
        ):
            string = target_mark + string
            source_id = source_vocabulary.ids.get(mark + source_strings[j])
        if string == target_strings[i] or (source_id is not None and vocabulary_map[source_id] == target[first + i]):
            pairs[first + i] = first + j
    return pairs
