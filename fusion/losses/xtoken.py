"""X-Token: the target's distribution in the teacher's vocabulary, by a sparse projection matrix (arXiv 2605.21699)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fusion.errors import UserError
from fusion.losses.chunks import shared_chunks
from fusion.losses.divergences import DIVERGENCES
from fusion.losses.loss import LOSSES, TAIL_FLOOR, LossRequirements, LossResources, TeacherLoss, weighted
from fusion.losses.shared_vocabulary import LEAST_TAIL, shared_outcomes, split_entries, stacked
from fusion.registry import Choice, PartName
from fusion.types import SequencePredictions
from fusion.vocabulary.maps import MAPS
from fusion.vocabulary.sparse_projection import SparseProjection, sparse_projection

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-10
"""What the published code adds to projected probabilities: a teacher's token that no row reaches costs it 23 nats."""


@LOSSES.register("xtoken", version=1, reference="arXiv 2605.21699, with P-KL and H-KL as in NeMo-RL")
@dataclass(frozen=True)
class XTokenLoss(TeacherLoss):
    """P-KL: T^2 D(p, q W) in the teacher's vocabulary. H-KL: by name where W pairs tokens, by rank elsewhere.

    W[V_target, V_teacher] writes each token of the target as up to four of the teacher's (see `sparse_projection`). The
    loss is taken where a chunk of text between byte ends that both share begins. The published code averages
    distributions over a chunk's positions, which top k do not allow; for a chunk of one token both are the same.

    P-KL: the outcomes are the teacher's kept tokens, and everything else.
    H-KL: T^2 (sum_v p_v log(p_v / q_v) over pairs of tokens, nothing renormalised, + sum_i |p_(i) - q_(i)| over all
    others, each sorted and cut to the shorter side). Pairs that are not kept are one outcome, to which the teacher's
    tail is attributed. At k = V both are exact.
    """

    objective: Literal["p_kl", "h_kl"] = "p_kl"
    divergence: PartName = "forward_kl"
    """D, in the registry of divergences; of the pairs in H-KL."""
    temperature: float = 1.0
    """T, at which the predictions must have been extracted."""
    projection: Literal["paper", "published"] = "paper"
    """W is made of the target's tokens, encoded by the teacher's tokenizer, or of the teacher's, too, the other way
    round. The published code's last column of an arbitrary token (its "scale trick") is not offered."""
    unmapped: Literal["bucket", "renormalise"] = "bucket"
    """Mass of the target on tokens without a row of W (P-KL): it belongs to everything else, or q W is renormalised and
    1e-10 added, as in the published code."""
    least_weight: float = 0.6
    """First weight from which on W pairs two tokens (H-KL; published code 0.6, and 1 in its variant of GOLD)."""
    most_unpaired: int = 8192
    """Greatest number of ranks that are compared (H-KL)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.least_weight <= 1:
            raise UserError(f"least_weight is {self.least_weight}; it must be greater than 0 and at most 1.")

    def requirements(self, target: str) -> LossRequirements:
        maps = [name for name in self.teachers if name != target]
        return LossRequirements(list(self.teachers), self.temperature, maps=maps, map="em", encodings=maps)

    def parts(self) -> Mapping[str, Choice[Any]]:
        return {"map": MAPS.choose("em"), "divergence": DIVERGENCES.choose(self.divergence)}

    def matrix(self, resources: LossResources, name: str) -> SparseProjection:
        """W of a teacher; the identity where it has the target's token ids."""
        same, n_target = resources.shared(name), len(resources.vocabularies[resources.target])
        if name == resources.target:
            return sparse_projection(same, np.full((n_target, 1), -1, np.int32))
        of_target, of_teacher = resources.encodings[name]
        return sparse_projection(same, of_target, of_teacher if self.projection == "published" else None)

    def constants(self, resources: LossResources) -> dict[str, np.ndarray]:
        """P-KL: the entries of W, row int64[S, E], column int64[S, E] and value float32[S, E] (0 at pads), empty
        bool[S, V], the target's tokens without one, and n_teacher int64[S], the teachers' tokens. H-KL: shared
        bool[S, V], the paired tokens, and n_unpaired int64[S], how many of the others are compared.
        """
        matrices = [self.matrix(resources, name) for name in self.teachers]
        ids = np.arange(len(resources.vocabularies[resources.target]))
        if self.objective == "h_kl":
            pairs = [matrix.pairs(self.least_weight) for matrix in matrices]
            shared = np.stack([np.isin(ids, image) for image in pairs])
            of_teacher = np.array([(image < 0).sum() for image in pairs])
            n_unpaired = np.minimum(np.minimum((~shared).sum(1), of_teacher), self.most_unpaired)
            return {"shared": shared, "n_unpaired": n_unpaired}
        size = max(len(matrix.entries[0]) for matrix in matrices)
        padded = [[np.pad(array, (0, size - len(array))) for array in matrix.entries] for matrix in matrices]
        row, column, value = (np.stack(arrays) for arrays in zip(*padded, strict=True))
        return {
            "row": row,
            "column": column,
            "value": value,
            "empty": np.stack([matrix.weights[:, 0] == 0 for matrix in matrices]),
            "n_teacher": np.array([matrix.n_columns for matrix in matrices]),
        }

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """ids int32[N, S, K] (of the teacher for P-KL, of the target for H-KL), p float32[N, S, K], rest float32
        [N, S, R], tail and weight float32[N, S].
        """
        n = sum(len(passage[resources.target].tokens) for passage in predictions)
        entries, paired = [], []
        for name in self.teachers:
            chunks = shared_chunks(name, resources.target, predictions, n_bytes)
            partner = np.full(n, -1, np.int32)
            partner[chunks.target[:, 0]] = chunks.teacher[:, 0]
            image = np.arange(len(resources.vocabularies[name]), dtype=np.int32)
            if self.objective == "h_kl":
                key = ("pairs", name, self.projection, self.least_weight)
                image = resources.cached(key, partial(self._pairs, resources, name))
            entries.append(split_entries(name, predictions, resources, partner, image))
            paired.append(partner >= 0)
        return {
            "ids": stacked([read.ids for read in entries], -1),
            "p": stacked([read.p for read in entries], 0),
            "rest": stacked([read.rest for read in entries], 0),
            "tail": np.stack([read.tail for read in entries], 1).astype(np.float32),
            "weight": self.position_weights(paired, predictions, n_bytes, resources.target),
        }

    def _pairs(self, resources: LossResources, name: str) -> np.ndarray:
        return self.matrix(resources, name).pairs(self.least_weight)

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        part = self._projected if self.objective == "p_kl" else self._hybrid
        nats = logits.new_zeros(len(logits))
        for s in range(len(self.teachers)):
            of_teacher = {name: features[name][:, s] for name in ("ids", "p", "rest", "tail", "weight")}
            of_teacher |= {name: features[name][s] for name in _CONSTANTS[self.objective]}
            nats = nats + weighted(of_teacher["weight"], part(logits / self.temperature, of_teacher))
        return self.temperature**2 * nats

    def _projected(self, logits: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Nats[C] of P-KL from one teacher's features and constants."""
        import torch

        q, pads, size = logits.softmax(-1), given["ids"] < 0, int(given["n_teacher"])
        at = given["ids"].long().masked_fill(pads, size)  # pads point beyond the vocabulary
        projected = q.new_zeros(len(q), size + 1).index_add(
            1, given["column"], q[:, given["row"]] * given["value"].to(q.dtype)
        )
        kept, others = projected.gather(1, at), projected.scatter(1, at, 0).sum(1)
        if self.unmapped == "bucket":
            others = others + (q * given["empty"]).sum(1)
        else:
            total = projected.sum(1) + FLOOR
            kept, others = kept / total[:, None] + FLOOR, others / total
        q = torch.cat([kept, others[:, None]], 1)
        p = torch.cat([given["p"].to(q.dtype), given["tail"].to(q.dtype).clamp(min=LEAST_TAIL)[:, None]], 1)
        absent = torch.nn.functional.pad(pads, (0, 1))
        log_p, log_q = (x.clamp(min=TAIL_FLOOR).log().masked_fill(absent, -math.inf) for x in (p, q))
        return DIVERGENCES.choose(self.divergence).value(log_p, log_q)

    def _hybrid(self, logits: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """Nats[C] of H-KL from one teacher's features and constants."""
        from torch.nn.functional import pad

        shared, n = given["shared"], int(given["n_unpaired"])
        outcomes = shared_outcomes(logits, given["ids"], given["p"], given["tail"], shared)
        rest = given["rest"][:, :n]
        top = logits.softmax(-1).masked_fill(shared, 0).topk(n).values
        rest = pad(rest, (0, n - rest.shape[1]))
        return DIVERGENCES.choose(self.divergence).value(*outcomes) + (rest - top).abs().sum(1)


_CONSTANTS = {"p_kl": ("row", "column", "value", "empty", "n_teacher"), "h_kl": ("shared", "n_unpaired")}
