"""Selection among sources: cross-entropies by stretch of text, and the fusion functions that use them.

MinCE selects the distribution whose cross-entropy against the gold text is least; AvgCE averages all with weights that
fall with cross-entropy (arXiv 2401.10491, section 3.3). A fusion function is registered by name:

    @FUSIONS.register("mince", reference="arXiv 2401.10491, MinCE")
    def mince(members, scores, switches): -> (Sparse, selected[N])

`members` are the S sources' complete distributions over the same N positions. A member without entries and tail at a
position has no distribution there. `selected[N]` is the index of the selected member at each position, `MIXTURE` for an
average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numba
import numpy as np

from fusion.registry import Registry
from fusion.switches import Switches
from fusion.types import Predictions, Sparse

MIXTURE = -2
"""In place of a selected source: the distribution is a mixture of several."""


@dataclass(frozen=True)
class SourceScores:
    """Cross-entropies of S sources over the U stretches of text (units) of a sequence, each by its own tokens.

    A unit is a passage, a segment of a passage, or the sequence, by the switch `select_over`; of a sequence of which a
    source has not read all, the passages that the same sources have read.
    """

    names: tuple[str, ...]
    """The sources' names, in their order."""
    nll: np.ndarray
    """float64[S, U], negative log-likelihood of the unit in nats; infinite where the source has not read it."""
    tokens: np.ndarray
    """int64[S, U], number of the source's own tokens in the unit."""
    n_bytes: np.ndarray
    """int64[U], bytes of text in the unit."""
    unit: np.ndarray
    """int64[N], the unit of each target position."""
    spelled: np.ndarray | None = None
    """bool[S, U], true where the source's tokens spell the whole unit; None if all of them do."""

    def nats_per_byte(self) -> np.ndarray:
        """float64[S, U]: nats per byte of text, whatever the tokenizer; infinite where a source does not compete.

        A source whose tokens do not spell a unit was not asked for all of its bytes, so its sum is no likelihood of the
        text: it does not compete there, unless no source spells the unit.
        """
        per_byte: np.ndarray = self.nll / np.maximum(self.n_bytes, 1)
        if self.spelled is None:
            return per_byte
        spells = self.spelled & np.isfinite(self.nll)
        return np.where(spells | ~spells.any(axis=0), per_byte, np.inf)

    def best(self) -> np.ndarray:
        """int64[U]: the source with the least nats per byte, compared in float32; ties by name."""
        by_name = np.argsort(self.names)
        found: np.ndarray = by_name[self.nats_per_byte().astype(np.float32)[by_name].argmin(axis=0)]
        return found

    def rewards(self) -> np.ndarray:
        """float32[S, U]: exp(-CE) in bfloat16, CE the mean nats per token of the source's own tokenizer.

        CE is rounded as well, as in the published code: sources that differ by less than its spacing are tied.
        """
        mean = to_bfloat16(self.nll / np.maximum(self.tokens, 1))
        return to_bfloat16(np.exp(-mean.astype(np.float64)))


FusionFunction = Callable[[Sequence[Sparse], SourceScores, Switches], tuple[Sparse, np.ndarray]]
FUSIONS: Registry[FusionFunction] = Registry("fusion function", "fusellm.fusions")


@FUSIONS.register("mince", version=2, reference="arXiv 2401.10491, MinCE")
def mince(members: Sequence[Sparse], scores: SourceScores, switches: Switches) -> tuple[Sparse, np.ndarray]:
    """The distributions of the source with the least cross-entropy in each unit.

    `select_by: nats_per_byte` compares float32 and breaks ties by name; `mean_ce_bfloat16` compares rewards and breaks
    ties by the order of the sources. With `select_over: token` the selection sees the gold token itself, so that the
    targets drift towards the gold text and the loss towards that of plain language modelling.
    """
    if switches.select_by == "nats_per_byte":
        best = scores.best()
    else:
        best = scores.rewards().argmax(axis=0)
    selected = best[scores.unit]
    ids, p, tail = _stack(members)
    rows = np.arange(len(selected))
    return Sparse(ids[selected, rows], p[selected, rows], tail[selected, rows]), selected


@FUSIONS.register("avgce", version=2, reference="arXiv 2401.10491, AvgCE")
def avgce(members: Sequence[Sparse], scores: SourceScores, switches: Switches) -> tuple[Sparse, np.ndarray]:
    """The average of the sources' distributions, weights[S, U] by cross-entropy.

    `weights: nats_per_byte` is softmax(-CE / weight_temperature) of CE in nats per byte; `exp_ce` is softmax(exp(-CE))
    of the bfloat16 rewards, which lie in (0, 1), so that no weight is more than e times another. Where a source has no
    distribution, or skipped the unit, the weights of the others are renormalised.
    """
    if switches.weights == "nats_per_byte":
        score = -scores.nats_per_byte() / switches.weight_temperature
    else:
        score = scores.rewards().astype(np.float64)
    unread = np.isinf(scores.nats_per_byte() if switches.weights == "nats_per_byte" else scores.nll)
    score = np.where(unread.all(axis=0), 0.0, np.where(unread, -np.inf, score))
    by_name = np.argsort(scores.names)  # sums in one order, so that the result does not depend on the given one
    weight = np.exp(score - score.max(axis=0))[by_name]
    return mix([members[s] for s in by_name], weight[:, scores.unit]), np.full(len(scores.unit), MIXTURE)


def mean(members: Sequence[Sparse], scores: SourceScores, switches: Switches) -> tuple[Sparse, np.ndarray]:
    """The mean of the sources' distributions where they have one: what is learnt from several teachers at once."""
    n = len(members[0].tail)
    if len(members) == 1:
        return members[0], np.zeros(n, np.int64)
    return mix(members, np.ones((len(members), n))), np.full(n, MIXTURE)


def mix(members: Sequence[Sparse], weight: np.ndarray) -> Sparse:
    """The mixture with `weight[S, N]`, normalised over the members that have a distribution at a position.

    Entries are in the order in which the members list them; the tail is the weighted tail. The mass of tails is not
    split: an id that one member lists and another has in its tail gets the first one's share only.
    """
    ids, p, tail = _stack(members)
    weight = weight * ((p > 0).any(axis=2) | (tail > 0))
    total = weight.sum(axis=0)
    weight = weight / np.where(total > 0, total, 1.0)
    out_ids = np.full((ids.shape[1], ids.shape[0] * ids.shape[2]), -1, np.int32)
    out_p = np.zeros(out_ids.shape, np.float64)
    width = _mix(ids, p, weight, out_ids, out_p)
    return Sparse(
        out_ids[:, :width], out_p[:, :width].astype(np.float32), (weight * tail).sum(axis=0).astype(np.float32)
    )


@numba.njit(cache=True)
def _mix(ids: np.ndarray, p: np.ndarray, weight: np.ndarray, out_ids: np.ndarray, out_p: np.ndarray) -> int:
    width = 0
    for i in range(ids.shape[1]):
        kept = 0
        for s in range(ids.shape[0]):
            for column in range(ids.shape[2]):
                token = ids[s, i, column]
                if token < 0 or weight[s, i] == 0:
                    break
                place = 0
                while place < kept and out_ids[i, place] != token:
                    place += 1
                if place == kept:
                    out_ids[i, place] = token
                    kept += 1
                out_p[i, place] += weight[s, i] * p[s, i, column]
        width = max(width, kept)
    return width


def _stack(members: Sequence[Sparse]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids[S, N, K], p[S, N, K], tail[S, N] with K the widest member's."""
    n, width = len(members[0].tail), max(member.ids.shape[1] for member in members)
    ids = np.full((len(members), n, width), -1, np.int32)
    p = np.zeros(ids.shape, np.float32)
    for s, member in enumerate(members):
        ids[s, :, : member.ids.shape[1]] = member.ids
        p[s, :, : member.p.shape[1]] = member.p
    return ids, p, np.stack([member.tail for member in members])


def score_sources(
    passages: Sequence[Sequence[Predictions]],
    targets: Sequence[Predictions],
    n_bytes: Sequence[int],
    *,
    names: tuple[str, ...],
    select_over: str,
) -> SourceScores:
    """Sums the sources' nats over the units of a sequence.

    A source's nats are those of all its own tokens, whether or not their positions are aligned with the target's, and
    infinite for a passage that it skipped, so that the selection is among the others. With `select_over: token` a
    segment lies between consecutive byte ends that all sources and the target share. A position belongs to the segment
    that begins at its byte end, since its distribution and its nats are about the text that follows, and no source's
    token crosses a shared end. A passage's last position belongs to the last segment; so do all positions from where
    some model's ends are -1.

    Args:
        passages: for each passage the predictions of the S sources, in the order of `names`.
        targets: for each passage the target's own predictions, for their byte ends.
        n_bytes: bytes of each passage.
    """
    n_sources, first = len(names), 0
    nll: list[np.ndarray] = []
    tokens: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    units: list[np.ndarray] = []
    spelled: list[np.ndarray] = []
    for by_source, target, size in zip(passages, targets, n_bytes, strict=True):
        heard = [predictions for predictions in by_source if not predictions.skipped]
        starts = segment_starts([*heard, target], size) if select_over == "token" else np.zeros(1, np.int64)
        count = len(starts)
        sums, counts = np.zeros((n_sources, count)), np.zeros((n_sources, count), np.int64)
        whole = np.ones((n_sources, count), bool)
        for s, predictions in enumerate(by_source):
            if predictions.skipped:
                sums[s] = np.inf
                continue
            unit = segment_of(predictions, starts)[:-1]  # the last position has no next token
            sums[s] = np.bincount(unit, predictions.nll[:-1], count)
            counts[s] = np.bincount(unit, minlength=count)
            whole[s, -1] = predictions.byte_ends[-1] == size  # what is not spelled belongs to the last unit
        nll.append(sums)
        tokens.append(counts)
        spelled.append(whole)
        sizes.append(np.diff(starts, append=size))
        units.append(segment_of(target, starts) + first)
        first += count
    scores = SourceScores(
        names,
        np.concatenate(nll, 1),
        np.concatenate(tokens, 1),
        np.concatenate(sizes),
        np.concatenate(units),
        np.concatenate(spelled, 1),
    )
    if select_over != "sequence":
        return scores
    groups, group = np.unique(np.isinf(scores.nll), axis=1, return_inverse=True)
    members = group == np.arange(groups.shape[1])[:, None]

    def summed(values: np.ndarray) -> np.ndarray:
        total: np.ndarray = np.where(members, values[..., None, :], 0).sum(axis=-1)
        return total

    assert scores.spelled is not None
    return SourceScores(
        names,
        summed(scores.nll),
        summed(scores.tokens),
        summed(scores.n_bytes),
        group[scores.unit],
        summed(~scores.spelled) == 0,
    )


def segment_starts(passages: Sequence[Predictions], n_bytes: int) -> np.ndarray:
    """Bytes where the segments of a passage begin: the ends that all models share, without the end of the text."""
    common = reduce(np.intersect1d, [predictions.byte_ends[predictions.byte_ends >= 0] for predictions in passages])
    return common[common < n_bytes] if n_bytes else common[:1]


def segment_of(predictions: Predictions, starts: np.ndarray) -> np.ndarray:
    """int64[M], the segment of each position."""
    return (
        np.where(predictions.byte_ends < 0, len(starts), np.searchsorted(starts, predictions.byte_ends, side="right"))
        - 1
    )


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds to the nearest bfloat16, ties to even, and returns float32. Finite numbers only."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
