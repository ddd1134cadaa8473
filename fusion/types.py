"""The data that fusion works on: predictions of one model about a passage, and sparse distributions.

A *passage* is a UTF-8 text. A model reads `[prefix] + its tokens`, M positions. Position 0 is the prefix token; the
distribution at a position is that of the next token, so that position M-1 has no next token within the passage.

Source: "Knowledge Fusion of Large Language Models", ICLR 2024, arXiv 2401.10491, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

LEAST_STD = 1e-3
"""Least standard deviation that logits are divided by: of equal ones it is 0, and all differences are rounding."""


@dataclass(frozen=True)
class Predictions:
    """Predictions of one model at the M positions of one passage: its k most probable next tokens at each."""

    tokens: np.ndarray
    """int32[M], token ids of the passage, the prefix first."""
    byte_ends: np.ndarray
    """int32[M], byte at which each token ends in the passage; byte_ends[0] = 0, and -1 from the first token on that
    does not spell the text."""
    ids: np.ndarray
    """int32[M, k], ids of the k most probable next tokens in the model's own vocabulary, the most probable first."""
    log_p: np.ndarray
    """float32[M, k], their log-probabilities in nats."""
    tail: np.ndarray
    """float32[M], probability outside the k entries."""
    nll: np.ndarray
    """float32[M], negative log-likelihood -log p(next token of the passage) in nats; 0 at M-1."""
    prefix_nll: np.ndarray | None = None
    """float32[P], for every next token of the passage, of n bytes, n - 1 values in nats: -log of the probability
    that the next token begins with its first byte, its first two, and so on. None where that is not known."""
    spread: np.ndarray | None = None
    """float32[M, 2], the standard deviation s of the logits over the vocabulary, `LEAST_STD` at least, and the
    logarithm of the sum of p^(1/s) over it: p^(1/s) divided by that sum is the softmax of the standardised logits. None
    where that is not known."""
    skipped: bool = False
    """True if only `tokens` and `byte_ends` are known: the logits were not finite, or nothing was extracted."""

    def top(self, k: int) -> Predictions:
        """The same with the k most probable entries only; the probability of dropped entries is added to the tail."""
        dropped = np.exp(self.log_p[:, k:]).sum(1)
        return replace(self, ids=self.ids[:, :k], log_p=self.log_p[:, :k], tail=self.tail + dropped)

    @classmethod
    def empty(cls, tokens: np.ndarray, byte_ends: np.ndarray, k: int) -> Predictions:
        """Predictions of a passage of which only tokens and byte ends are known; every array is 0."""
        zeros, zero = np.zeros((len(tokens), k), np.float32), np.zeros(len(tokens), np.float32)
        return cls(tokens, byte_ends, zeros.astype(np.int32), zeros, zero, zero, skipped=True)


SequencePredictions = Sequence[Mapping[str, Predictions]]
"""Predictions of several models for the passages of one packed sequence: for each passage, by the model's role."""


@dataclass(frozen=True)
class Sparse:
    """N distributions over one vocabulary: K entries each and the mass outside them."""

    ids: np.ndarray
    """int32[N, K], token ids; -1 where a position has fewer than K entries (pads last)."""
    p: np.ndarray
    """float32[N, K], their probabilities; 0 at pads."""
    tail: np.ndarray
    """float32[N], probability outside `ids`."""
