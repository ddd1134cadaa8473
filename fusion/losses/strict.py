"""The strict objective: shared tokens only, where teacher and target predict the same text (arXiv 2610.08448)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import UserError
from fusion.losses.chunks import chunk_of_positions, chunk_sums, chunk_term, shared_chunks, sums_of
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.loss import LOSSES, LossRequirements, LossResources, TeacherLoss, TeacherModel, weighted
from fusion.losses.shared_vocabulary import shared_outcomes, split_entries, stacked
from fusion.registry import Choice, PartName
from fusion.types import SequencePredictions
from fusion.vocabulary.maps import MAPS, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.term import Term


@LOSSES.register("strict", version=1, reference="arXiv 2610.08448")
@dataclass(frozen=True)
class StrictLoss(TeacherLoss):
    """D(p, q) over the tokens of both, where the next token of teacher and target begins and ends at the same bytes.

    p and q are renormalised over the shared tokens, of which control tokens are none. From the top k: the outcomes are
    the kept shared tokens, and all other shared ones together, to which the teacher's tail is attributed. At k = V
    there is no such rest, and the loss is exact.
    """

    divergence: PartName = "reverse_kl"
    """D, in the registry of divergences."""
    renormalise: bool = True
    """Whether p and q are distributions over shared tokens only. Else the last outcome is everything that is not kept,
    shared or not, and its probability is known."""
    top: int | None = None
    """The compact form: only so many shared tokens, the target's most probable of those kept (of all in the paper),
    renormalised on both sides. Default: all that are kept, and the rest."""
    span_weight: float = 0.0
    """Factor of (log q - log p)^2 of the probabilities of every other chunk of text between byte ends that both share.
    """
    map_on: Unit = "bytes"
    """What makes two tokens the same: their bytes or their strings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top is not None and self.top < 1:
            raise UserError(f"top is {self.top}: it is at least 1, or leave it out.")
        if self.top is not None and not self.renormalise:
            raise UserError(
                "top renormalises over the tokens that it takes: set renormalise to true, or leave top out."
            )

    def requirements(self, target: str) -> LossRequirements:
        maps = [name for name in self.teachers if name != target]
        return LossRequirements(list(self.teachers), maps=maps, map="em", map_on=self.map_on)

    def parts(self) -> Mapping[str, Choice[Any]]:
        return {"map": MAPS.choose("em"), "divergence": DIVERGENCES.choose(self.divergence)}

    def constants(self, resources: LossResources) -> dict[str, np.ndarray]:
        """shared bool[S, V]: the target's tokens that each teacher has, or all where nothing is renormalised."""
        ids = np.arange(len(resources.vocabularies[resources.target]))
        images = [np.isin(ids, text_image(resources, name)) | (not self.renormalise) for name in self.teachers]
        return {"shared": np.stack(images)}

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """ids int32[N, S, K], p float32[N, S, K] and tail float32[N, S] where the next tokens are the same text, with
        weight float32[N, S]; of all other chunks chunk int32[N, S] (-1 for none) and teacher_nll
        float32[N, S].
        """
        n = sum(len(passage[resources.target].tokens) for passage in predictions)
        found: list[tuple[np.ndarray, ...]] = []
        for name in self.teachers:
            chunks = shared_chunks(name, resources.target, predictions, n_bytes)
            single, partner = chunks.single, np.full(n, -1, np.int32)
            partner[chunks.target[single, 0]] = chunks.teacher[single, 0]
            read = split_entries(name, predictions, resources, partner, text_image(resources, name))
            tail = read.tail if self.renormalise else read.tail + read.rest.sum(1)
            spans = chunk_of_positions(chunks.target[~single], n)
            nll = sums_of(np.concatenate([passage[name].nll for passage in predictions]), chunks.teacher[~single])
            paired = (partner >= 0) | ((spans >= 0) & (self.span_weight > 0))
            found.append((read.ids, read.p, tail, spans, np.append(nll, 0)[spans], paired))
        ids, p, tails, chunk, teacher_nll, learns = zip(*found, strict=True)
        return {
            "ids": stacked(ids, -1),
            "p": stacked(p, 0),
            "tail": np.stack(tails, 1).astype(np.float32),
            "chunk": np.stack(chunk, 1),
            "teacher_nll": np.stack(teacher_nll, 1).astype(np.float32),
            "weight": self.position_weights(learns, predictions, n_bytes, resources.target),
        }

    def term(self, batch: Mapping[str, Tensor], teachers: Mapping[str, TeacherModel]) -> Term:
        return chunk_term(self, batch)

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        from torch.nn.functional import cross_entropy

        divergence = DIVERGENCES.choose(self.divergence).value
        gold = features["labels"].clamp(min=-1)
        nats = logits.new_zeros(len(logits))
        for s in range(len(self.teachers)):
            ids, p, tail, chunk, weight = (features[name][:, s] for name in ("ids", "p", "tail", "chunk", "weight"))
            log_p, log_q = shared_outcomes(logits, ids, p, tail, features["shared"][s])
            if self.top is not None:
                log_q, best = log_q[:, :-1].topk(min(self.top, ids.shape[1]))
                log_p = log_p.gather(1, best)
            if self.renormalise:
                log_p, log_q = (x - x.logsumexp(1, keepdim=True) for x in (log_p, log_q))
            nats = nats + weighted(weight * (chunk < 0), divergence(log_p, log_q))
            if self.span_weight:
                own = cross_entropy(logits, gold, ignore_index=-1, reduction="none")
                apart = (chunk_sums(own, chunk) - features["teacher_nll"][:, s]) ** 2
                length = chunk_sums(own.new_ones(own.shape), chunk)
                nats = nats + weighted(weight * (chunk >= 0), self.span_weight * apart / length)
        return nats


def text_image(resources: LossResources, name: str) -> np.ndarray:
    """int32[V_teacher]: `LossResources.shared` of the tokens that stand for text, -1 for control tokens."""
    spelled = np.array([token is not None for token in resources.vocabularies[name].token_bytes])
    return np.where(spelled, resources.shared(name), -1)
