"""Packed sequences: several passages in one sequence of training, with a loss's features at each position.

Features are a pure function of stored predictions and vocabulary maps, computed here in the data loader; nothing dense
is built.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fusion.errors import UserError
from fusion.types import Predictions, SequencePredictions
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import prefix_id
from harness.data.passages import Passages
from harness.data.predictions import PredictionsReader
from harness.data.tokens import Tokens

IGNORED = -100
"""Label of a position without a next token, which the Trainer does not count as a token."""

Features = Callable[[SequencePredictions, Sequence[int]], Mapping[str, np.ndarray]]
"""From the predictions of a sequence's passages and their sizes in bytes to arrays [N, ...] for its N positions."""


def pack(lengths: Sequence[int], sequence_length: int, *, window: int = 512) -> list[list[int]]:
    """Packs passages of `lengths` positions into sequences of at most `sequence_length`: lists of passage indices.

    First fit, the longest first, within consecutive windows of passages, so that little is wasted and memory stays
    bounded. The longest passage must fit.
    """
    sequences: list[list[int]] = []
    for start in range(0, len(lengths), window):
        open_sequences: list[tuple[int, list[int]]] = []  # (positions left, passages)
        for passage in sorted(range(start, min(start + window, len(lengths))), key=lambda i: (-lengths[i], i)):
            for slot, (left, members) in enumerate(open_sequences):
                if lengths[passage] <= left:
                    members.append(passage)
                    open_sequences[slot] = (left - lengths[passage], members)
                    break
            else:
                open_sequences.append((sequence_length - lengths[passage], [passage]))
        sequences += [sorted(members) for _, members in open_sequences]
    return sequences


class PackedSequences(Dataset[dict[str, np.ndarray]]):
    """Sequences of `sequence_length` positions, ready for `fusion.modeling.heads.fused_forward`.

    Every passage is `[prefix] + tokens` (see `prefix_id`), where `tokens` are stored. The gold token of its last
    position is the end of text where the passage is its document's last, and none otherwise. Without `features` this
    is plain continued training; with them, `readers` give the predictions that they are computed from, by role, and
    `target` is the role that is trained. Beyond the last sequence there are empty ones without any label or feature,
    which make up the number where ranks share sequences unevenly. Passages that do not fit a sequence or the model's
    `context` (tokens; None: any length) are skipped: their indices are `skipped`. With a `sample` only these passages
    take part, by their indices.

    Raises:
        UserError: no passage fits, or the tokenizer does not fit the model.
    """

    def __init__(
        self,
        passages: Passages,
        tokens: Tokens,
        tokenizer: Any,
        vocabulary: Vocabulary,
        sequence_length: int,
        features: Features | None = None,
        readers: Mapping[str, PredictionsReader] = {},
        target: str = "target",
        context: int | None = None,
        prefix: str | None = None,
        sample: Sequence[int] | None = None,
    ) -> None:
        self._passages = passages
        self._tokens = tokens
        self._prefix = prefix_id(tokenizer, prefix)
        self._eos = tokenizer.eos_token_id
        self._features = features
        self._readers = readers
        self._target = target
        self.sequence_length = sequence_length
        if tokens.largest_id >= len(vocabulary):
            raise UserError(
                f"the target's tokenizer gives token {tokens.largest_id}, but its config.json has a vocabulary of "
                f"{len(vocabulary)}: put the model's own tokenizer.json beside its weights."
            )
        taken = np.arange(len(passages)) if sample is None else np.asarray(sample)
        lengths = 1 + tokens.counts[taken]
        self.longest = min(sequence_length, context or sequence_length)
        self._taken = taken
        self.skipped: list[int] = taken[lengths > self.longest].tolist()
        fitting = taken[lengths <= self.longest]
        if not len(fitting):
            raise UserError(
                f"every passage is longer than {self.longest} tokens, the least of training.sequence_length and the "
                "model's context: lower passages.max_bytes or raise training.sequence_length."
            )
        packed = pack(lengths[lengths <= self.longest].tolist(), sequence_length)
        # Flat arrays: lists of millions of passages would take a hundred bytes each, in every process of the loader.
        self._packed = fitting[np.fromiter(chain.from_iterable(packed), np.int64, len(fitting))]
        self._starts = np.cumsum([0, *map(len, packed)])
        ends_text = int(passages.last[fitting].sum()) if self._eos is not None else 0
        self.n_tokens = int(tokens.counts[fitting].sum(dtype=np.int64)) + ends_text

    def one_passage_each(self) -> "PackedSequences":
        """The same passages, each in a sequence of its own that is as long as the longest of them."""
        alone = copy(self)
        alone._starts = np.arange(len(self._packed) + 1)
        alone.sequence_length = 1 + int(self._tokens.counts[self._packed].max())
        return alone

    def members(self, index: int) -> list[int]:
        """The passages of a sequence, by their indices."""
        members: list[int] = self._packed[self._starts[index] : self._starts[index + 1]].tolist()
        return members

    def skipped_sentence(self) -> str | None:
        """One sentence on the passages that are not trained on because they are too long; None where all are."""
        if not self.skipped:
            return None
        share = self._passages.n_bytes[self.skipped].sum() / self._passages.n_bytes[self._taken].sum()
        return (
            f"{len(self.skipped):,} of {len(self._taken):,} passages ({share:.2%} of the text) are longer than "
            f"{self.longest:,} tokens and are not trained on (first {self._passages.name(self.skipped[0])})."
        )

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[index] for index in range(len(self)))  # by default iteration would go on with empty sequences

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One sequence: input_ids, position_ids, labels [sequence_length], and features [N, ...] of its N positions."""
        members = self.members(index) if index < len(self) else []
        features: Mapping[str, np.ndarray] = {}
        if self._features is None:
            tokens = [self._ids(p) for p in members]
        else:
            # An empty sequence has features of no positions, whose names, types and widths are those of another's.
            like = members or self.members(0)
            predictions = [self._predictions(p) for p in like]
            features = self._features(predictions, [int(self._passages.n_bytes[p]) for p in like])
            if not members:
                predictions, features = [], {name: array[:0] for name, array in features.items()}
            tokens = [passage[self._target].tokens for passage in predictions]
            if [len(t) for t in tokens] != (1 + self._tokens.counts[members]).tolist():
                raise UserError(
                    f"the extraction of {self._target} was made with another tokenizer than the target's own."
                )
        n = sum(len(t) for t in tokens)
        left = self.sequence_length - n
        gold = [self._gold(t, bool(self._passages.last[p])) for t, p in zip(tokens, members, strict=True)]
        # The padding at the end is a passage of its own, which no other passage sees.
        return {
            "input_ids": np.concatenate([*tokens, np.full(left, self._prefix)]),
            "position_ids": np.concatenate([*(np.arange(len(t)) for t in tokens), np.arange(left)]),
            "labels": np.concatenate([*gold, np.full(left, IGNORED)]),
            **features,
        }

    def _ids(self, passage: int) -> np.ndarray:
        return np.concatenate([[self._prefix], self._tokens.ids(passage)])

    def _predictions(self, passage: int) -> dict[str, Predictions]:
        """The stored predictions of a passage, and the target's tokens and byte ends if its own are not stored."""
        predictions = {name: reader.predictions(passage) for name, reader in self._readers.items()}
        if self._target not in predictions:
            ends = np.append(0, self._tokens.byte_ends(passage)).astype(np.int32)
            predictions[self._target] = Predictions.empty(self._ids(passage), ends, 0)
        return predictions

    def _gold(self, tokens: np.ndarray, last: bool) -> np.ndarray:
        end = self._eos if last and self._eos is not None else IGNORED
        return np.concatenate([tokens[1:], [end]])


def draw(n: int, share: float, seed: int) -> list[int] | None:
    """The indices of a `share` of `n` passages (one at least), drawn at random; None for all of them."""
    if share >= 1:
        return None
    chosen = np.random.default_rng(seed).choice(n, max(1, round(share * n)), replace=False)
    return sorted(chosen.tolist())


def collate(sequences: Sequence[dict[str, np.ndarray]]) -> dict[str, Any]:
    """A batch of sequences [B, L]; features [N, ...] are padded to [B, L, ...], each dimension to the widest.

    Integers become int64, padded with -1; all else becomes float32, padded with 0. `passage_lengths` are lists of the
    lengths of each sequence's passages, so that nobody has to ask a GPU for them.
    """
    batch: dict[str, Any] = {
        "passage_lengths": [
            np.diff(np.append(np.flatnonzero(s["position_ids"] == 0), len(s["position_ids"]))).tolist()
            for s in sequences
        ]
    }
    for name in sequences[0]:
        arrays = [sequence[name] for sequence in sequences]
        shape = (len(arrays), len(sequences[0]["labels"]), *np.max([a.shape[1:] for a in arrays], axis=0).astype(int))
        integer = np.issubdtype(arrays[0].dtype, np.integer)
        padded = np.full(shape, -1, np.int64) if integer else np.zeros(shape, np.float32)
        for i, array in enumerate(arrays):
            padded[i][tuple(slice(n) for n in array.shape)] = array
        batch[name] = torch.from_numpy(padded)
    return batch
