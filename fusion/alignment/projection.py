"""Projection: from a source's top-k entries to complete distributions over the target vocabulary, one a target
position.

Everything is an integer gather through the vocabulary map and a scan over the few entries of a position: there is no
dense [T, V] array and no Python loop over positions.
"""

from collections.abc import Callable
from typing import NamedTuple

import numba
import numpy as np

from fusion.errors import UserError
from fusion.switches import Switches
from fusion.types import Sparse

_FAULTS = {
    1: "a token id lies outside its vocabulary map: map and predictions come from different models, make the map again",
    2: "the vocabulary map names an id that the target vocabulary lacks: it was made for another target, make it again",
}


class Projected(NamedTuple):
    """A source's entries at the N target positions of a sequence."""

    ids: np.ndarray
    """int32[N, K] target ids, -1 pads at the end of a row."""
    p: np.ndarray
    """float64[N, K] their probabilities, 0 at pads; what a position lacks to 1 is its tail."""
    partner: np.ndarray
    """int32[N] the source position that they come from, -1 for none."""
    inside: np.ndarray
    """bool[N], true where the target position lies inside a source token."""


def true_token_last(
    ids: np.ndarray, p: np.ndarray, true_token: np.ndarray, nats: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The entries with the token that really follows as the last one, at its own stored probability exp(-nats).

    That probability is exact. The others and the tail are scaled to what is left: where the token was none of the
    entries, the tail has lost its share before. Without nats the token is an entry only where it was one.

    Args:
        ids: int32[M, k] entries.
        p: float64[M, k] their probabilities; what a position lacks to 1 is its tail.
        true_token: int32[M], -1 where no token follows.
        nats: float[M], -log of its probability; or None.

    Returns:
        int32[M, k + 1], -1 where an entry has become the last one or there is none, and float64[M, k + 1].
    """
    follows = true_token >= 0
    listed = (ids == true_token[:, None]) & follows[:, None]
    if nats is None:
        own = np.where(listed, p, 0.0).sum(axis=1)
        true_token = np.where(listed.any(axis=1), true_token, -1)
    else:
        own = np.where(follows, np.exp(-nats.astype(np.float64)), 0.0)
    others = np.where(listed, 0.0, p)
    tail = np.maximum(1.0 - p.sum(axis=1), 0.0)
    tail = np.where(listed.any(axis=1), tail, np.maximum(tail - own, 0.0))
    total = others.sum(axis=1) + tail
    scale = np.maximum(1.0 - own, 0.0) / np.where(total > 0, total, 1.0)
    return (
        np.concatenate([np.where(listed, -1, ids), true_token[:, None]], axis=1).astype(np.int32),
        np.concatenate([others * scale[:, None], own[:, None]], axis=1),
    )


def project_entries(
    ids: np.ndarray,
    values: np.ndarray,
    partner: np.ndarray,
    vocabulary_map: np.ndarray,
    *,
    vocabulary_size: int,
    duplicates: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Project the entries of each target position's aligned source position through the vocabulary map, in their order.

    Args:
        ids: int32[M, k] source token ids, -1 for no entry.
        values: [M, k] the entries' values: probabilities, or any score (logits) where the first of duplicates is kept.
        partner: int32[N] the source position aligned with each target position, -1 for none.
        vocabulary_map: int32[V_source] target ids; -1 maps to nothing.
        vocabulary_size: number of ids of the target vocabulary.
        duplicates: `sum` adds the values of entries that land on one target id, `first` keeps the first's.

    Returns:
        int32[N, k] target ids, -1 pads at the end of a row, and float64[N, k] values, 0 at pads.

    Raises:
        UserError: the map does not belong to these ids or to this target.
    """
    out_ids = np.full((len(partner), ids.shape[1]), -1, np.int32)
    out_values = np.zeros(out_ids.shape, np.float64)
    fault = _project_entries(
        np.ascontiguousarray(ids, np.int32),
        np.ascontiguousarray(values, np.float64),
        np.ascontiguousarray(partner, np.int32),
        np.ascontiguousarray(vocabulary_map, np.int32),
        vocabulary_size,
        duplicates == "sum",
        out_ids,
        out_values,
    )
    if fault:
        raise UserError(f"cannot project a distribution: {_FAULTS[fault]}.")
    return out_ids, out_values


@numba.njit(cache=True)
def _project_entries(
    ids: np.ndarray,
    values: np.ndarray,
    partner: np.ndarray,
    vocabulary_map: np.ndarray,
    size: int,
    add: bool,
    out_ids: np.ndarray,
    out_values: np.ndarray,
) -> int:
    for i in range(len(partner)):
        j = partner[i]
        if j < 0:
            continue
        kept = 0
        for column in range(ids.shape[1]):
            source = ids[j, column]
            if source == -1:
                continue
            if source < 0 or source >= len(vocabulary_map):
                return 1
            mapped = vocabulary_map[source]
            if mapped == -1:
                continue
            if mapped < -1 or mapped >= size:
                return 2
            place = 0
            while place < kept and out_ids[i, place] != mapped:
                place += 1
            if place == kept:
                out_ids[i, place] = mapped
                out_values[i, place] = values[j, column]
                kept += 1
            elif add:
                out_values[i, place] += values[j, column]
    return 0


def fill_unaligned(
    ids: np.ndarray,
    p: np.ndarray,
    partner: np.ndarray,
    *,
    gold: np.ndarray,
    current: np.ndarray,
    switches: Switches,
    own: Callable[[], Sparse] | None = None,
) -> tuple[Sparse, np.ndarray]:
    """A complete distribution for every target position from its projected entries, by `switches`.

    At a passage's last position there is no next token (`gold` -1): there `tail: gold` renormalises the entries to sum
    1, and an unaligned position has no distribution (no entries, no tail).

    Args:
        ids: int32[N, k] of `project_entries`.
        p: float64[N, k] of `project_entries`; a position's sum is at most 1, and the tail is what it lacks.
        partner: int32[N], -1 where unaligned.
        gold: int32[N] the next token, -1 for none.
        current: int32[N] the token read at the position.
        own: gives the N distributions of the target itself, for positions where no entry survives the map
            (`unmapped: target`); None for the target itself.

    Returns:
        The N distributions, and bool[N], true where a source position is aligned.
    """
    kept = p.sum(axis=1)
    tail = np.maximum(1.0 - kept, 0.0)
    if switches.tail == "gold":
        ids, p = _add(ids, p, gold, np.where(gold >= 0, tail, 0.0))
    if switches.tail != "bucket":
        total = p.sum(axis=1)
        p = p / np.where(total > 0, total, 1.0)[:, None]
        tail = np.zeros(len(p))
    paired = partner >= 0
    nothing = paired & (kept <= 0)
    if switches.unmapped == "target" and own is not None and nothing.any():
        ids, p, tail = _replace(ids, p, tail, nothing, own())
    elif switches.tail == "renormalise":  # there is no tail that could take the mass
        paired &= ~nothing
    one_hot = np.where(paired, -1, gold if switches.unaligned == "next" else current)
    ids, p = _widen(ids, 1, -1), _widen(p, 1, 0.0)
    ids[~paired], p[~paired], tail[~paired] = -1, 0.0, 0.0
    rows = np.flatnonzero(one_hot >= 0)
    ids[rows, 0], p[rows, 0] = one_hot[rows], 1.0
    return Sparse(ids, p.astype(np.float32), tail.astype(np.float32)), paired


def _add(ids: np.ndarray, p: np.ndarray, token: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`mass[N]` added to the entry `token[N]` of each row, which becomes a new last entry where the row lacks it."""
    ids, p = _widen(ids, ids.shape[1] + 1, -1), _widen(p, p.shape[1] + 1, 0.0)
    rows = np.flatnonzero(mass > 0)
    hit = ids[rows] == token[rows, None]
    place = np.where(hit.any(axis=1), hit.argmax(axis=1), (ids[rows] == -1).argmax(axis=1))
    ids[rows, place] = token[rows]
    p[rows, place] += mass[rows]
    return ids, p


def _replace(
    ids: np.ndarray, p: np.ndarray, tail: np.ndarray, where: np.ndarray, by: Sparse
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    width = max(ids.shape[1], by.ids.shape[1])
    at = where[:, None]
    return (
        np.where(at, _widen(by.ids, width, -1), _widen(ids, width, -1)),
        np.where(at, _widen(by.p, width, 0.0), _widen(p, width, 0.0)),
        np.where(where, by.tail, tail),
    )


def _widen(a: np.ndarray, width: int, fill: float) -> np.ndarray:
    """A copy of `a[N, K]` with at least `width` columns."""
    out = np.full((a.shape[0], max(width, a.shape[1])), fill, a.dtype)
    out[:, : a.shape[1]] = a
    return out
