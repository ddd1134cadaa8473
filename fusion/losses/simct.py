"""SimCT: shared tokens and the shortest texts that both tokenizers can write as outcomes (arXiv 2605.07711)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusion.losses.chunks import SharedChunks, chunk_of_positions, chunk_sums, chunk_term, shared_chunks, sums_of
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.loss import LOSSES, LossRequirements, LossResources, TeacherLoss, TeacherModel, weighted
from fusion.losses.shared_vocabulary import shared_outcomes, split_entries, stacked
from fusion.registry import Choice, PartName
from fusion.types import SequencePredictions
from fusion.vocabulary.maps import MAPS, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.term import Term


@LOSSES.register("simct", version=1, reference="arXiv 2605.07711, sections 3.1 to 3.4")
@dataclass(frozen=True)
class SimCTLoss(TeacherLoss):
    """D(p, q) over the shared tokens and, in a chunk of several tokens, the chunk itself as one more outcome.

    It is taken once in each chunk of text between byte ends that teacher and target share, at its first position. The
    chunk counts with the geometric mean of its tokens' probabilities (their mean log-likelihood); p and q are
    normalised over these outcomes. From the top k: the shared tokens that are not kept are one outcome, to which the
    teacher's tail is attributed. At k = V there is none, and the loss is exact.

    The published code averages logits where the paper averages log-likelihoods. That depends on a constant which no
    probability tells, so that it cannot be done here.
    """

    divergence: PartName = "reverse_kl"
    """D, in the registry of divergences."""
    segments: Literal["shared_ends", "published"] = "shared_ends"
    """Where chunks end. `published`: only after text that is one token of either, so that a chunk may hold many shared
    byte ends; what follows the last such token of a passage is left out."""
    map_on: Unit = "bytes"
    """What makes two tokens the same: their bytes, or their strings as in the published code."""

    def requirements(self, target: str) -> LossRequirements:
        maps = [name for name in self.teachers if name != target]
        return LossRequirements(list(self.teachers), maps=maps, map="em", map_on=self.map_on)

    def parts(self) -> Mapping[str, Choice[Any]]:
        return {"map": MAPS.choose("em"), "divergence": DIVERGENCES.choose(self.divergence)}

    def constants(self, resources: LossResources) -> dict[str, np.ndarray]:
        """shared bool[S, V]: the target's tokens that each teacher has."""
        ids = np.arange(len(resources.vocabularies[resources.target]))
        return {"shared": np.stack([np.isin(ids, resources.shared(name)) for name in self.teachers])}

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """ids int32[N, S, K], p float32[N, S, K] and tail float32[N, S] at the first position of each chunk, unit
        float32[N, S] the chunk's own probability there (0 where it is a token of either), at_first float32[N, S] the
        weight of its loss, chunk int32[N, S], and weight float32[N, S], that weight at all positions of a chunk.
        """
        n = sum(len(passage[resources.target].tokens) for passage in predictions)
        found: list[tuple[np.ndarray, ...]] = []
        for name in self.teachers:
            chunks = shared_chunks(name, resources.target, predictions, n_bytes)
            chunks = chunks if self.segments == "shared_ends" else _published(chunks)
            partner, units = np.full(n, -1, np.int32), np.zeros(n)
            partner[chunks.target[:, 0]] = chunks.teacher[:, 0]
            read = split_entries(name, predictions, resources, partner, resources.shared(name))
            nll = sums_of(np.concatenate([passage[name].nll for passage in predictions]), chunks.teacher)
            mean = nll / (chunks.teacher[:, 1] - chunks.teacher[:, 0] + 1)
            units[chunks.target[:, 0]] = np.where(chunks.single, 0, np.exp(-mean))
            found.append((read.ids, read.p, read.tail, units, chunk_of_positions(chunks.target, n), partner >= 0))
        ids, p, tail, unit, chunk, first = zip(*found, strict=True)
        weight = self.position_weights([c >= 0 for c in chunk], predictions, n_bytes, resources.target)
        return {
            "ids": stacked(ids, -1),
            "p": stacked(p, 0),
            "tail": np.stack(tail, 1).astype(np.float32),
            "unit": np.stack(unit, 1).astype(np.float32),
            "chunk": np.stack(chunk, 1),
            "weight": weight,
            "at_first": np.where(np.stack(first, 1), weight, np.float32(0)),
        }

    def term(self, batch: Mapping[str, Tensor], teachers: Mapping[str, TeacherModel]) -> Term:
        return chunk_term(self, batch)

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        import torch
        from torch.nn.functional import cross_entropy

        divergence = DIVERGENCES.choose(self.divergence).value
        own = cross_entropy(logits, features["labels"].clamp(min=-1), ignore_index=-1, reduction="none")
        nats = own.new_zeros(own.shape)
        for s in range(len(self.teachers)):
            ids, p, tail, unit, chunk, at_first = (
                features[name][:, s] for name in ("ids", "p", "tail", "unit", "chunk", "at_first")
            )
            log_p, log_q = shared_outcomes(logits, ids, p, tail, features["shared"][s])
            mean = chunk_sums(own, chunk) / chunk_sums(torch.ones_like(own), chunk)
            units = torch.stack([unit.to(own.dtype).log(), (-mean).masked_fill(unit == 0, -torch.inf)])
            log_p, log_q = (
                torch.cat([x, one[:, None]], 1) for x, one in zip((log_p, log_q), units.unbind(), strict=True)
            )
            log_p, log_q = (x - x.logsumexp(1, keepdim=True) for x in (log_p, log_q))
            nats = nats + weighted(at_first, divergence(log_p, log_q))
        return nats


def _published(chunks: SharedChunks) -> SharedChunks:
    """The segments of the published code: each ends behind a chunk that is one token of either."""
    single = chunks.single
    group = np.cumsum(single) - single
    # What follows the last such chunk of a passage is dropped, and no segment goes on into the next passage.
    singles = np.flatnonzero(single)
    ends = np.append(singles, -1)[np.searchsorted(singles, np.arange(len(single)))]
    complete = (ends >= 0) & (chunks.passage[np.maximum(ends, 0)] == chunks.passage)
    return chunks.merged(np.where(complete, group, -1))
