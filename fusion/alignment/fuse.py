"""From several models' predictions of the passages of a sequence to one target distribution per position.

The steps are: align positions, project distributions, score and select sources, fuse. All of it is a pure function of
stored predictions (no model, no file, no randomness), so that every switch can be changed without a new extraction.

Source: "Knowledge Fusion of Large Language Models", ICLR 2024, arXiv 2401.10491, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from fusion.alignment.pairing import ALIGNMENTS
from fusion.alignment.path import SourceEntries, TokenSequence, project_path
from fusion.alignment.projection import Projected, fill_unaligned, project_entries, true_token_last
from fusion.alignment.selection import FUSIONS, score_sources
from fusion.alignment.shuffling import shuffled
from fusion.errors import UserError
from fusion.registry import PartName
from fusion.switches import Switches
from fusion.types import Predictions, Sparse
from fusion.vocabulary.pieces import PieceMap
from fusion.vocabulary.token_bytes import Vocabulary

MASS_SLACK = 0.01
"""By how much a stored distribution may differ from a sum of 1 before it is an error and not storage rounding."""
UNALIGNED = -1
"""In `FusedSequence.chosen`: no source position is aligned, so the distribution is a one-hot."""


@dataclass(frozen=True)
class Source:
    """A model whose distributions are fused: its name, its V token ids, and where they go in the target vocabulary."""

    name: str
    vocabulary: Vocabulary
    map: np.ndarray
    """int32[V] target id; -1 maps to nothing. The target itself has the identity map."""
    pieces: PieceMap | None = None
    """What `projection: path` and `inside: prefix` need, except where the map is the identity."""


@dataclass(frozen=True)
class FusedSequence:
    """The fused distributions of the N positions of a sequence, its passages one after the other."""

    targets: Sparse
    fusion_weight: np.ndarray
    """float32[N], 1 where the fusion loss is taken, else 0; always 0 where there is no distribution to learn."""
    gold: np.ndarray
    """int32[N], the next token of the passage, -1 at a passage's last position."""
    chosen: np.ndarray
    """int16[N], index into `names` of the selected source, -1 for a one-hot (unaligned), -2 for a mixture."""
    paired: np.ndarray
    """bool[S, N], true where source s has an aligned position."""
    inside: np.ndarray
    """bool[S, N], true where the target position lies inside a token of source s, and is aligned with its beginning."""
    partner: np.ndarray
    """int32[S, N], that position, counted over the source's positions in the whole sequence; -1 where there is none."""
    names: tuple[str, ...]
    """The S sources that take part: the target first where it does and is not listed, then the others as given."""


def fuse_sequence(
    passages: Sequence[Mapping[str, Predictions]],
    n_bytes: Sequence[int],
    *,
    target: str,
    sources: Sequence[Source],
    target_vocabulary: Vocabulary,
    switches: Switches,
    max_entries: int | None = None,
) -> FusedSequence:
    """Fuse the sources' predictions of the passages of one sequence.

    Every source first gets a complete distribution at every position (the projected entries of its aligned position, or
    what the switches define for unaligned ones); the fusion function then selects one of these or averages them.

    Args:
        passages: for each passage, the predictions of every model by name. The target's own must be there for its
            tokens and ends; it may have no entries (k = 0) unless `include_target` or `unmapped: target` needs them. A
            model takes no part in a passage that it skipped; where all skipped it, all positions are unaligned.
        n_bytes: UTF-8 bytes of each passage.
        target: the target's name; if it is listed in `sources`, its place there is its place in `names`.
        switches: see `Switches`. At a passage's last position, where `unaligned: next` or `tail: gold` find no next
            token, an unaligned position has no distribution (weight 0) and the tail is scaled away.
        max_entries: keep at most this many entries a position, the most probable; the probability of the others is
            added to the tail.

    Raises:
        UserError: predictions are missing, damaged or of another tokenizer, a map does not fit, a name is not
            registered, or `sources` and `include_target` contradict each other.
    """
    switches.check_projection()
    fuse = FUSIONS.choose(switches.fusion).value
    if max_entries is not None and max_entries < 1:
        raise UserError(f"max_entries is {max_entries}: keep at least one entry, or leave it out to keep all.")
    itself = Source(target, target_vocabulary, np.arange(len(target_vocabulary.tokens), dtype=np.int32))
    taking_part = _taking_part(itself, sources, switches)
    names = tuple(taking_part)
    _check(passages, n_bytes, names, target)
    if switches.control == "shuffled":
        sizes = {name: len(member.vocabulary.tokens) for name, member in taking_part.items()}
        passages = [
            {name: shuffled(one, sizes[name]) if name in sizes else one for name, one in passage.items()}
            for passage in passages
        ]
    own = [passage[target] for passage in passages]
    current = np.concatenate([predictions.tokens for predictions in own]).astype(np.int32)
    gold = np.concatenate([np.append(predictions.tokens[1:], -1) for predictions in own]).astype(np.int32)

    @cache
    def distributions(name: str) -> tuple[tuple[Sparse, np.ndarray], Projected]:
        projected = _project(taking_part.get(name, itself), target, passages, target_vocabulary, switches)
        distribution = fill_unaligned(
            projected.ids,
            projected.p,
            projected.partner,
            gold=gold,
            current=current,
            switches=switches,
            own=None if name == target else lambda: distributions(target)[0][0],
        )
        return distribution, projected

    filled, projections = zip(*(distributions(name) for name in names), strict=True)
    members, paired = zip(*filled, strict=True)
    scores = score_sources(
        [[passage[name] for name in names] for passage in passages],
        own,
        n_bytes,
        names=names,
        select_over=switches.select_over,
    )
    fused, selected = fuse(members, scores, switches)
    paired_by_source = np.stack(paired)
    fused, exists = _trim(fused, max_entries)
    wanted = gold >= 0 if switches.loss_positions == "with_next" else np.ones(len(gold), bool)
    return FusedSequence(
        targets=fused,
        fusion_weight=(wanted & exists).astype(np.float32),
        gold=gold,
        chosen=_chosen(selected, paired_by_source),
        paired=paired_by_source,
        inside=np.stack([projected.inside for projected in projections]),
        partner=np.stack([projected.partner for projected in projections]),
        names=names,
    )


def _chosen(selected: np.ndarray, paired: np.ndarray) -> np.ndarray:
    """int16[N] of `FusedSequence.chosen`: the selection where it has an aligned position, bool[S, N] `paired`."""
    of_selected = paired[np.maximum(selected, 0), np.arange(len(selected))]
    aligned = np.where(selected >= 0, of_selected, paired.any(axis=0))
    return np.where(aligned, selected, UNALIGNED).astype(np.int16)


def _taking_part(itself: Source, sources: Sequence[Source], switches: Switches) -> dict[str, Source]:
    """The sources that take part, by name, in the order of `FusedSequence.names`."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two sources are called {name!r}: give each a name of its own.")
    listed = itself.name in names
    if listed and not switches.include_target:
        raise UserError(
            f"the target {itself.name!r} is listed among the sources, but the switch include_target is off: "
            "take it off the list or turn the switch on."
        )
    taking_part = [itself] if switches.include_target and not listed else []
    taking_part += [itself if source.name == itself.name else source for source in sources]
    if not taking_part:
        raise UserError("there is nothing to fuse: name a source or turn the switch include_target on.")
    return {source.name: source for source in taking_part}


def _check(
    passages: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int], names: Sequence[str], target: str
) -> None:
    """Refuse what would give wrong numbers silently: missing models, arrays of different lengths, not-a-numbers."""
    if not passages or len(passages) != len(n_bytes):
        raise UserError(
            f"each passage needs its size in bytes: got {len(passages)} passages, {len(n_bytes)} byte counts."
        )
    for number, passage in enumerate(passages):
        for name in {*names, target}:
            if name not in passage:
                raise UserError(f"passage {number} of the sequence has no predictions by {name!r}: extract them first.")
            predictions, m = passage[name], len(passage[name].tokens)
            aligned = (predictions.byte_ends, predictions.ids, predictions.log_p, predictions.tail, predictions.nll)
            if m == 0 or any(len(a) != m for a in aligned) or predictions.ids.shape != predictions.log_p.shape:
                raise UserError(
                    f"the predictions of passage {number} by {name!r} have arrays of different lengths: extract again."
                )
            if predictions.byte_ends[0] != 0:
                raise UserError(
                    f"the predictions of passage {number} by {name!r} do not begin at byte 0: extract again."
                )
            if name in names and not np.isfinite(predictions.nll).all():
                raise UserError(
                    f"the predictions of passage {number} by {name!r} have an nll that is not finite: extract again."
                )


def _project(
    source: Source,
    target: str,
    passages: Sequence[Mapping[str, Predictions]],
    target_vocabulary: Vocabulary,
    switches: Switches,
) -> Projected:
    """The source's entries at every position of the target in the sequence."""
    ids, p = stored_entries(source.name, passages)
    read = [passage[source.name] for passage in passages]
    if switches.true_token == "always" or switches.along_text:
        true_token = np.concatenate([np.append(predictions.tokens[1:], -1) for predictions in read])
        nats = np.concatenate([predictions.nll for predictions in read])
        ids, p = true_token_last(ids, p, true_token, nats if switches.true_token == "always" else None)
    own = [passage[target] for passage in passages]
    source_tokens = TokenSequence.of(read, source.vocabulary)
    target_tokens = TokenSequence.of([replace(one, skipped=False) for one in own], target_vocabulary)
    if not switches.along_text or source.name == target or (source.pieces is None and _is_identity(source.map)):
        partner = _partners(source, target, passages, target_vocabulary, switches.alignment)
        # The published pairing is one of strings, and leaves a text's first token as it is.
        if source.name != target and ALIGNMENTS.choose(switches.alignment).part.name != "dtw":
            ids = respaced(ids, partner, source_tokens.ends, target_tokens.ends, source.vocabulary)
        ids, p = project_entries(
            ids,
            p,
            partner,
            source.map,
            vocabulary_size=len(target_vocabulary.tokens),
            duplicates=switches.duplicates,
        )
        return Projected(ids, p, partner, np.zeros(len(partner), bool))
    if source.pieces is None:
        raise UserError(
            f"projection along the text needs to know what each token of {source.name!r} begins with in the target's "
            "vocabulary: give the source its pieces (build_piece_map), or set projection to token and inside to none."
        )
    return project_path(
        SourceEntries.of(ids, p, read),
        source_tokens,
        target_tokens,
        source.pieces,
        vocabulary_size=len(target_vocabulary.tokens),
        inside=switches.inside == "prefix",
        correct=switches.projection == "path",
    )


def _is_identity(vocabulary_map: np.ndarray) -> bool:
    """True if every id that has an image is its own."""
    return bool(((vocabulary_map == np.arange(len(vocabulary_map))) | (vocabulary_map == -1)).all())


def _partners(
    source: Source,
    target: str,
    passages: Sequence[Mapping[str, Predictions]],
    target_vocabulary: Vocabulary,
    alignment: PartName,
) -> np.ndarray:
    """int32[N], the position among all of the source.s that is aligned with each target position, -1 for none."""
    partners, first = [], 0
    align = ALIGNMENTS.choose(alignment).value
    for passage in passages:
        predictions, own = passage[source.name], passage[target]
        if predictions.skipped:
            partner = np.full(len(own.tokens), -1, dtype=np.int32)
        elif source.name == target:
            partner = np.arange(len(own.tokens), dtype=np.int32)
        else:
            partner = align(
                predictions.tokens,
                predictions.byte_ends,
                own.tokens,
                own.byte_ends,
                source.vocabulary,
                target_vocabulary,
                source.map,
            )
        partners.append(np.where(partner >= 0, partner + first, -1))
        first += len(predictions.tokens)
    return np.concatenate(partners).astype(np.int32)


def stored_entries(name: str, passages: Sequence[Mapping[str, Predictions]]) -> tuple[np.ndarray, np.ndarray]:
    """ids[M, k] and probabilities float64[M, k] of all of a model's positions in the sequence.

    Entries and tail are stored rounded, each for itself: they are scaled together to sum to 1, so that a small tail
    keeps its digits. As 1 minus the entries it would be their rounding error.
    """
    widths = {passage[name].ids.shape[1] for passage in passages}
    if widths == {0}:
        raise UserError(
            f"the distributions of {name!r} are needed, but its predictions hold no entries: extract them first."
        )
    if len(widths) > 1:
        raise UserError(
            f"the predictions by {name!r} keep different numbers of entries ({sorted(widths)}): extract again."
        )
    columns = []
    for number, passage in enumerate(passages):
        predictions = passage[name]
        p = np.exp(predictions.log_p, dtype=np.float64)
        total = p.sum(axis=1) + predictions.tail
        sound = np.abs(total - 1) <= MASS_SLACK
        if not (predictions.skipped or sound.all()):
            position = int(sound.argmin())
            raise UserError(
                f"the probabilities and the tail at position {position} of passage {number} by {name!r} sum to "
                f"{total[position]:g}, which no distribution does: the extraction is damaged, extract again."
            )
        columns.append(p / np.where(sound, total, 1.0)[:, None])
    return np.concatenate([passage[name].ids for passage in passages]), np.concatenate(columns)


def respaced(
    ids: np.ndarray, partner: np.ndarray, source_ends: np.ndarray, target_ends: np.ndarray, vocabulary: Vocabulary
) -> np.ndarray:
    """The source's entries ids[M, k] with, before a passage's first token, the space that the target would write there.

    A tokenizer with a dummy prefix begins a text with a space of its own: where the source says "The", its target says
    "▁The", and the other way round. `source_ends` and `target_ends` are those of `text_ends`. An entry without such a
    form becomes -1, which maps to nothing.
    """
    at = np.flatnonzero(partner >= 0)
    ends = np.stack([source_ends[partner[at]], target_ends[at]])
    added = np.where((ends.min(axis=0) == 0) & (ends.max(axis=0) == 1), ends[0] - ends[1], 0)
    ids = ids.copy()
    for sign, form in ((1, "with_space"), (-1, "without_space")):
        if (added == sign).any():
            rows = partner[at[added == sign]]
            ids[rows] = np.where(ids[rows] >= 0, getattr(vocabulary, form)[ids[rows]], -1)
    return ids


def _trim(fused: Sparse, max_entries: int | None) -> tuple[Sparse, np.ndarray]:
    """Drop columns that no position uses, keep at most `max_entries`; and whether there is a distribution, bool[N].

    Where there is none, all mass goes to the tail, so that what is handed on always sums to 1.
    """
    ids, p, tail = fused.ids, fused.p, fused.tail
    used = int((ids >= 0).sum(axis=1).max(initial=0))
    if max_entries is not None and used > max_entries:
        order = np.argsort(-p, axis=1, kind="stable")  # pads have p = 0 and stand last already, so they stay last
        ids, p = np.take_along_axis(ids, order, 1), np.take_along_axis(p, order, 1)
        tail = tail + p[:, max_entries:].sum(axis=1, dtype=np.float64).astype(np.float32)
        used = max_entries
    ids, p = ids[:, :used], p[:, :used]
    exists = (p > 0).any(axis=1) | (tail > 0)
    return Sparse(ids, p, np.where(exists, tail, np.float32(1.0))), exists
