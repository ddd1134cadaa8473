"""Approximate likelihood matching: the likelihoods of the same bytes under any tokenizers (arXiv 2503.20083)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusion.alignment.selection import segment_of, segment_starts
from fusion.losses.loss import (
    LOSSES,
    LossResources,
    TeacherLoss,
    TeacherModel,
    flat,
    weighted,
)
from fusion.types import SequencePredictions

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.term import Term


@LOSSES.register("alm", version=2, reference="arXiv 2503.20083, section 3")
@dataclass(frozen=True)
class ALMLoss(TeacherLoss):
    """T KL(p^(1/T) || q^(1/T)) of the binary outcomes "this chunk" and "anything else".

    A chunk lies between consecutive byte ends that teacher and target share. Its likelihood is p under the teacher
    (from the stored nats of the teacher's tokens) and q under the target (section 3, with f the KL divergence). As T
    grows, the loss tends to b - a + a log(a / b) of the chunk's nats a = -log p and b = -log q; the factor T keeps it
    from vanishing on the way. The paper's correction of tokenisation bias, which leaves out chunks whose outcomes the
    tokenizers do not agree on, needs whole distributions and is not done. A chunk's nats are spread evenly over its
    positions. The sum over chunks is divided by the number of CLM labels, so that its share falls as chunks get longer.
    """

    temperature: float = 100.0
    """T."""

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """chunk int32[N, S], the chunk that each position's next token is in, counted over the sequence, -1 for none;
        teacher_nll float32[N, S], that chunk's nats under the teacher; weight float32[N, S], the teacher's.
        """
        teachers = [_chunks(name, resources.target, predictions, n_bytes) for name in self.teachers]
        chunk, nll = (np.stack(array, 1) for array in zip(*teachers, strict=True))
        # One weight for all positions of a chunk: a teacher counts in the passages that it has read.
        read = [
            np.concatenate([np.full(len(p[resources.target].tokens), not p[name].skipped) for p in predictions])
            for name in self.teachers
        ]
        weight = self.position_weights(read, predictions, n_bytes, resources.target)
        return {"chunk": chunk, "teacher_nll": nll, "weight": np.where(chunk >= 0, weight, 0)}

    def term(self, batch: Mapping[str, Tensor], teachers: Mapping[str, TeacherModel]) -> Term:
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
        return LossTerm(self, {**flat(batch), "chunk": chunk}, cuts)

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        from torch.nn.functional import cross_entropy

        gold, chunk, teacher_nll = features["labels"].clamp(min=-1), features["chunk"], features["teacher_nll"]
        weight = features["weight"]
        own = cross_entropy(logits, gold, ignore_index=-1, reduction="none")
        nats = own.new_zeros(own.shape)
        for s in range(chunk.shape[1]):
            numbers, place, count = chunk[:, s].unique(return_inverse=True, return_counts=True)
            b = own.new_zeros(len(numbers)).index_add(0, place, own)
            a = own.new_zeros(len(numbers)).index_copy(0, place, teacher_nll[:, s].to(own.dtype))
            divergence = binary_divergence(a, b, self.temperature) / count
            nats = nats + weighted(weight[:, s], divergence[place])
        return nats


def _chunks(
    name: str, target: str, predictions: SequencePredictions, n_bytes: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """int32[N] the chunk of each position's next token and float32[N] its nats under the teacher (see `features`)."""
    numbers, sums, first = [], [], 0
    for passage, size in zip(predictions, n_bytes, strict=True):
        teacher, own = passage[name], passage[target]
        starts = segment_starts([teacher, own], size)
        of_teacher, of_own = (segment_of(r, starts)[:-1] for r in (teacher, own))
        nats = np.bincount(of_teacher, teacher.nll[:-1], len(starts))
        # The last segment is a chunk only if both models' tokens spell the text to its end.
        known = np.ones(len(starts), bool)
        known[-1] = size > 0 and teacher.byte_ends[-1] == own.byte_ends[-1] == size
        used = known[of_own] & (not teacher.skipped)
        numbers.append(np.append(np.where(used, of_own + first, -1), -1))
        sums.append(np.append(np.where(used, nats[of_own], 0), 0))
        first += len(starts)
    return np.concatenate(numbers).astype(np.int32), np.concatenate(sums).astype(np.float32)


def binary_divergence(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """T KL(p || q) of the two outcomes of probability p = exp(-a / T) and 1 - p, with b for q; a and b in nats."""
    # Below 1e-6 nats a chunk cannot be told from a certain one, and the logarithm of 1 - q would be infinite.
    a, b = (x.clamp(min=1e-6) / temperature for x in (a, b))
    p, not_p = (-a).exp(), -(-a).expm1()
    return temperature * (p * (b - a) + not_p * (not_p.log() - (-(-b).expm1()).log()))
