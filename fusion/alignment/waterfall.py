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
- taught: the same over all positions, those of segments with a gap between partners included.

Log-likelihoods are full: a true next token without an entry has its part of the tail, which is spread evenly over the
tokens without entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusion.alignment.fuse import UNALIGNED, FusedSequence, Source, fuse_sequence
from fusion.alignment.selection import MIXTURE, segment_of, segment_starts
from fusion.switches import Switches
from fusion.types import Predictions, Sparse
from fusion.vocabulary.token_bytes import Vocabulary

STAGES = ("native", "aligned", "projected", "kept", "selected", "taught")
FUSED = "fused"
"""The row of the distribution that the target is trained on."""
LEAST_TAIL = 1e-6
"""A tail is stored in float16; below this it is rounding and its logarithm means nothing."""


@dataclass(frozen=True)
class PassageGains:
    """The waterfall of one passage, by the name of the model; `FUSED` sums over all that take part."""

    nats: Mapping[str, Mapping[str, float]]
    """By stage: nats by which the model is ahead of the target. Of `FUSED` there are `selected` and `taught` only; of a
    source of a mixture (AvgCE) these two are NaN, since what is mixed is nobody's."""
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
) -> PassageGains:
    """What is left of each model's lead over the target in one passage, step by step.

    Args:
        passage: the predictions of the target and of all sources by name, none of them skipped, with all entries.
        n_bytes: UTF-8 bytes of the passage.
        sources: as for `fuse_sequence`, without the target.
        switches: those that the target is trained with.
        k: number of entries that the target is trained with. Default: all.

    Raises:
        UserError: as `fuse_sequence`.
    """
    by_name = {source.name: source for source in sources}
    models = [target, *by_name]
    own, vocabulary = passage[target], len(target_vocabulary)
    starts = segment_starts([passage[name] for name in models], n_bytes)
    shared = np.ones(len(starts), bool)
    # Text that a tokenizer does not spell belongs to the last segment, where models then predict different bytes.
    shared[-1] = all(passage[name].ends[-1] == n_bytes for name in models)
    here = segment_of(own, starts)[:-1]

    def fuse(names: Sequence[str], changed: Switches, entries: int | None) -> FusedSequence:
        return fuse_sequence(
            [passage if entries is None else {name: one.top(entries) for name, one in passage.items()}],
            [n_bytes],
            target=target,
            sources=[by_name[name] for name in names if name != target],
            target_vocabulary=target_vocabulary,
            switches=changed,
        )

    def ahead(fused: FusedSequence) -> np.ndarray:
        """Nats by which fused distributions are ahead of the target at each position with a next token."""
        return _log_likelihood(fused.targets, own.tokens[1:], vocabulary) + own.nats[:-1]

    def in_segments(values: np.ndarray, which: np.ndarray) -> float:
        return float(values[which[here]].sum(dtype=np.float64))

    own_nats = _nats(own, starts)
    nats, positions, whole = dict[str, dict[str, float]](), dict[str, dict[str, int]](), dict[str, np.ndarray]()
    for name in models:
        alone = replace(switches, include_target=name == target, fusion="mince")
        all_stored = replace(alone, true_token="always", tail="bucket", unmapped="tail")
        stored = fuse([name], all_stored, None)
        kept = stored if k is None and alone == all_stored else fuse([name], alone, k)
        paired, still = stored.paired[0][:-1], kept.paired[0][:-1]
        whole[name] = shared & (np.bincount(here, ~paired, len(starts)) == 0)
        lead = own_nats - _nats(passage[name], starts)
        nats[name] = {
            "native": float(lead[shared].sum()),
            "aligned": float(lead[whole[name]].sum()),
            "projected": in_segments(ahead(stored), whole[name]),
            # Where nothing is left the target learns the text itself, and nothing of the source.
            "kept": in_segments(np.where(still, ahead(kept), 0.0), whole[name]),
        }
        listed = (kept.targets.ids[:-1] == own.tokens[1:, None]).any(axis=1)
        positions[name] = {
            "paired": int(paired.sum()),
            "inside": int(stored.inside[0][:-1].sum()),
            "no_entry": int((still & ~listed).sum()),
        }
    fused = fuse(list(by_name), switches, k)
    gain, chosen = ahead(fused), fused.chosen[:-1]
    complete, names = np.stack([whole[name][here] for name in fused.names]), np.array(fused.names)
    mixed = bool((chosen == MIXTURE).any())
    for name in models:
        of_it = (chosen >= 0) & (names[np.maximum(chosen, 0)] == name)
        positions[name]["chosen"] = int(of_it.sum())
        nats[name]["selected"] = np.nan if mixed else float(gain[of_it & whole[name][here]].sum())
        nats[name]["taught"] = np.nan if mixed else float(gain[of_it].sum())
    taught = chosen != UNALIGNED
    within = np.where(chosen >= 0, complete[np.maximum(chosen, 0), np.arange(len(chosen))], complete.any(axis=0))
    nats[FUSED] = {"selected": float(gain[taught & within].sum()), "taught": float(gain[taught].sum())}
    listed = (fused.targets.ids[:-1] == own.tokens[1:, None]).any(axis=1)
    positions[FUSED] = {"paired": int(taught.sum()), "no_entry": int((taught & ~listed).sum())}
    sizes = np.diff(starts, append=n_bytes)
    return PassageGains(nats, positions, len(own.tokens) - 1, int(sizes[shared].sum()))


def _nats(predictions: Predictions, starts: np.ndarray) -> np.ndarray:
    """float64[U], a model's negative log-likelihood of each segment."""
    return np.bincount(segment_of(predictions, starts)[:-1], predictions.nats[:-1], len(starts))


def _log_likelihood(targets: Sparse, gold: np.ndarray, vocabulary: int) -> np.ndarray:
    """float64[N - 1], log-probability of the next tokens: of their entries, or of their part of the tail."""
    ids, p, tail = targets.ids[:-1], targets.p[:-1], targets.tail[:-1]
    own = np.where(ids == gold[:, None], p, 0).sum(axis=1, dtype=np.float64)
    rest = np.maximum(vocabulary - (ids >= 0).sum(axis=1), 1)
    return np.asarray(np.log(np.where(own > 0, own, np.maximum(tail, LEAST_TAIL) / rest)))
