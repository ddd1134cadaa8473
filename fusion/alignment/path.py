"""Projection along the text: a source's predictions on the target's positions, with nothing of the true path lost.

Projected entry by entry, a better source becomes a worse one where tokenizers differ: a source that writes the next
target token as two tokens has put its mass on the first of them, and a target position in the middle of a source token
has no prediction at all. What is stored allows more, without another forward pass: the text says which source tokens
really followed, and the probability of each of these is known.

Both tokenizers are laid over one text with a space before it, so that a dummy prefix is text like any other. At a
target position that ends at byte v, with next token of bytes g, let j be the last source position that ends at a_j <= v
and u the source token that really follows it.

- Paired (a_j = v): every entry goes to the first target token of its bytes.
- Inside a source token (a_j < v): with s the bytes between a_j and v, the entries that begin with s and are longer go
  to the first target token of the bytes that they have left, divided by P(s), the mass of all source tokens that begin
  with s. That is stored (`prefix_nats`): the entries alone would make what really follows too probable.
- One correction, on the true path alone. The source gave g the probability c, by the chain rule over its own tokens:
  the product over tokens that lie wholly in g, and for a last one that goes on beyond g the mass of all tokens that
  begin with what is left of g. Where what u has left is a proper prefix of g, c is moved from the image of u to the
  true target token. Where u goes on beyond g, all that u has is moved there, and from the tail what other tokens that
  begin with g have.

The mass is kept, and the true target token has the probability that the source gave its bytes, less that of entries
which begin with it and are tokens of the target by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from fusion.alignment.projection import Projected
from fusion.errors import UserError
from fusion.types import Predictions
from fusion.vocabulary.pieces import PieceMap
from fusion.vocabulary.token_bytes import Vocabulary

UNKNOWN = -1
_OUTSIDE_MAP = 1
_OTHER_PREFIXES = 2
_FAULTS = {
    _OUTSIDE_MAP: "a token id lies outside its vocabulary map: map and predictions come from different models, make "
    "the map again",
    _OTHER_PREFIXES: "the probabilities of the first bytes of a passage's tokens are not those of its tokens: extract "
    "again",
}


def text_ends(predictions: Predictions, vocabulary: Vocabulary) -> np.ndarray:
    """int32[M]: the byte at which each position of a passage ends in the text with one space before it.

    The prefix token ends before the space where the tokenizer wrote one of its own (a dummy prefix), else after it; -1
    where the byte is not known, and everywhere in a passage that was skipped.
    """
    tokens, ends = predictions.tokens, predictions.ends
    result = np.where((ends >= 0) & (not predictions.skipped), ends + 1, UNKNOWN).astype(np.int32)
    if len(tokens) > 1 and result[1] >= 0:
        result[0] = result[1] - len(vocabulary.token_bytes[tokens[1]] or b"")
    return result


def passage_starts(passages: Sequence[Predictions]) -> np.ndarray:
    """int64[P + 1]: where each of P passages begins among the positions of all, and their number."""
    return np.concatenate([[0], np.cumsum([len(passage.tokens) for passage in passages], dtype=np.int64)])


def project_path(
    ids: np.ndarray,
    p: np.ndarray,
    source_tokens: np.ndarray,
    source_ends: np.ndarray,
    source_starts: np.ndarray,
    target_tokens: np.ndarray,
    target_ends: np.ndarray,
    target_starts: np.ndarray,
    *,
    pieces: PieceMap,
    prefix_mass: np.ndarray,
    prefix_starts: np.ndarray,
    vocabulary_size: int,
    inside: bool,
    correct: bool,
) -> Projected:
    """The source's entries on the target's positions, for the passages of a sequence.

    Args:
        ids: int32[M, K] source token ids, -1 for no entry. The token that really follows is the last column's, where it
            has one (see `true_token_last`).
        p: float64[M, K] probabilities, 0 where there is no entry.
        source_tokens: int32[M] token ids, the prefix first in each passage.
        source_ends: int32[M] of `text_ends`.
        source_starts: int64[P + 1] where the P passages begin, and M.
        target_tokens: int32[N], as the source's.
        target_ends: int32[N], as the source's.
        target_starts: int64[P + 1], as the source's.
        pieces: target tokens of the source's tokens and of what is left of them.
        prefix_mass: float64[Q] exp of minus the `prefix_nats` of all passages. In a passage without them no position
            inside a source token has entries: the k that are known would make the true token far too probable.
        prefix_starts: int64[P + 1] where each passage's begin, and Q.
        vocabulary_size: number of ids of the target vocabulary.
        inside: whether positions inside a source token take part.
        correct: whether the true path is corrected.

    Raises:
        UserError: an id lies outside of `pieces`, or `pieces` was made for another target.
    """
    if pieces.highest >= vocabulary_size:
        raise UserError(
            "cannot project a distribution: the vocabulary map names an id that the target vocabulary lacks: it was "
            "made for another target, make it again."
        )
    n, width = len(target_tokens), ids.shape[1]
    out = Projected(
        np.full((n, width + 1), -1, np.int32),
        np.zeros((n, width + 1)),
        np.full(n, -1, np.int32),
        np.zeros(n, np.bool_),
    )
    fault = _project_path(
        np.ascontiguousarray(ids, np.int32),
        np.ascontiguousarray(p, np.float64),
        np.ascontiguousarray(source_tokens, np.int32),
        np.ascontiguousarray(source_ends, np.int32),
        np.ascontiguousarray(source_starts, np.int64),
        np.ascontiguousarray(target_tokens, np.int32),
        np.ascontiguousarray(target_ends, np.int32),
        np.ascontiguousarray(target_starts, np.int64),
        pieces.spelling,
        pieces.starts,
        pieces.images,
        np.ascontiguousarray(prefix_mass, np.float64),
        np.ascontiguousarray(prefix_starts, np.int64),
        inside,
        correct,
        out.ids,
        out.p,
        out.partner,
        out.inside,
    )
    if fault:
        raise UserError(f"cannot project a distribution: {_FAULTS[fault]}.")
    return out


@numba.njit(cache=True, nogil=True, inline="always")
def _begins_alike(spelling: np.ndarray, a: int, b: int, n: int) -> bool:
    for i in range(n):  # noqa: SIM110 - compiled, where a generator is no loop
        if spelling[a + i] != spelling[b + i]:
            return False
    return True


@numba.njit(cache=True, nogil=True)
def _project_path(
    ids: np.ndarray,
    p: np.ndarray,
    source_tokens: np.ndarray,
    source_ends: np.ndarray,
    source_starts: np.ndarray,
    target_tokens: np.ndarray,
    target_ends: np.ndarray,
    target_starts: np.ndarray,
    spelling: np.ndarray,
    starts: np.ndarray,
    images: np.ndarray,
    prefix_mass: np.ndarray,
    prefix_starts: np.ndarray,
    inside: bool,
    correct: bool,
    out_ids: np.ndarray,
    out_p: np.ndarray,
    out_partner: np.ndarray,
    out_inside: np.ndarray,
) -> int:
    size, width = len(starts) - 1, ids.shape[1]
    first_prefix = np.zeros(len(source_tokens), np.int64)  # of the token after a position, its values' place
    for passage in range(len(target_starts) - 1):
        j, stop = source_starts[passage], source_starts[passage + 1]
        value = prefix_starts[passage]
        stored = prefix_starts[passage + 1] > value
        for at in range(j, stop - 1):
            first_prefix[at] = value
            if source_tokens[at + 1] >= size:
                return _OUTSIDE_MAP
            value += max(starts[source_tokens[at + 1] + 1] - starts[source_tokens[at + 1]] - 3, 0)
        if stored and value != prefix_starts[passage + 1]:
            return _OTHER_PREFIXES
        last = target_starts[passage + 1] - 1
        for i in range(target_starts[passage], last + 1):
            v = target_ends[i]
            if v < 0:
                break
            if i < last and target_ends[i + 1] == v:  # of positions with one end only the last has text to predict
                continue
            while j + 1 < stop and 0 <= source_ends[j + 1] <= v:
                j += 1
            if source_ends[j] < 0:
                break
            offset = v - source_ends[j]  # -1: the target's own space before the text comes first
            known = j + 1 < stop and source_ends[j + 1] >= 0  # the next source token is in the text
            if offset > 0 and not (known and inside and stored):
                continue
            true = source_tokens[j + 1] if j + 1 < stop else -1
            kept, begun, scale = 0, 0.0, 1.0
            true_image, true_share = -1, 0.0
            for column in range(width):
                u = ids[j, column]
                if u < 0:
                    continue
                if u >= size:
                    return _OUTSIDE_MAP
                q = p[j, column]
                # `images` holds for each token: with a space before it, as it is, without its first byte, ...
                first = starts[u]
                if offset > 0:
                    length = starts[u + 1] - first - 2
                    if length < offset or not _begins_alike(spelling, first, starts[true], offset):
                        continue
                    begun += q
                    if length == offset:
                        continue
                image = images[first + 1 + offset]
                if column == width - 1:
                    true_image, true_share = image, q
                if image < 0:
                    continue
                place = 0
                while place < kept and out_ids[i, place] != image:
                    place += 1
                if place == kept:
                    out_ids[i, place] = image
                    out_p[i, place] = 0.0
                    kept += 1
                out_p[i, place] += q
            if offset > 0:
                if begun <= 0:
                    out_ids[i, :kept] = -1
                    out_p[i, :kept] = 0.0
                    continue
                scale = 1 / max(prefix_mass[first_prefix[j] + offset - 1], begun)
                true_share *= scale
                for place in range(kept):
                    out_p[i, place] *= scale
            out_partner[i], out_inside[i] = j, offset > 0
            if not (correct and known and true_share > 0 and i < last and target_ends[i + 1] >= 0):
                continue
            gold, end = target_tokens[i + 1], target_ends[i + 1]
            moved, of_tail = 0.0, 0.0
            if true_image != gold:
                moved, at = true_share, j + 1
                while moved > 0 and source_ends[at] < end:
                    n = end - source_ends[at]
                    if at + 1 == stop or source_ends[at + 1] < 0:
                        moved = 0.0
                    elif source_ends[at + 1] <= end:
                        moved *= p[at, width - 1]
                    elif stored:
                        moved *= prefix_mass[first_prefix[at] + n - 1]
                    else:
                        moved *= _mass_beginning(ids, p, at, n, source_tokens[at + 1], spelling, starts)
                    at += 1
            n = end - source_ends[j]
            if stored and source_ends[j + 1] > end and n > 0:  # other tokens that begin with the true target token
                begin = prefix_mass[first_prefix[j] + n - 1]
                of_tail = scale * (begin - _mass_beginning(ids, p, j, n, true, spelling, starts))
                of_tail = max(min(of_tail, 1 - out_p[i, :kept].sum()), 0.0)
            if moved + of_tail <= 0:
                continue
            place = 0
            while place < kept and out_ids[i, place] != gold:
                place += 1
            if place == kept:
                out_ids[i, place] = gold
                out_p[i, place] = 0.0
                kept += 1
            out_p[i, place] += moved + of_tail
            for other in range(kept):
                if true_image >= 0 and true_image != gold and out_ids[i, other] == true_image:
                    out_p[i, other] = max(out_p[i, other] - moved, 0.0)
    return 0


@numba.njit(cache=True, nogil=True)
def _mass_beginning(
    ids: np.ndarray, p: np.ndarray, j: int, n: int, true: int, spelling: np.ndarray, starts: np.ndarray
) -> float:
    """The mass of the entries at source position j that begin with the first n bytes of the token that follows it."""
    mass = 0.0
    for column in range(ids.shape[1]):
        u = ids[j, column]
        if u >= 0 and starts[u + 1] - starts[u] - 2 >= n and _begins_alike(spelling, starts[u], starts[true], n):
            mass += p[j, column]
    return mass
