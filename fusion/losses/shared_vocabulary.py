"""A teacher's stored distributions, split into tokens that the target shares with it and others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusion.alignment.fuse import respaced, stored_entries
from fusion.alignment.path import TokenSequence
from fusion.alignment.projection import project_entries, true_token_last
from fusion.losses.loss import TAIL_FLOOR, LossResources
from fusion.types import SequencePredictions

if TYPE_CHECKING:
    from torch import Tensor

LEAST_TAIL = 1e-8
"""Least probability of a tail that is an outcome: an exact 0 comes from rounding, and its logarithm is infinite."""


class SplitEntries(NamedTuple):
    """A teacher's distributions at N positions of the target; all 0 where it has no position."""

    ids: np.ndarray
    """int32[N, K]: ids of the entries that have an image, in its vocabulary; -1 pads."""
    p: np.ndarray
    """float64[N, K]: their probabilities."""
    rest: np.ndarray
    """float64[N, R]: the probabilities of the entries without one, greatest first."""
    tail: np.ndarray
    """float64[N]: the probability outside all entries."""


def split_entries(
    name: str, predictions: SequencePredictions, resources: LossResources, partner: np.ndarray, image: np.ndarray
) -> SplitEntries:
    """The entries of the teacher at its positions `partner` int[N] (-1 for none), split by `image` int32[V_teacher].

    The token that really follows is an entry always, with the probability that is stored for it. At a passage's first
    position an entry is what the target's tokenizer would write there, with or without a space before it.
    """
    ids, p = stored_entries(name, predictions)
    read = [passage[name] for passage in predictions]
    follows = np.concatenate([np.append(passage.tokens[1:], -1) for passage in read])
    ids, p = true_token_last(ids, p, follows, np.concatenate([passage.nll for passage in read]))
    vocabulary, own = resources.vocabularies[name], [passage[resources.target] for passage in predictions]
    target = [replace(passage, skipped=False) for passage in own]
    ids = respaced(
        ids,
        partner,
        TokenSequence.of(read, vocabulary).ends,
        TokenSequence.of(target, resources.vocabularies[resources.target]).ends,
        vocabulary,
    )
    size = max(int(image.max(initial=-1)) + 1, 1)
    shared_ids, shared_p = project_entries(ids, p, partner, image, vocabulary_size=size, duplicates="sum")
    others = np.where((ids >= 0) & (image[np.maximum(ids, 0)] < 0), p, 0)
    width = int((others > 0).sum(1).max(initial=0))
    rest = np.where(partner[:, None] >= 0, -np.sort(-others, 1)[:, :width][partner], 0)
    tail = np.where(partner >= 0, np.maximum(1 - shared_p.sum(1) - rest.sum(1), 0), 0)
    return SplitEntries(shared_ids, shared_p, rest, tail)


def stacked(arrays: Sequence[np.ndarray], pad: float) -> np.ndarray:
    """[N, S, K] of S arrays [N, K_s], padded to the widest; float64 becomes float32."""
    width = max(array.shape[1] for array in arrays)
    padded = [np.pad(array, ((0, 0), (0, width - array.shape[1])), constant_values=pad) for array in arrays]
    found = np.stack(padded, 1)
    return found.astype(np.float32) if found.dtype == np.float64 else found


def shared_outcomes(logits: Tensor, ids: Tensor, p: Tensor, tail: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [C, K + 1] under the teacher and the target: of K kept ids, and of all other shared tokens.

    Those of the target are of logits[C, V]; `shared` bool[V] are the tokens that both have, kept ids[C, K] (-1 pads)
    among them. The teacher's tail[C] is taken for the probability of other shared tokens. An outcome that cannot be
    (a pad; the others where all shared ones are kept) is -inf in both. The mass of tokens that are not shared is
    missing.
    """
    import torch

    p, tail = p.to(logits.dtype), tail.to(logits.dtype).clamp(min=LEAST_TAIL)
    # Relative to the greatest: a loss should not be rounded like the logits it is a difference of.
    logits = logits - logits.detach().amax(-1, keepdim=True)
    total = logits.logsumexp(-1)
    pads, size = ids < 0, logits.shape[1]
    others = shared.expand(len(logits), size).clone()
    others = torch.cat([others, others[:, :1]], 1).scatter_(1, ids.masked_fill(pads, size), False)[:, :size]
    none = ~others.any(1)
    outside = logits.masked_fill(~(others | none[:, None]), -math.inf).logsumexp(1) - total
    kept = logits.gather(1, ids.clamp(min=0)) - total[:, None]
    log_p = torch.cat([p.clamp(min=TAIL_FLOOR).log(), tail.log()[:, None]], 1)
    log_q = torch.cat([kept, outside.clamp(min=math.log(TAIL_FLOOR))[:, None]], 1)
    absent = torch.cat([pads, none[:, None]], 1)
    return log_p.masked_fill(absent, -math.inf), log_q.masked_fill(absent, -math.inf)
