"""The waterfall of a passage: how much of what each source knows more than the target is left after every step.

All of it is in nats by which a source is ahead of the target on the same text. A *segment* lies between consecutive
byte ends that the target and all sources share, so that all models predict the same bytes in it, given the same text.

- native: the target's negative log-likelihood of the segments less the source's.
- aligned: the same, over segments in which every position of the target has a partner at the source.
- projected: in these segments, the log-probability of the target's true next tokens under all stored entries of the
  source, projected onto the target's tokens, plus the target's own negative log-likelihood of them. A projection that
  loses nothing leaves the sum of a segment as it was, or raises it where the source might have gone on within a token:
  the target's token then has the probability of its bytes, which is that of all source tokens that begin so.
- kept: the same with the entries and the tail that the switches and k leave.
- selected: only where the fused distribution comes from this source, and with the fused distribution.
- in_loss: the same over all positions that have a partner, those of segments with a gap between partners included.

What is fused is the models' distributions where they have a partner. The one-hot that a training puts elsewhere is the
text itself, which no model said, so that it is no part of a mixture here.

A tail says nothing of which token follows, and is not spread over them: within the tail a target that has learnt it
goes on as before. So where the true next token has no entry, a model is ahead by the logarithm of its tail over the
target's own probability of the same outcome, that of all tokens without entries (of which the target's stored entries
are known, so that the lead is rather too small). Where there is no tail either (`tail: renormalise`), the true next
token is impossible and the model infinitely behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusion.alignment.fuse import FusedSequence, Source, fuse_sequence
from fusion.alignment.selection import FUSIONS, MIXTURE, FusionFunction, score_sources, segment_of, segment_starts
from fusion.alignment.shuffling import shuffled
from fusion.switches import Switches
from fusion.types import Predictions, Sparse
from fusion.vocabulary.token_bytes import Vocabulary

STAGES = ("native", "aligned", "projected", "kept", "selected", "in_loss")
FUSED = "fused"
"""The row of the distribution that the target is trained on."""
TAIL_ROUNDING = 1e-6
"""A tail is stored in float16; below this it is rounding and its logarithm means nothing."""


@dataclass(frozen=True)
class PassageGains:
    """The waterfall of one passage, by the name of the model, and of what is fused."""

    nats: Mapping[str, Mapping[str, float]]
    """By stage: nats by which the model is ahead of the target. `FUSED` has up to `kept` those of the model that is
    natively the best of the passage (maybe the target), so that what selection loses is what it leaves of these. Of a
    source of a mixture (AvgCE) `selected` and `in_loss` are NaN, since what is mixed is nobody's."""
    positions: Mapping[str, Mapping[str, int]]
    """Positions of the target that have a next token and are `paired` with the model (`inside` one of its tokens
    included), `inside` one, or `chosen` from it; and `no_entry`, of the paired ones where the distribution that is left
    after `kept` has no entry for the true next token."""
    n_positions: int
    shared_bytes: int
    """Bytes of the segments that all models spell."""


def waterfall(
    passage: Mapping[str, Predictions],
    n_bytes: int,
    *,
    target: str,
    sources: Sequence[Source],
    target_vocabulary: Vocabulary,
    switches: Switches,
    k: int | None = None,
    fusion: FusionFunction | None = None,
) -> PassageGains:
    """What is left of each model's lead over the target in one passage, step by step.

    Args:
        passage: the predictions of the target and of all sources by name, none of them skipped, with all entries.
        n_bytes: UTF-8 bytes of the passage.
        sources: as for `fuse_sequence`, without the target.
        switches: those that the target is trained with.
        k: number of entries that the target is trained with. Default: all.
        fusion: how the models' distributions become one. Default: as the switches say.

    Raises:
        UserError: as `fuse_sequence`.
    """
    by_name = {source.name: source for source in sources}
    models = [target, *by_name]
    own = passage[target]
    if switches.control == "shuffled":  # from here on this is what the models know
        vocabulary_sizes = {
            target: len(target_vocabulary),
            **{name: len(one.vocabulary) for name, one in by_name.items()},
        }
        passage = {
            name: shuffled(one if k is None else one.top(k), vocabulary_sizes[name]) for name, one in passage.items()
        }
        switches = replace(switches, control="none")
    starts = segment_starts([passage[name] for name in models], n_bytes)
    shared = np.ones(len(starts), bool)
    # Text that a tokenizer does not spell belongs to the last segment, where models then predict different bytes.
    shared[-1] = all(passage[name].byte_ends[-1] == n_bytes for name in models)
    here = segment_of(own, starts)[:-1]

    def alone(name: str, changed: Switches, entries: int | None) -> FusedSequence:
        return fuse_sequence(
            [{one: passage[one] if entries is None else passage[one].top(entries) for one in {name, target}}],
            [n_bytes],
            target=target,
            sources=[by_name[name]] if name in by_name else [],
            target_vocabulary=target_vocabulary,
            switches=replace(changed, include_target=name == target, fusion="mince"),
        )

    def in_segments(values: np.ndarray, which: np.ndarray) -> float:
        return float(values[which[here]].sum(dtype=np.float64))

    all_stored = replace(switches, true_token="always", tail="bucket", unmapped="tail")
    has_tail = switches.tail != "renormalise"
    own_nats = _nats(own, starts)
    nats, positions, whole = dict[str, dict[str, float]](), dict[str, dict[str, int]](), dict[str, np.ndarray]()
    left = dict[str, FusedSequence]()
    for name in models:
        stored = alone(name, all_stored, None)
        left[name] = kept = stored if k is None and switches == all_stored else alone(name, switches, k)
        paired, still = stored.paired[0][:-1], kept.paired[0][:-1]
        whole[name] = shared & (np.bincount(here, ~paired, len(starts)) == 0)
        lead = own_nats - _nats(passage[name], starts)
        ahead, listed = _ahead(kept.targets, own, has_tail=has_tail)
        nats[name] = {
            "native": float(lead[shared].sum()),
            "aligned": float(lead[whole[name]].sum()),
            "projected": in_segments(_ahead(stored.targets, own)[0], whole[name]),
            # Where nothing is left the target learns the text itself, and nothing of the source.
            "kept": in_segments(np.where(still, ahead, 0.0), whole[name]),
        }
        positions[name] = {
            "paired": int(paired.sum()),
            "inside": int(stored.inside[0][:-1].sum()),
            "no_entry": int((still & ~listed).sum()),
        }
    names = [target, *by_name] if switches.include_target else list(by_name)
    scores = score_sources(
        [[passage[name] for name in names]], [own], [n_bytes], names=tuple(names), select_over=switches.select_over
    )
    fuse = fusion or FUSIONS.choose(switches.fusion).value
    fused, selected = fuse([_where_paired(left[name]) for name in names], scores, switches)
    ahead, listed = _ahead(fused, own, has_tail=has_tail)
    selected, at = selected[:-1], np.arange(len(selected) - 1)
    of_one = np.maximum(selected, 0)
    paired = np.stack([left[name].paired[0][:-1] for name in names])
    complete = np.stack([whole[name][here] for name in names])
    is_mixture = selected == MIXTURE
    in_loss = np.where(is_mixture, paired.any(axis=0), paired[of_one, at])
    within = np.where(is_mixture, complete.any(axis=0), complete[of_one, at])
    mixed = bool(is_mixture.any())
    for name in models:
        of_it = in_loss & (selected == (names.index(name) if name in names else len(names)))
        positions[name]["chosen"] = int(of_it.sum())
        nats[name]["selected"] = np.nan if mixed else float(ahead[of_it & within].sum())
        nats[name]["in_loss"] = np.nan if mixed else float(ahead[of_it].sum())
    best = max(models, key=lambda name: nats[name]["native"])
    nats[FUSED] = {stage: nats[best][stage] for stage in ("native", "aligned", "projected", "kept")}
    nats[FUSED] |= {"selected": float(ahead[in_loss & within].sum()), "in_loss": float(ahead[in_loss].sum())}
    positions[FUSED] = {"paired": int(in_loss.sum()), "no_entry": int((in_loss & ~listed).sum())}
    sizes = np.diff(starts, append=n_bytes)
    return PassageGains(nats, positions, len(own.tokens) - 1, int(sizes[shared].sum()))


def _nats(predictions: Predictions, starts: np.ndarray) -> np.ndarray:
    """float64[U], a model's negative log-likelihood of each segment."""
    return np.bincount(segment_of(predictions, starts)[:-1], predictions.nll[:-1], len(starts))


def _where_paired(fused: FusedSequence) -> Sparse:
    """The distributions of the one model that is fused; none at positions where it has no partner."""
    paired, targets = fused.paired[0], fused.targets
    return Sparse(np.where(paired[:, None], targets.ids, -1), targets.p * paired[:, None], targets.tail * paired)


def _ahead(targets: Sparse, own: Predictions, *, has_tail: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """float64[N - 1], nats by which distributions are ahead of the target at the positions with a next token, minus
    infinity where that token is impossible; and bool[N - 1], true where it has an entry.
    """
    ids, p, tail = targets.ids[:-1], targets.p[:-1], targets.tail[:-1].astype(np.float64)
    gold = np.where(ids == own.tokens[1:, None], p, 0).sum(axis=1, dtype=np.float64)
    listed = gold > 0
    ahead = np.log(np.where(listed, gold, 1.0)) + own.nll[:-1]
    rows = np.flatnonzero(~listed)
    if has_tail:
        in_tail = ~(own.ids[rows, :, None] == ids[rows, None, :]).any(axis=2)
        of_target = own.tail[rows] + np.where(in_tail, np.exp(own.log_p[rows], dtype=np.float64), 0.0).sum(axis=1)
        ahead[rows] = np.log(np.maximum(tail[rows], TAIL_ROUNDING) / np.maximum(of_target, TAIL_ROUNDING))
    else:
        ahead[rows] = -np.inf
    return ahead, listed
