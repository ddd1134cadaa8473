"""Chunks of text between consecutive byte ends that a teacher and the target share, as positions of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fusion.alignment.selection import segment_of, segment_starts
from fusion.losses.loss import flat
from fusion.types import SequencePredictions

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.term import LossTerm


class SharedChunks(NamedTuple):
    """C chunks of a sequence, in its order; positions are counted over the sequence, of the target and of the teacher.

    A chunk's positions are those whose next tokens spell it. Text that either model's tokens do not spell, and passages
    that the teacher skipped, are in no chunk.
    """

    target: np.ndarray
    """int64[C, 2]: the chunk's first and last position of the target."""
    teacher: np.ndarray
    """int64[C, 2]: the same of the teacher."""
    passage: np.ndarray
    """int64[C]: the passage that it is in."""

    @property
    def single(self) -> np.ndarray:
        """bool[C], true for chunks that are one token of either."""
        found: np.ndarray = (self.target[:, 0] == self.target[:, 1]) & (self.teacher[:, 0] == self.teacher[:, 1])
        return found

    def merged(self, group: np.ndarray) -> SharedChunks:
        """Runs of chunks of one `group`[C] as one chunk each, those of group -1 left out; a group is in one passage."""
        kept = group >= 0
        _, first, count = np.unique(group[kept], return_index=True, return_counts=True)
        last = first + count - 1
        target, teacher = self.target[kept], self.teacher[kept]
        return SharedChunks(
            np.stack([target[first, 0], target[last, 1]], 1),
            np.stack([teacher[first, 0], teacher[last, 1]], 1),
            self.passage[kept][first],
        )


def shared_chunks(name: str, target: str, predictions: SequencePredictions, n_bytes: Sequence[int]) -> SharedChunks:
    """The chunks of the teacher `name` and of the role `target` in the passages of a sequence."""
    found, n_target, n_teacher = [], 0, 0
    for number, (passage, size) in enumerate(zip(predictions, n_bytes, strict=True)):
        teacher, own = passage[name], passage[target]
        starts = segment_starts([teacher, own], size)
        # The last segment is a chunk only if both models' tokens spell the text to its end.
        spelled = size > 0 and teacher.byte_ends[-1] == own.byte_ends[-1] == size
        chunks = np.arange(0 if teacher.skipped else len(starts) - (not spelled))
        sides = []
        for read, first in ((own, n_target), (teacher, n_teacher)):
            chunk_of = segment_of(read, starts)[:-1]  # the last position has no next token
            begin, end = (np.searchsorted(chunk_of, chunks, side=side) for side in ("left", "right"))
            sides.append(np.stack([begin, end - 1], 1) + first)
        found.append((*sides, np.full(len(chunks), number)))
        n_target, n_teacher = n_target + len(own.tokens), n_teacher + len(teacher.tokens)
    return SharedChunks(*(np.concatenate(arrays) for arrays in zip(*found, strict=True)))


def chunk_of_positions(chunks: np.ndarray, n: int) -> np.ndarray:
    """int32[n]: the chunk that each position is in, -1 for none; `chunks` int64[C, 2] has first and last positions."""
    result = np.full(n, -1, np.int32)
    lengths = chunks[:, 1] - chunks[:, 0] + 1
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    result[np.repeat(chunks[:, 0], lengths) + offset] = np.repeat(np.arange(len(chunks)), lengths)
    return result


def sums_of(values: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """float64[C]: the sum of values[M] over the positions of each chunk."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    result: np.ndarray = total[chunks[:, 1] + 1] - total[chunks[:, 0]]
    return result


def chunk_term(
    loss: Callable[[Tensor, Mapping[str, Tensor]], Tensor], batch: Mapping[str, Tensor], **features: Tensor
) -> LossTerm:
    """The loss at a batch of which no chunk is cut, with more `features`[B, L, ...].

    `chunk` int[B, L, S] holds the chunk that each position is in, of each of S teachers, -1 for none. The term's is
    numbered over the batch.
    """
    from torch.nn.functional import pad

    from fusion.losses.term import LossTerm

    chunk = batch["chunk"]
    # Numbers of their own for the sequences of a batch; a sequence has no more chunks than positions.
    sequences, length = chunk.shape[:2]
    first = length * chunk.new_tensor(range(sequences))[:, None, None]
    chunk = (chunk + first).where(chunk >= 0, -1).flatten(0, 1)
    # A chunk of logits may begin where no teacher's chunk goes on from the position before.
    goes_on = (chunk[1:] == chunk[:-1]) & (chunk[1:] >= 0)
    cuts = pad(~goes_on.any(1), (1, 0), value=True)[: len(chunk)]
    return LossTerm(loss, {**flat({**batch, **features}), "chunk": chunk}, cuts)


def chunk_sums(values: Tensor, chunk: Tensor) -> Tensor:
    """[N]: at each position the sum of values[N] over the positions of its chunk[N]."""
    numbers, place = chunk.unique(return_inverse=True)
    return values.new_zeros(len(numbers)).index_add(0, place, values)[place]
