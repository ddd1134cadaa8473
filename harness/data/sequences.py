"""Rows: passages packed for training, with what the target is to learn at each of their positions.

A lesson's arrays are a pure function of stored extractions and maps, made here in the data loader; nothing dense is
built.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from fusion.errors import UserError
from fusion.losses.specs import Lesson
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends, encode, prefix_id
from harness.data.passages import Passages
from harness.data.predictions import PredictionsReader

IGNORED = -100  # what the Trainer does not count as a token


def pack(lengths: Sequence[int], sequence_length: int, *, window: int = 512) -> list[list[int]]:
    """Passages of `lengths` positions in rows of at most `sequence_length`, each row a list of passage indices.

    First fit, the longest first, within consecutive windows of passages: little is wasted, and memory stays bounded.
    The longest passage must fit.
    """
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        open_rows: list[tuple[int, list[int]]] = []  # (positions left, passages)
        for passage in sorted(range(start, min(start + window, len(lengths))), key=lambda i: (-lengths[i], i)):
            for slot, (left, members) in enumerate(open_rows):
                if lengths[passage] <= left:
                    members.append(passage)
                    open_rows[slot] = (left - lengths[passage], members)
                    break
            else:
                open_rows.append((sequence_length - lengths[passage], [passage]))
        rows += [sorted(members) for _, members in open_rows]
    return rows


class PackedSequences(Dataset[dict[str, np.ndarray]]):
    """Rows of `sequence_length` positions, ready for `fusion.modeling.heads.fused_forward`.

    Every passage is `[prefix] + tokens`; its last position's gold token is the end of text where the passage is its
    document's last, and none otherwise. Without `lesson` the same rows are plain continued training; with it,
    `extractions` are those it needs, by role. Beyond the last row there are empty ones, which hold nothing to learn:
    where ranks share rows unevenly, they make up the number.

    Raises:
        UserError: a passage does not fit a row.
    """

    def __init__(
        self,
        passages: Passages,
        tokenizer: Any,
        vocabulary: Vocabulary,
        sequence_length: int,
        lesson: Lesson | None = None,
        extractions: Mapping[str, PredictionsReader] = {},
    ) -> None:
        self._passages = passages
        self._tokenizer = tokenizer
        self._prefix = prefix_id(tokenizer)
        self._eos = tokenizer.eos_token_id
        self._vocabulary = vocabulary
        self._lesson = lesson
        self._extractions = extractions
        self.sequence_length = sequence_length
        self._lengths = lengths = list[int]()
        for passage in range(len(passages)):
            ids = encode(tokenizer, passages.text(passage))
            if max(ids, default=0) >= len(vocabulary):
                raise UserError(
                    f"the target's tokenizer gives token {max(ids)}, but its config.json has a vocabulary of "
                    f"{len(vocabulary)}: put the model's own tokenizer.json beside its weights."
                )
            lengths.append(1 + len(ids))
        longest = int(np.argmax(lengths))
        if lengths[longest] > sequence_length:
            raise UserError(
                f"{passages.name(longest)} is {lengths[longest]} tokens and does not fit a row of {sequence_length}: "
                "lower passages.max_bytes or raise training.sequence_length."
            )
        self.rows = pack(lengths, sequence_length)
        ends_text = sum(bool(last) for last in passages.last) if self._eos is not None else 0
        self.n_tokens = sum(lengths) - len(lengths) + ends_text

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[index] for index in range(len(self)))  # without it an empty row would follow for ever

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One row: input_ids, position_ids, labels [sequence_length] and, with a lesson, its arrays [N, ...]."""
        members, lesson = self.rows[index] if index < len(self.rows) else [], self._lesson
        if lesson is None:
            tokens = [self._tokens(p) for p in members]
            arrays = {}
        else:
            # The arrays of no positions are nobody's but have their names and types.
            readings = [self._readings(p, lesson.target) for p in members or self.rows[0]]
            arrays = lesson.arrays(readings, [int(self._passages.n_bytes[p]) for p in members or self.rows[0]])
            if not members:
                readings, arrays = [], {name: array[:0] for name, array in arrays.items()}
            # Encoding the text takes longer than fusing: the target's own reading holds what it gave.
            tokens = [passage[lesson.target].tokens for passage in readings]
            if [len(t) for t in tokens] != [self._lengths[p] for p in members]:
                raise UserError(
                    f"the extraction of {lesson.target} was made with another tokenizer than the target's own."
                )
        n = sum(len(t) for t in tokens)
        left = self.sequence_length - n
        gold = [self._gold(t, bool(self._passages.last[p])) for t, p in zip(tokens, members, strict=True)]
        # The padding at the end is a passage of its own, which no other passage sees.
        return {
            "input_ids": np.concatenate([*tokens, np.full(left, self._prefix)]),
            "position_ids": np.concatenate([*(np.arange(len(t)) for t in tokens), np.arange(left)]),
            "labels": np.concatenate([*gold, np.full(left, IGNORED)]),
            **arrays,
        }

    def _tokens(self, passage: int) -> np.ndarray:
        return np.array([self._prefix, *encode(self._tokenizer, self._passages.text(passage))])

    def _readings(self, passage: int, target: str) -> dict[str, Predictions]:
        """What was extracted of a passage, and the target's own tokens and ends where nothing of it was."""
        readings = {name: extraction.predictions(passage) for name, extraction in self._extractions.items()}
        if target not in readings:
            tokens = self._tokens(passage)
            ends = byte_ends(tokens[1:], self._vocabulary, self._passages.text(passage).encode("utf-8"))
            readings[target] = Predictions.empty(tokens, np.append(0, ends).astype(np.int32), 0)
        return readings

    def _gold(self, tokens: np.ndarray, last: bool) -> np.ndarray:
        end = self._eos if last and self._eos is not None else IGNORED
        return np.concatenate([tokens[1:], [end]])


def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Rows stacked to [B, L]; a lesson's arrays [N, ...] padded to [B, L, ...], each dimension to the widest row's.

    Integers become int64, padded with -1, all else float32, padded with 0.
    """
    batch = {}
    for name in rows[0]:
        arrays = [row[name] for row in rows]
        shape = (len(rows), len(rows[0]["labels"]), *np.max([a.shape[1:] for a in arrays], axis=0).astype(int))
        integer = np.issubdtype(arrays[0].dtype, np.integer)
        padded = np.full(shape, -1, np.int64) if integer else np.zeros(shape, np.float32)
        for i, array in enumerate(arrays):
            padded[i][tuple(slice(n) for n in array.shape)] = array
        batch[name] = torch.from_numpy(padded)
    return batch
