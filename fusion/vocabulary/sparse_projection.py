"""A sparse projection of the target's vocabulary onto a teacher's: each target token as a few of the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOP = 4
"""Greatest number of teacher tokens that a target token is written in."""
DECAY = 0.1
"""Each further token has this part of the weight of the one before it."""


@dataclass(frozen=True)
class SparseProjection:
    """W[V_target, V_teacher] with rows that sum to 1 or are empty."""

    ids: np.ndarray
    """int32[V_target, 4]: teacher ids, the heaviest first, -1 beyond the last."""
    weights: np.ndarray
    """float32[V_target, 4]: their weights, 0 beyond the last."""
    n_columns: int
    """V_teacher."""

    @property
    def entries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row int64[E], column int64[E] and value float32[E] of the entries that are not 0."""
        rows, places = np.nonzero(self.weights)
        return rows, self.ids[rows, places].astype(np.int64), self.weights[rows, places]

    def pairs(self, least_weight: float) -> np.ndarray:
        """int32[V_teacher]: the target token whose heaviest one it is, with at least this weight; -1 for none.

        Of several the one with the greatest weight is taken, and the lowest id of these.
        """
        result = np.full(self.n_columns, -1, np.int32)
        rows = np.flatnonzero(self.weights[:, 0] >= least_weight)
        order = rows[np.lexsort((-rows, self.weights[rows, 0]))]  # the best last, where it stays
        result[self.ids[order, 0]] = order
        return result


def sparse_projection(
    same: np.ndarray, of_target: np.ndarray, of_teacher: np.ndarray | None = None
) -> SparseProjection:
    """The projection matrix of X-Token (arXiv 2605.21699).

    A target token that the teacher has is that token. Any other is the first four tokens that the teacher's tokenizer
    makes of its bytes, with weights in the ratio 1 : 0.1 : 0.01 : 0.001.

    Args:
        same: int32[V_teacher], the target id of each teacher token that both have, one to one; -1 for others.
        of_target: int32[V_target, n] of `encode_tokens`: the target's tokens in the teacher's.
        of_teacher: int32[V_teacher, n]: the teacher's in the target's. As in the published code each adds the same
            weights in the other direction, to the rows of the target tokens that it consists of. Default: none does.
    """
    n_target, n_teacher = len(of_target), len(same)
    rows, columns, values = _decaying(of_target)
    if of_teacher is not None:
        its_columns, its_rows, its_values = _decaying(of_teacher)
        rows, columns = np.concatenate([rows, its_rows]), np.concatenate([columns, its_columns])
        values = np.concatenate([values, its_values])
    # Equal entries are added up, then each row's are sorted by weight.
    keys, place = np.unique(rows * n_teacher + columns, return_inverse=True)
    values = np.bincount(place, values, len(keys))
    rows, columns = keys // n_teacher, keys % n_teacher
    exact = np.flatnonzero(same >= 0)
    other = ~np.isin(rows, same[exact])
    rows, columns = np.concatenate([rows[other], same[exact]]), np.concatenate([columns[other], exact])
    values = np.concatenate([values[other], np.ones(len(exact))])
    order = np.lexsort((columns, -values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    at = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = at < TOP
    ids, weights = np.full((n_target, TOP), -1, np.int32), np.zeros((n_target, TOP))
    ids[rows[kept], at[kept]], weights[rows[kept], at[kept]] = columns[kept], values[kept]
    total = weights.sum(1, keepdims=True)
    return SparseProjection(ids, (weights / np.where(total > 0, total, 1)).astype(np.float32), n_teacher)


def _decaying(encoded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, column and weight of each token of int32[V, n], whose weights sum to 1 in each row that has any."""
    weight = np.where(encoded >= 0, DECAY ** np.arange(encoded.shape[1]), 0)
    total = weight.sum(1, keepdims=True)
    weight = weight / np.where(total > 0, total, 1)
    rows, places = np.nonzero(weight)
    return rows, encoded[rows, places].astype(np.int64), weight[rows, places]
