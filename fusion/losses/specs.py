"""What a target may learn beside its next token, and from whom.

A method asks for a `Learning`: names and settings only, so that a plan reads no model. What it `needs` is made or found
made, and with that `Material` it becomes a `Lesson`: in the data loader, arrays for the positions of a row, a pure
function of stored readings; in the model's forward, from a batch of these arrays, the objective's second term.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, get_args

import numpy as np

from fusion.alignment.fuse import FusedSequence, Source, fuse_sequence
from fusion.alignment.pairing import ALIGNMENTS, same_end
from fusion.alignment.selection import FUSIONS, segment_of, segment_starts
from fusion.errors import UserError, did_you_mean
from fusion.losses.divergences import ANY_TAIL, DIVERGENCES
from fusion.switches import Switches
from fusion.types import Predictions
from fusion.vocabulary.maps import MAPS, Unit
from fusion.vocabulary.token_bytes import Vocabulary, same_ids

if TYPE_CHECKING:
    from torch import Tensor

    from fusion.losses.objective import Term
    from fusion.losses.terms import Teacher

Arrays = dict[str, np.ndarray]
Tail = Literal["bucket", "renormalise", "gold"]
LEAST_TAIL = 1e-8
"""Of a tail that is an outcome. One of exactly 0 is rounding, and the logarithm of 0 would be all that counts."""


@dataclass(frozen=True)
class Needs:
    """What a lesson is made of, by role."""

    extractions: Sequence[str] = ()
    """Whose stored readings it is computed from."""
    temperature: float = 1.0
    """At which distributions are taken from these readings."""
    k: int | None = None
    """Only the k most probable of the entries stored a position; all of them without."""
    maps: Sequence[str] = ()
    """Whose tokens are carried into the target's vocabulary, by `map` on `map_on`."""
    map: str = ""
    map_on: Unit = "bytes"
    models: Sequence[str] = ()
    """Who is held in memory and read while the target is trained; with the target's own tokenizer."""


@dataclass(frozen=True)
class Material:
    """What was needed: the vocabularies of the target and of all roles named, and the maps int32[V_source]."""

    target: str
    vocabularies: Mapping[str, Vocabulary]
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)

    def source(self, name: str) -> Source:
        """A role whose distributions are carried over; one that has the target's ids, by these."""
        vocabulary, own = self.vocabularies[name], self.vocabularies[self.target]
        if same_ids(vocabulary, own):
            ids = np.arange(len(vocabulary), dtype=np.int32)
            return Source(name, vocabulary, np.where(ids < len(own), ids, -1))
        return Source(name, vocabulary, self.maps[name])


class Taught(TypedDict, total=False):
    """The second term, as `fused_forward` takes it: a distribution of few entries, or any other `Term`."""

    ids: Tensor
    p: Tensor
    tail: Tensor
    fusion_weight: Tensor
    term: Term


class Lesson(Protocol):
    """What is learnt, ready for rows and batches."""

    @property
    def target(self) -> str:
        """The role that learns."""

    def arrays(self, readings: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int]) -> Arrays:
        """[N, ...] for the N positions of a row's passages as the target reads them.

        In a batch, integers are padded with -1 and others with 0. `readings` holds for each passage those that were
        needed and the target's own, which has no entries where they were not.
        """

    def taught(self, batch: Mapping[str, Tensor], teachers: Mapping[str, Teacher]) -> Taught:
        """The term of a batch[B, L, ...] of rows with their arrays; `teachers` are the models that were needed."""


class Learning(Protocol):
    """What a method asks a training for. `Context.train` takes any."""

    def needs(self, target: str) -> Needs:
        """What the lesson will be made of."""

    def identity(self) -> dict[str, Any]:
        """What names it in the training's fingerprint, beside the fingerprints of what it is made of."""

    def lesson(self, material: Material) -> Lesson:
        """The lesson."""


@dataclass(frozen=True)
class Fusion:
    """Sources fused to one distribution a position (arXiv 2401.10491): which of them, by which map and switches.

    k: only the k most probable of the entries stored a position; all of them without.
    """

    sources: Sequence[str]
    map: str
    map_on: Unit
    switches: Switches
    k: int | None = None

    def __post_init__(self) -> None:
        MAPS.get(self.map)
        ALIGNMENTS.get(self.switches.alignment)
        FUSIONS.get(self.switches.fusion)

    def needs(self, target: str) -> Needs:
        sources = list(self.sources)
        return Needs(extractions=[target, *sources], k=self.k, maps=sources, map=self.map, map_on=self.map_on)

    def identity(self) -> dict[str, Any]:
        limit = {} if self.k is None else {"k": self.k}
        return {"fusion": {"sources": list(self.sources), **asdict(self.switches), **limit}}

    def lesson(self, material: Material) -> FusedLesson:
        sources = [Source(name, material.vocabularies[name], material.maps[name]) for name in self.sources]
        return FusedLesson(material.target, material.vocabularies[material.target], sources, self.switches)


@dataclass(frozen=True)
class FusedLesson:
    target: str
    vocabulary: Vocabulary
    sources: list[Source]
    switches: Switches

    def arrays(self, readings: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int]) -> Arrays:
        fused = fuse_sequence(
            readings,
            n_bytes,
            target=self.target,
            sources=self.sources,
            target_vocabulary=self.vocabulary,
            switches=self.switches,
        )
        return {
            "fused_ids": fused.targets.ids,
            "fused_p": fused.targets.p,
            "fused_tail": fused.targets.tail,
            "fusion_weight": fused.fusion_weight,
        }

    def taught(self, batch: Mapping[str, Tensor], teachers: Mapping[str, Teacher]) -> Taught:
        return {
            "ids": batch["fused_ids"],
            "p": batch["fused_p"],
            "tail": batch["fused_tail"],
            "fusion_weight": batch["fusion_weight"],
        }


@dataclass(frozen=True)
class Distillation:
    """Divergence from the stored distributions of teachers, each carried over as a source is (arXiv 1503.02531).

    At every position the mean over the teachers that have a partner there. At a temperature T both sides are taken to
    the power 1/T and the divergence is multiplied by T^2, so that its gradient keeps its size.
    Raises UserError for names that are not registered, and for a divergence that needs the mass outside of what is kept
    without it.
    """

    teachers: Sequence[str]
    divergence: str = "forward_kl"
    temperature: float = 1.0
    map: str = "mined"
    map_on: Unit = "bytes"
    alignment: str = "same_end"
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        _check(self.teachers, self.divergence, self.temperature)
        MAPS.get(self.map)
        ALIGNMENTS.get(self.alignment)
        if self.tail not in get_args(Tail):
            hint = did_you_mean(self.tail, get_args(Tail))
            raise UserError(f"tail is {self.tail!r}{hint}; it takes one of {', '.join(get_args(Tail))}.")
        if self.tail != "bucket" and self.divergence not in ANY_TAIL:
            raise UserError(
                f"{self.divergence} compares all outcomes, and tail {self.tail!r} leaves out those beyond the top k: "
                "set tail to bucket, or online to true."
            )

    def needs(self, target: str) -> Needs:
        return Needs(
            extractions=list(self.teachers),
            temperature=self.temperature,
            maps=[name for name in self.teachers if name != target],
            map=self.map,
            map_on=self.map_on,
        )

    def identity(self) -> dict[str, Any]:
        return {"distillation": asdict(self)}

    def lesson(self, material: Material) -> DistilledLesson:
        return DistilledLesson(self, material)


@dataclass(frozen=True)
class DistilledLesson:
    asked: Distillation
    material: Material

    @property
    def target(self) -> str:
        return self.material.target

    def arrays(self, readings: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int]) -> Arrays:
        rows = [self._carried(name, readings, n_bytes) for name in self.asked.teachers]
        width = max(row.targets.ids.shape[1] for row in rows)
        shape = (len(rows[0].gold), len(rows), width)
        ids, p = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
        for s, row in enumerate(rows):
            k = row.targets.ids.shape[1]
            ids[:, s, :k], p[:, s, :k] = row.targets.ids, row.targets.p
        tail = np.stack([row.targets.tail for row in rows], 1)
        return {
            "taught_ids": ids,
            "taught_p": p,
            "taught_tail": np.maximum(tail, LEAST_TAIL) if self.asked.tail == "bucket" else tail,
            "taught_weight": _shares([row.paired[0] & (row.fusion_weight > 0) for row in rows]),
        }

    def _carried(
        self, name: str, readings: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int]
    ) -> FusedSequence:
        """The teacher's distributions at the target's positions, as the fusion of this one source."""
        itself = name == self.target
        switches = Switches(alignment=self.asked.alignment, tail=self.asked.tail, include_target=itself)
        return fuse_sequence(
            readings,
            n_bytes,
            target=self.target,
            sources=[] if itself else [self.material.source(name)],
            target_vocabulary=self.material.vocabularies[self.target],
            switches=switches,
        )

    def taught(self, batch: Mapping[str, Tensor], teachers: Mapping[str, Teacher]) -> Taught:
        from fusion.losses.terms import Outcomes

        ids, p, tail, weight = (batch[f"taught_{n}"].flatten(0, 1) for n in ("ids", "p", "tail", "weight"))
        return {"term": Outcomes(self.asked.divergence, self.asked.temperature, ids, p, tail, weight)}


@dataclass(frozen=True)
class OnlineDistillation:
    """Divergence from teachers that read every batch with the target, over the whole vocabulary; one tokenizer.

    The mean over the teachers, at every position with a next token in its passage. Temperatures as in `Distillation`.
    """

    teachers: Sequence[str]
    divergence: str = "forward_kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check(self.teachers, self.divergence, self.temperature)

    def needs(self, target: str) -> Needs:
        return Needs(models=list(self.teachers))

    def identity(self) -> dict[str, Any]:
        return {"online_distillation": asdict(self)}

    def lesson(self, material: Material) -> WatchedLesson:
        return WatchedLesson(self, material.target)


@dataclass(frozen=True)
class WatchedLesson:
    asked: OnlineDistillation
    target: str

    def arrays(self, readings: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int]) -> Arrays:
        return {"watched": _with_next([passage[self.target] for passage in readings]).astype(np.float32)}

    def taught(self, batch: Mapping[str, Tensor], teachers: Mapping[str, Teacher]) -> Taught:
        from fusion.losses.terms import Watched

        models = [teachers[name] for name in self.asked.teachers]
        hidden = [teacher.hidden(batch["input_ids"], batch["position_ids"]) for teacher in models]
        weight = batch["watched"].flatten() / len(models)
        return {"term": Watched(self.asked.divergence, self.asked.temperature, models, hidden, weight)}


@dataclass(frozen=True)
class SortedDistillation:
    """Universal logit distillation: teacher's and target's probabilities sorted, whatever tokens they belong to.

    The Wasserstein-1 distance of the sorted vectors is the sum of their differences (arXiv 2402.12030, section 3.2).
    Of what is stored, the k greatest are compared one by one and the mass of the rest with the rest; with k the
    vocabulary that is all. Positions are paired by the byte at which the text before them ends, where the published
    code counts tokens from the start. The mean over the teachers that have a partner at a position.
    """

    teachers: Sequence[str]

    def __post_init__(self) -> None:
        _check(self.teachers)

    def needs(self, target: str) -> Needs:
        return Needs(extractions=list(self.teachers))

    def identity(self) -> dict[str, Any]:
        return {"uld": asdict(self)}

    def lesson(self, material: Material) -> SortedLesson:
        return SortedLesson(self, material.target)


@dataclass(frozen=True)
class SortedLesson:
    asked: SortedDistillation
    target: str

    def arrays(self, readings: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int]) -> Arrays:
        p, tail, paired = zip(*(self._partners(name, readings) for name in self.asked.teachers), strict=True)
        width = max(x.shape[1] for x in p)
        p = [np.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in p]
        return {"sorted_p": np.stack(p, 1), "sorted_tail": np.stack(tail, 1), "sorted_weight": _shares(paired)}

    def _partners(
        self, name: str, readings: Sequence[Mapping[str, Predictions]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """float32[N, k] what the teacher says at each of the target's positions, float32[N] its tail, and bool[N]."""
        p, tail, paired = [], [], []
        for passage in readings:
            predictions, own = passage[name], passage[self.target]
            at = same_end(predictions.ends, own.ends)
            paired.append((at >= 0) & _with_next([own]) & (not predictions.skipped))
            p.append(np.exp(predictions.log_p)[at])
            tail.append(predictions.tail[at])
        return np.concatenate(p), np.concatenate(tail), np.concatenate(paired)

    def taught(self, batch: Mapping[str, Tensor], teachers: Mapping[str, Teacher]) -> Taught:
        from fusion.losses.terms import Sorted

        return {"term": Sorted(*(batch[f"sorted_{n}"].flatten(0, 1) for n in ("p", "tail", "weight")))}


@dataclass(frozen=True)
class ChunkDistillation:
    """Approximate likelihood matching: the likelihood of the same bytes, however each tokenizer cuts them.

    A chunk lies between consecutive byte ends that teacher and target share. Its likelihood p under the teacher (the
    stored nats of its own tokens) and q under the target are two binary outcomes, the chunk and anything else, and are
    compared by KL(p^(1/T) || q^(1/T)) times T (arXiv 2503.20083, section 3, with f the KL divergence). T grows, the
    term tends to b - a + a log(a / b) of the chunk's nats a and b; the factor keeps it from vanishing on the way. What
    the paper adds against tokenisation bias (chunks whose outcomes the tokenizers do not agree on are left out) needs
    whole distributions and is not done. The mean over the teachers.
    """

    teachers: Sequence[str]
    temperature: float = 100.0

    def __post_init__(self) -> None:
        _check(self.teachers, temperature=self.temperature)

    def needs(self, target: str) -> Needs:
        return Needs(extractions=list(self.teachers))

    def identity(self) -> dict[str, Any]:
        return {"alm": asdict(self)}

    def lesson(self, material: Material) -> ChunkLesson:
        return ChunkLesson(self, material.target)


@dataclass(frozen=True)
class ChunkLesson:
    asked: ChunkDistillation
    target: str

    def arrays(self, readings: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int]) -> Arrays:
        chunks, nats = zip(*(self._chunks(name, readings, n_bytes) for name in self.asked.teachers), strict=True)
        return {"chunk": np.stack(chunks, 1), "chunk_nats": np.stack(nats, 1)}

    def _chunks(
        self, name: str, readings: Sequence[Mapping[str, Predictions]], n_bytes: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """int32[N] the chunk, counted over the row, that each position's next token is in, -1 for none; float32[N] that
        chunk's nats under the teacher.
        """
        numbers, sums, first = [], [], 0
        for passage, size in zip(readings, n_bytes, strict=True):
            predictions, own = passage[name], passage[self.target]
            starts = segment_starts([predictions, own], size)
            theirs, ours = (segment_of(r, starts)[:-1] for r in (predictions, own))
            nats = np.bincount(theirs, predictions.nats[:-1], len(starts))
            # The last one is a chunk if both models' tokens spell the text to its end.
            known = np.ones(len(starts), bool)
            known[-1] = size > 0 and predictions.ends[-1] == own.ends[-1] == size
            used = known[ours] & (not predictions.skipped)
            numbers.append(np.append(np.where(used, ours + first, -1), -1))
            sums.append(np.append(np.where(used, nats[ours], 0), 0))
            first += len(starts)
        return np.concatenate(numbers).astype(np.int32), np.concatenate(sums).astype(np.float32)

    def taught(self, batch: Mapping[str, Tensor], teachers: Mapping[str, Teacher]) -> Taught:
        from fusion.losses.terms import Chunks

        chunk, nats = batch["chunk"], batch["chunk_nats"].flatten(0, 1)
        rows, length = chunk.shape[:2]
        # Numbers of their own for the rows of a batch; a row has no more chunks than positions.
        first = length * chunk.new_tensor(range(rows))[:, None, None]
        gold = batch["labels"].clamp(min=-1).flatten()
        return {"term": Chunks(self.asked.temperature, gold, (chunk + first).where(chunk >= 0, -1).flatten(0, 1), nats)}


def _check(teachers: Sequence[str], divergence: str = "forward_kl", temperature: float = 1.0) -> None:
    if not teachers or len(set(teachers)) < len(teachers):
        raise UserError(f"teachers is {list(teachers)}: name at least one, and each once.")
    DIVERGENCES.get(divergence)
    if not temperature > 0:
        raise UserError(f"temperature is {temperature}; it must be greater than 0.")


def _with_next(readings: Sequence[Predictions]) -> np.ndarray:
    """bool[N], whether the passage goes on after the position."""
    return np.concatenate(
        [np.arange(len(predictions.tokens)) < len(predictions.tokens) - 1 for predictions in readings]
    )


def _shares(paired: Sequence[np.ndarray]) -> np.ndarray:
    """float32[N, S], each teacher's part in the mean over those that are paired[S][N]."""
    stacked = np.stack(paired, 1)
    return (stacked / np.maximum(stacked.sum(axis=1, keepdims=True), 1)).astype(np.float32)
