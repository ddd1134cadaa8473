"""What a loss is: one class that says what it needs, what the data loader computes for it, and what it is on logits.

A training minimises lambda * CLM + (1 - lambda) * loss (arXiv 2401.10491, section 3.3, equation 5). A loss is a frozen
dataclass of its settings, registered by name:

    @LOSSES.register("uld", version=1, reference="arXiv 2402.12030")
    @dataclass(frozen=True)
    class ULDLoss(Loss):
        teachers: Sequence[str]

and works in two phases. `requirements` and `identity` use names only, so that a run can be planned without reading a
model. Then `features` computes arrays for the positions of a sequence from stored predictions, in the data loader,
with the vocabularies and maps of `LossResources`; `__call__` computes the loss from logits and these features.

Nothing here imports torch, and modules of losses import it where logits are: a plan does not wait for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np

from fusion.alignment.fuse import Source
from fusion.alignment.selection import score_sources
from fusion.errors import UserError
from fusion.registry import Choice, Registry
from fusion.switches import Switches
from fusion.types import Predictions, SequencePredictions
from fusion.vocabulary.maps import Unit
from fusion.vocabulary.pieces import PIECES, PieceMap
from fusion.vocabulary.token_bytes import Vocabulary, same_ids

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.term import Term

Made = TypeVar("Made")
Balance = Literal["none", "rescale"]
"""Whether a term is brought to the size of CLM before lambda weighs them (see `fusion.losses.objective.Objective`)."""
TeacherWeights = Literal["uniform", "mince"] | Sequence[float]
"""How several teachers become one: their mean, a choice in every passage, or a mean with these weights."""
TAIL_FLOOR = 1e-30
"""Least probability outside the kept entries whose logarithm is taken; met only where nothing is left outside them."""


@dataclass(frozen=True)
class LossRequirements:
    """What a loss needs to be there, by role of the experiment."""

    predictions: Sequence[str] = ()
    """Roles whose stored predictions its features are computed from."""
    temperature: float = 1.0
    """Temperature at which distributions are taken from the stored predictions."""
    k: int | None = None
    """Number of stored entries that are used at a position. Default: all."""
    maps: Sequence[str] = ()
    """Roles whose tokens are mapped onto the target's."""
    map: str = ""
    """Name of the vocabulary map, in the registry of maps."""
    map_on: Unit = "bytes"
    """What the map compares."""
    models: Sequence[str] = ()
    """Roles whose models are held in memory and predict every batch with the target; they need its tokenizer."""
    encodings: Sequence[str] = ()
    """Roles, among those of `predictions`, whose tokens are encoded by the target's tokenizer, and the other way round.
    """


class Encodings(NamedTuple):
    """The tokens of two vocabularies in one another's (`fusion.vocabulary.pieces.encode_tokens`)."""

    of_target: np.ndarray
    """int32[V_target, n]: the first tokens of a role for each of the target's, -1 beyond the last."""
    of_role: np.ndarray
    """int32[V_role, n]: the first tokens of the target for each of the role's."""


@dataclass(frozen=True)
class LossResources:
    """The vocabularies and maps that a loss required."""

    target: str
    """Role that is trained."""
    vocabularies: Mapping[str, Vocabulary]
    """Vocabulary of the target and of every role required."""
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    """int32[V_source] for each role in `LossRequirements.maps`: target ids, see `fusion.vocabulary.maps`."""
    pieces: Mapping[str, PieceMap] = field(default_factory=dict)
    """For each of them whose map is of a kind in `fusion.vocabulary.pieces.PIECES`, what its tokens begin with."""
    encodings: Mapping[str, Encodings] = field(default_factory=dict)
    """For each role in `LossRequirements.encodings`."""

    def source(self, name: str) -> Source:
        """The role for `fuse_sequence`: with its map, or the identity where its token ids are the target's."""
        if name not in self._with_target_ids:
            return Source(name, self.vocabularies[name], self.maps[name], self.pieces.get(name))
        vocabulary, size = self.vocabularies[name], len(self.vocabularies[self.target])
        ids = np.arange(len(vocabulary), dtype=np.int32)
        return Source(name, vocabulary, np.where(ids < size, ids, -1))

    def shared(self, name: str) -> np.ndarray:
        """int32[V_role]: the target's id of each token of the role that both have, one to one; -1 for all others.

        Of several tokens of the role that are mapped to one of the target's an ordinary one is taken before a
        byte-fallback one, and the lowest id before others.
        """

        def make() -> np.ndarray:
            source = self.source(name)
            fallback = np.isin(np.arange(len(source.map)), list(source.vocabulary.byte_fallback))
            order = np.argsort(fallback, kind="stable")
            target_ids, first = np.unique(source.map[order], return_index=True)
            shared = np.full(len(source.map), -1, np.int32)
            shared[order[first]] = target_ids
            return shared

        return self.cached(("shared", name), make)

    def cached(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gives, which depends on the vocabularies, the maps and `key` alone: made once in a process."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    @cached_property
    def _made(self) -> dict[Hashable, Any]:
        return {}

    @cached_property
    def _with_target_ids(self) -> frozenset[str]:
        own = self.vocabularies[self.target]
        return frozenset(name for name, vocabulary in self.vocabularies.items() if same_ids(vocabulary, own))


class TeacherModel(Protocol):
    """A model in memory that is not trained (`fusion.modeling.teacher.Teacher`)."""

    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states [B * L, D] of packed sequences [B, L]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [C, V] of hidden[C, D]."""


class Loss(ABC):
    """A loss beside CLM; subclasses are frozen dataclasses whose fields are its parameters.

    A training divides its sum over the global batch by what it divides CLM's by, the number of CLM labels (next tokens,
    and ends of text), not by the positions at which the loss is taken.

    `__post_init__` refuses names that are not registered; who overrides it calls it.
    """

    def __post_init__(self) -> None:
        self.parts()

    @abstractmethod
    def requirements(self, target: str) -> LossRequirements:
        """What must be there when the role `target` is trained with this loss."""

    @abstractmethod
    def features(
        self, predictions: SequencePredictions, n_bytes: Sequence[int], resources: LossResources
    ) -> dict[str, np.ndarray]:
        """Arrays [N, ...] for the N positions of a sequence, its passages one after the other, by name.

        `predictions` holds for each passage those required, and the target's own, which have no entries unless they
        are required; `n_bytes` are the passages' sizes in UTF-8 bytes. In a batch [B, L, ...] integers are padded with
        -1 and floats with 0. Names other than `input_ids`, `position_ids` and `labels` are free. An array
        `weight`[N, ...] is 0 exactly where the loss of a position is 0 whatever its logits.
        """

    def __call__(self, logits: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        """Weighted nats[N] of logits[N, V], a differentiable function in their dtype.

        `features` are those of the N positions, and `labels`[N], the next token of each (negative for none).
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither __call__ nor term")

    def constants(self, resources: LossResources) -> dict[str, np.ndarray]:
        """Arrays that are the same at all positions, by names that no feature has; `__call__` gets them with these.

        A loss that overrides `term` as well gives a `fusion.losses.term.LossTerm`.
        """
        return {}

    def term(self, batch: Mapping[str, Tensor], teachers: Mapping[str, TeacherModel]) -> Term:
        """This loss at the B * L positions of a batch: a term of `fusion.losses.objective.Objective`.

        `batch` holds input_ids, position_ids and labels [B, L] and the features [B, L, ...]; `teachers` are the models
        required, by role.
        """
        from fusion.losses.term import LossTerm

        return LossTerm(self, flat(batch))

    def parts(self) -> Mapping[str, Choice[Any]]:
        """Registered parts that the loss uses, by parameter. Raises UserError for unknown names."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What names the loss in a fingerprint: registered name, version, every parameter, and the parts it uses.

        Raises UserError for a loss that is not registered.
        """
        part = LOSSES.find(type(self))
        parts = {name: choice.identity() for name, choice in self.parts().items()}
        parameters = asdict(self)  # type: ignore[call-overload]
        return {"name": part.name, "version": part.version, "parameters": {**parameters, **parts}}


@dataclass(frozen=True)
class TeacherLoss(Loss):
    """A loss against teachers, from their stored predictions unless `requirements` says otherwise.

    Raises UserError for no teacher, one that is named twice, weights that are not one non-negative number a teacher
    with a positive sum, and a `temperature`, if it has one, that is not positive.
    """

    teachers: Sequence[str]
    """Roles of the teachers."""
    teacher_weights: TeacherWeights = field(default="uniform", kw_only=True)
    """The loss of a position is the mean over the teachers that are aligned there (`uniform`, or with one number a
    teacher weighted by their shares), or that of the teacher with the least nats per byte of the passage (`mince`)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teachers or len(set(self.teachers)) < len(self.teachers):
            raise UserError(f"teachers is {list(self.teachers)}: name at least one, and each once.")
        check_teacher_weights(self.teacher_weights, self.teachers)
        if not (temperature := getattr(self, "temperature", 1.0)) > 0:
            raise UserError(f"temperature is {temperature}; it must be greater than 0.")

    def requirements(self, target: str) -> LossRequirements:
        return LossRequirements(predictions=list(self.teachers))

    def position_weights(
        self, paired: Sequence[np.ndarray], predictions: SequencePredictions, n_bytes: Sequence[int], target: str
    ) -> np.ndarray:
        """float32[N, S]: the weight of each of S teachers at each position, 0 where it is not `paired` (bool[N] each).

        Weights of a position sum to 1 where a teacher is paired; with `mince` only the passage's teacher can be. A
        teacher that has not read the passage, or whose tokens do not spell it, is not chosen before one that does.
        """
        weight = np.stack(paired, 1).astype(np.float64)
        if self.teacher_weights == "mince":
            scores = score_sources(
                [[passage[name] for name in self.teachers] for passage in predictions],
                [passage[target] for passage in predictions],
                n_bytes,
                names=tuple(self.teachers),
                select_over="passage",
            )
            return (weight * (scores.best()[scores.unit][:, None] == np.arange(len(self.teachers)))).astype(np.float32)
        if not isinstance(self.teacher_weights, str):
            weight *= self.teacher_weights
        total = weight.sum(axis=1, keepdims=True)
        return (weight / np.where(total > 0, total, 1)).astype(np.float32)


LOSSES: Registry[type[Loss]] = Registry(
    "loss",
    "fusellm.losses",
    own={
        "bpm": "fusion.losses.bpm",
        "fusion": "fusion.losses.fusion_loss",
        "gold": "fusion.losses.gold",
        "simct": "fusion.losses.simct",
        "strict": "fusion.losses.strict",
        "xtoken": "fusion.losses.xtoken",
        "top_k_distillation": "fusion.losses.top_k_distillation",
        "online_distillation": "fusion.losses.online_distillation",
        "uld": "fusion.losses.uld",
        "alm": "fusion.losses.alm",
        "infifusion": "fusion.losses.infifusion",
    },
)


def flat(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The features and labels [B * L, ...] of a batch [B, L, ...]."""
    return {name: array.flatten(0, 1) for name, array in batch.items() if name not in ("input_ids", "position_ids")}


def check_map(vocabulary_map: str, switches: Switches) -> None:
    """Raises UserError where the projection does not go with the kind of vocabulary map or with other switches."""
    switches.check_projection()
    if switches.along_text and vocabulary_map not in PIECES:
        raise UserError(
            f"map {vocabulary_map} knows whole tokens only, and projection: path and inside: prefix need to know what "
            f"a token begins with: set map to {' or '.join(PIECES)}, or projection to token and inside to none."
        )


def check_teacher_weights(weights: TeacherWeights, teachers: Sequence[str]) -> None:
    """Raises UserError unless these are weights of these teachers (see `TeacherLoss`)."""
    if isinstance(weights, str):
        if weights not in ("uniform", "mince"):
            raise UserError(f"teacher_weights is {weights!r}: it is uniform, mince, or one number a teacher.")
    elif len(weights) != len(teachers):
        raise UserError(
            f"teacher_weights has {len(weights)} numbers for {len(teachers)} teachers ({', '.join(teachers)}): give "
            "one each."
        )
    elif not (min(weights) >= 0 and sum(weights) > 0):
        raise UserError(f"teacher_weights is {list(weights)}: none may be negative, and one must be positive.")


def has_next(passages: Sequence[Predictions]) -> np.ndarray:
    """bool[N], true at positions with a next token in their passage."""
    lengths = [len(predictions.tokens) for predictions in passages]
    return np.concatenate([np.arange(length) < length - 1 for length in lengths])


def weighted(weight: Tensor, nats: Tensor) -> Tensor:
    """weight * nats, and 0 where the weight is 0, even if nats are infinite or not a number there."""
    return (weight.to(nats.dtype) * nats).where(weight != 0, 0)
