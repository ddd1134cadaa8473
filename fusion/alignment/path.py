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
  with s. That is stored (`prefix_nll`): the entries alone would make what really follows too probable.
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
from typing import NamedTuple

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


class TokenSequence(NamedTuple):
    """The M tokens of the P passages of a sequence by one tokenizer, the prefix token first in each passage."""

    ids: np.ndarray
    """int32[M]."""
    ends: np.ndarray
    """int32[M] of `text_ends`."""
    starts: np.ndarray
    """int64[P + 1]: where each passage begins, and M."""

    @classmethod
    def of(cls, passages: Sequence[Predictions], vocabulary: Vocabulary) -> TokenSequence:
        """The tokens that these predictions are about, of a model with this vocabulary."""
        return cls(
            np.concatenate([passage.tokens for passage in passages], dtype=np.int32),
            np.concatenate([text_ends(passage, vocabulary) for passage in passages]),
            np.cumsum([0, *(len(passage.tokens) for passage in passages)], dtype=np.int64),
        )


class SourceEntries(NamedTuple):
    """What is known of a source's distributions at the M positions of a sequence of P passages."""

    ids: np.ndarray
    """int32[M, K] source token ids, -1 for no entry. The token that really follows is the last column's, where it has
    one (see `true_token_last`)."""
    p: np.ndarray
    """float64[M, K] probabilities, 0 where there is no entry."""
    prefix_mass: np.ndarray
    """float64[Q] exp of minus the `prefix_nll` of all passages. In a passage without them no position inside a source
    token has entries: the k that are known would make the true token far too probable."""
    prefix_starts: np.ndarray
    """int64[P + 1]: where each passage's values in `prefix_mass` begin, and Q."""

    @classmethod
    def of(cls, ids: np.ndarray, p: np.ndarray, passages: Sequence[Predictions]) -> SourceEntries:
        """These entries with the prefix masses that are stored for the passages."""
        nats = [np.zeros(0) if r.prefix_nll is None or r.skipped else r.prefix_nll for r in passages]
        return cls(
            np.ascontiguousarray(ids, np.int32),
            np.ascontiguousarray(p, np.float64),
            np.exp(-np.concatenate(nats, dtype=np.float64)),
            np.cumsum([0, *map(len, nats)], dtype=np.int64),
        )


class _Pieces(NamedTuple):
    """The arrays of a `PieceMap`."""

    starts: np.ndarray
    spelling: np.ndarray
    images: np.ndarray


def text_ends(predictions: Predictions, vocabulary: Vocabulary) -> np.ndarray:
    """int32[M]: the byte at which each position of a passage ends in the text with one space before it.

    The prefix token ends before the space where the tokenizer wrote one of its own (a dummy prefix), else after it; -1
    where the byte is not known, and everywhere in a passage that was skipped.
    """
    tokens, ends = predictions.tokens, predictions.byte_ends
    result = np.where((ends >= 0) & (not predictions.skipped), ends + 1, UNKNOWN).astype(np.int32)
    if len(tokens) > 1 and result[1] >= 0:
        result[0] = result[1] - len(vocabulary.token_bytes[tokens[1]] or b"")
    return result


def project_path(
    entries: SourceEntries,
    source: TokenSequence,
    target: TokenSequence,
    pieces: PieceMap,
    *,
    vocabulary_size: int,
    inside: bool,
    correct: bool,
) -> Projected:
    """The source's entries on the target's positions, for the passages of a sequence.

    Args:
        entries: the source's distributions at its M positions.
        source: its M tokens.
        target: the target's N tokens of the same passages.
        pieces: target tokens of the source's tokens and of what is left of them.
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
    n, width = len(target.ids), entries.ids.shape[1]
    out = Projected(
        np.full((n, width + 1), -1, np.int32),
        np.zeros((n, width + 1)),
        np.full(n, -1, np.int32),
        np.zeros(n, np.bool_),
    )
    arrays = _Pieces(pieces.starts, pieces.spelling, pieces.images)
    fault = _project_path(entries, source, target, arrays, inside, correct, out)
    if fault:
        raise UserError(f"cannot project a distribution: {_FAULTS[fault]}.")
    return out


@numba.njit(cache=True, nogil=True)
def _project_path(
    entries: SourceEntries,
    source: TokenSequence,
    target: TokenSequence,
    pieces: _Pieces,
    inside: bool,
    correct: bool,
    out: Projected,
) -> int:
    """Fills `out`; returns a key of `_FAULTS`, or 0."""
    # Out of their tuples once, and small functions inlined: either costs as much as the work of a loop.
    ids, p, prefix_mass = entries.ids, entries.p, entries.prefix_mass
    starts, spelling, images = pieces.starts, pieces.spelling, pieces.images
    source_tokens, source_ends = source.ids, source.ends
    target_tokens, target_ends = target.ids, target.ends
    out_ids, out_p, out_partner, out_inside = out.ids, out.p, out.partner, out.inside
    size, width = len(starts) - 1, ids.shape[1]
    first_prefix = np.zeros(len(source_tokens), np.int64)
    for passage in range(len(target.starts) - 1):
        fault = _place_prefixes(entries, source, pieces, passage, first_prefix)
        if fault:
            return fault
        stored = entries.prefix_starts[passage + 1] > entries.prefix_starts[passage]
        j, stop = source.starts[passage], source.starts[passage + 1]
        last = target.starts[passage + 1] - 1
        for i in range(target.starts[passage], last + 1):
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
                place = _place_of(image, out_ids, i, kept)
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
                moved = _along_text(entries, source, pieces, j, stop, end, true_share, stored, first_prefix)
            n = end - source_ends[j]
            if stored and source_ends[j + 1] > end and n > 0:  # other tokens that begin with the true target token
                begin = prefix_mass[first_prefix[j] + n - 1]
                of_tail = scale * (begin - _mass_beginning(entries, pieces, j, n, true))
                of_tail = max(min(of_tail, 1 - out_p[i, :kept].sum()), 0.0)
            if moved + of_tail <= 0:
                continue
            place = _place_of(gold, out_ids, i, kept)
            if place == kept:
                out_ids[i, place] = gold
                out_p[i, place] = 0.0
                kept += 1
            out_p[i, place] += moved + of_tail
            if true_image >= 0 and true_image != gold:
                for place in range(kept):
                    if out_ids[i, place] == true_image:
                        out_p[i, place] = max(out_p[i, place] - moved, 0.0)
    return 0


@numba.njit(cache=True, nogil=True)
def _place_prefixes(
    entries: SourceEntries, source: TokenSequence, pieces: _Pieces, passage: int, first_prefix: np.ndarray
) -> int:
    """Where the masses of the first bytes of the token after each position of a passage are, into first_prefix[M]."""
    tokens, starts = source.ids, pieces.starts
    first, end = entries.prefix_starts[passage], entries.prefix_starts[passage + 1]
    value = first
    for at in range(source.starts[passage], source.starts[passage + 1] - 1):
        first_prefix[at] = value
        token = tokens[at + 1]
        if token >= len(starts) - 1:
            return _OUTSIDE_MAP
        value += max(starts[token + 1] - starts[token] - 3, 0)
    return _OTHER_PREFIXES if end > first and value != end else 0


@numba.njit(cache=True, nogil=True, inline="always")
def _along_text(
    entries: SourceEntries,
    source: TokenSequence,
    pieces: _Pieces,
    j: int,
    stop: int,
    end: int,
    share: float,
    stored: bool,
    first_prefix: np.ndarray,
) -> float:
    """The part of `share`, that of the token after source position j, which goes on with the text up to byte `end`."""
    ends, true_column, at = source.ends, entries.ids.shape[1] - 1, j + 1
    while share > 0 and ends[at] < end:
        n = end - ends[at]
        if at + 1 == stop or ends[at + 1] < 0:
            share = 0.0
        elif ends[at + 1] <= end:
            share *= entries.p[at, true_column]
        elif stored:
            share *= entries.prefix_mass[first_prefix[at] + n - 1]
        else:
            share *= _mass_beginning(entries, pieces, at, n, source.ids[at + 1])
        at += 1
    return share


@numba.njit(cache=True, nogil=True)
def _mass_beginning(entries: SourceEntries, pieces: _Pieces, j: int, n: int, true: int) -> float:
    """The mass of the entries at source position j that begin with the first n bytes of the token `true`."""
    ids, p, starts, spelling = entries.ids, entries.p, pieces.starts, pieces.spelling
    mass = 0.0
    for column in range(ids.shape[1]):
        u = ids[j, column]
        if u >= 0 and starts[u + 1] - starts[u] - 2 >= n and _begins_alike(spelling, starts[u], starts[true], n):
            mass += p[j, column]
    return mass


@numba.njit(cache=True, nogil=True, inline="always")
def _begins_alike(spelling: np.ndarray, a: int, b: int, n: int) -> bool:
    for i in range(n):  # noqa: SIM110 - compiled, where a generator is no loop
        if spelling[a + i] != spelling[b + i]:
            return False
    return True


@numba.njit(cache=True, nogil=True, inline="always")
def _place_of(token: int, ids: np.ndarray, i: int, kept: int) -> int:
    """The column of a token among the first `kept` of row i, or `kept` where it is not there."""
    place = 0
    while place < kept and ids[i, place] != token:
        place += 1
    return place
