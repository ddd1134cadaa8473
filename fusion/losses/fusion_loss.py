"""The loss of FuseLLM: cross-entropy from the fused distribution of the sources (arXiv 2401.10491, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.alignment.fuse import fuse_sequence
from fusion.alignment.pairing import ALIGNMENTS
from fusion.alignment.selection import FUSIONS
from fusion.losses.loss import LOSSES, Loss, LossRequirements, LossResources, TeacherModel, check_map, flat
from fusion.registry import Choice
from fusion.switches import Switches
from fusion.types import SequencePredictions
from fusion.vocabulary.maps import MAPS, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.sparse_cross_entropy import SparseCrossEntropy


@LOSSES.register("fusion", version=3, reference="arXiv 2401.10491, equations 3 to 5")
@dataclass(frozen=True)
class FusionLoss(Loss):
    """Cross-entropy - sum_v p_v log q_v of the target's q from the fused p, one distribution a position.

    Its sum over positions is divided by the number of CLM labels, which include the ends of documents.

    Raises UserError for a map, an alignment or a fusion function that is not registered, and for a map that does
    not go with the switches.
    """

    sources: Sequence[str]
    """Roles whose distributions are fused, beside the target's own (see `Switches.include_target`)."""
    map: str = "first_piece"
    """Vocabulary map from each source to the target, a name in the registry of maps."""
    map_on: Unit = "bytes"
    """What the map compares."""
    switches: Switches = field(default_factory=Switches)
    """How distributions are aligned, projected and fused."""
    k: int | None = None
    """Number of stored entries that are used at a position. Default: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_map(self.map, self.switches)

    def requirements(self, target: str) -> LossRequirements:
        sources = list(self.sources)
        return LossRequirements(
            predictions=[target, *sources], k=self.k, maps=sources, map=self.map, map_on=self.map_on
        )

    def parts(self) -> Mapping[str, Choice[Any]]:
        return {
            "map": MAPS.choose(self.map),
            "alignment": ALIGNMENTS.choose(self.switches.alignment),
            "fusion": FUSIONS.choose(self.switches.fusion),
        }

    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """ids int32[N, K], p float32[N, K] and tail float32[N] of the fused distributions, and weight float32[N]."""
        fused = fuse_sequence(
            predictions,
            n_bytes,
            target=resources.target,
            sources=[resources.source(name) for name in self.sources],
            target_vocabulary=resources.vocabularies[resources.target],
            switches=self.switches,
        )
        return {
            "ids": fused.targets.ids,
            "p": fused.targets.p,
            "tail": fused.targets.tail,
            "weight": fused.fusion_weight,
        }

    def term(self, batch: Mapping[str, Tensor], teachers: Mapping[str, TeacherModel]) -> SparseCrossEntropy:
        """The cross-entropy with its gradient written by hand, which needs no copies of the logits."""
        from fusion.losses.sparse_cross_entropy import SparseCrossEntropy

        features = flat(batch)
        return SparseCrossEntropy(features["ids"], features["p"], features["tail"], features["weight"])
