"""The protocol of a method: what it is given (`Context`, `Parameters`) and what it returns (`Candidate`, `Ensemble`).

A method is a function of (context, parameters), registered by the decorator `baselines.registry.method`. It imports
nothing of the harness. Everything expensive (training, predictions, validation loss) it asks of its context, which
finds it in the store or makes it. The same function therefore also plans: in a dry run the context returns artifacts
that do not exist yet, so a method must not open files outside of `Context.make`.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler

from fusion.losses.loss import Balance, Loss

Need = Literal["training", "same tokenizer", "same architecture", "teacher"]
"""What a method requires of the experiment and its models."""


@dataclass(frozen=True)
class Reference:
    """Annotates a parameter whose value is a name, with the kinds of things that it may name.

    role: the unchanged model of a role. row: the candidate of another row. model: any other model, by catalogue name,
    hub id or path. Where a role and a row have one name, the role is meant.
    """

    kinds: tuple[Literal["role", "row", "model"], ...]

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "format": " or ".join(self.kinds)}


Role = Annotated[str, Reference(("role",))]
"""A parameter that names a role of the experiment. Names are checked when the configuration is validated."""
Row = Annotated[str, Reference(("row",))]
"""A parameter that names another row, whose candidate `Context.candidate` gives."""
RoleOrRow = Annotated[str, Reference(("role", "row"))]
"""A parameter that names a role or another row."""


class Parameters(BaseModel):
    """Base class of every method's parameters. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)

    def references(self) -> list[tuple[str, Reference]]:
        """Every name that these parameters mention, with what it may refer to: the values of `Role`, `Row` and such."""
        references: list[tuple[str, Reference]] = []
        for key, info in type(self).model_fields.items():
            value = getattr(self, key)
            names = [value] if isinstance(value, str) else value or []
            for part in [*info.metadata, *_metadata(info.annotation)]:
                if isinstance(part, Reference):
                    references += [(name, part) for name in names]
        return references


def _metadata(annotation: Any) -> Iterator[Any]:
    """The metadata of all `Annotated` types inside an annotation."""
    yield from getattr(annotation, "__metadata__", ())
    for part in get_args(annotation):
        yield from _metadata(part)


@dataclass(frozen=True)
class Tuning:
    """How settings of a row were chosen: by pilots, and the likelihood that they give validation text."""

    names: tuple[str, ...]
    tried: tuple[tuple[tuple[float, ...], float], ...]
    """Of each pilot the values of the settings, and nats per byte; infinity if it diverged, NaN if not known yet."""
    chosen: tuple[float, ...]
    every: bool
    """Whether every combination was tried; else one setting after the other."""

    @property
    def known(self) -> bool:
        """False in a plan that cannot know the choice."""
        return not any(math.isnan(nll) for _, nll in self.tried)

    def sentence(self) -> str:
        """What was chosen of what, with the bits per byte of every pilot."""
        bits = [f"{nll / math.log(2):.4f}" if math.isfinite(nll) else "diverged" for _, nll in self.tried]
        where = "bits per byte of validation text at a fifth of the training text"
        if len(self.names) == 1:
            values = ", ".join(f"{value:g}" for (value,), _ in self.tried)
            return f"{self.names[0]} {self.chosen[0]:g} of {values} ({', '.join(bits)} {where})"
        chosen = ", ".join(f"{name} {value:g}" for name, value in zip(self.names, self.chosen, strict=True))
        curve = "; ".join(
            f"{', '.join(f'{value:g}' for value in values)}: {one}"
            for (values, _), one in zip(self.tried, bits, strict=True)
        )
        how = "every combination" if self.every else "one setting after the other"
        return f"{chosen} ({how}; {', '.join(self.names)}: {where} are {curve})"


@dataclass(frozen=True)
class Candidate:
    """A model that can be evaluated: a checkpoint folder, identified by the fingerprint of what made it."""

    folder: Path
    fingerprint: str
    seeded: bool
    """True if it depends on the seed, so that its row is made once per seed."""
    training: Path | None = None
    """The training artifact; None for a model that was not trained."""
    curve: "Artifact | None" = field(default=None, compare=False)
    """The held-out curve of the training, whose folder need not exist; None where none is measured."""
    role: str = "target"
    """The role whose precision, batch size and loading options the model is run with."""
    shape: "Path | Mapping[str, Any] | None" = field(default=None, compare=False)
    """What is known of the architecture before `folder` exists, for checks in a plan: a checkpoint with the same
    architecture and tokenizer, or values of config.json and `tokenizer`, a name that is equal for equal tokenizers."""
    tuning: "Tuning | None" = field(default=None, compare=False)
    """How its settings were chosen, where validation text has done so."""

    @property
    def known_shape(self) -> "Path | Mapping[str, Any] | None":
        """`folder` if it exists, else `shape` if that is known (a folder only if it exists)."""
        if self.folder.exists():
            return self.folder
        return None if isinstance(self.shape, Path) and not self.shape.exists() else self.shape

    @property
    def checkpoints(self) -> "Sequence[Candidate]":
        """The one checkpoint."""
        return [self]


@dataclass(frozen=True)
class Member:
    """A model of an ensemble, with its weight."""

    name: str
    """The role or the row that it is."""
    candidate: Candidate
    weight: float


@dataclass(frozen=True)
class Ensemble:
    """Models that answer together and are evaluated as one; there is no single checkpoint."""

    members: tuple[Member, ...]
    """The first is the pivot, in whose tokens text is read and written; the weights sum to 1."""
    combine: Literal["probabilities", "logits", "vote"]
    map: str
    """Kind of the vocabulary map for members whose tokenizer differs from the pivot's."""
    fingerprint: str
    seeded: bool
    training: None = None
    curve: None = None
    tuning: None = None

    @property
    def checkpoints(self) -> Sequence[Candidate]:
        """The members' checkpoints, the pivot's first."""
        return [member.candidate for member in self.members]


@dataclass(frozen=True)
class Artifact:
    """A folder of the store, complete (in a plan: not there yet), and the fingerprint of what made it."""

    folder: Path
    fingerprint: str


class Context(Protocol):
    """What a method is given. Everything it makes is an artifact: made once and shared by all rows that ask for it."""

    seed: int
    label: str
    """The label of the row."""

    @property
    def sources(self) -> Sequence[str]:
        """Names of the experiment's sources, in its order."""

    def model(self, role: str) -> Candidate:
        """The unchanged model of a role (`target`, `teacher` or a source's name), or any other model by its own name.

        Raises UserError for a name that is neither.
        """

    def candidate(self, name: str) -> Candidate:
        """What a `Reference` names: a role's model, the candidate of another row with this seed, or any other model.

        The row is made when it does not exist yet. Raises UserError for an unknown name, for a row that needs this one,
        and for a row that has no single checkpoint (an ensemble).
        """

    def extract(self, role: str) -> Path:
        """The stored predictions of a role's model on the training corpus."""

    def train(
        self,
        *,
        lam: float,
        loss: Loss | None = None,
        start: Candidate | None = None,
        training: Mapping[str, Any] = {},
        balance: Balance = "none",
    ) -> Candidate:
        """The target trained on lam * CLM + (1 - lam) * loss, CLM alone without a loss.

        start: the candidate whose weights the training starts from, with the target's architecture and tokenizer.
        Default: the target as it is. training: settings that go before the experiment's (`baselines.training.
        RowTraining` has their names). balance: see `fusion.losses.objective.Objective`. Every method trains on the same
        sequences in the same order. Raises UserError when the loss needs what the experiment cannot provide, when
        `start` has another tokenizer, and for settings that are unknown or shared by all rows.
        """

    def pilot(self, share: float, label: str) -> "Context":
        """A context whose trainings are trials: on a `share` of the training passages, drawn by the seed, with all
        their passes.

        Its seed is the first of the experiment's, whatever this one's is, so that all seeds choose alike. A trial that
        diverges raises no error: its `validation_nll` is infinite.
        """

    def relabelled(self, label: str) -> "Context":
        """This context under another label."""

    @property
    def validation_fingerprint(self) -> str:
        """Fingerprint of the validation text and of how it is measured: an input of what is chosen by `validation_nll`.

        Raises UserError when the experiment has no validation text.
        """

    def validation_nll(self, candidate: Candidate, label: str = "") -> float:
        """Negative log-likelihood of the validation text in nats per byte; lower is better.

        Nothing is trained on that text and no suite measures it. label: name of the candidate in progress bars.
        Returns NaN in a plan when it has not been measured yet. Raises UserError when it is not finite.
        """

    def make(
        self,
        kind: str,
        build: Callable[[Path], Mapping[str, Any] | None],
        *,
        version: int,
        inputs: Mapping[str, str],
        params: Mapping[str, Any],
        validations: int = 0,
    ) -> Artifact:
        """An artifact of the method's own, which `build(folder)` writes unless it exists.

        kind, inputs (fingerprints), params and version identify it: everything that can change it must be among them;
        version is raised when `build` itself changes. After an interruption `build` gets the folder as it was left.
        What `build` returns is kept in the manifest; a sentence under "note" is printed below the tables.
        validations: how many times `build` calls `validation_nll`, for the estimate of a plan.
        """

    def progress(self, description: str, total: float, unit: str) -> AbstractContextManager[Callable[[float], None]]:
        """A progress bar over `total` units; yields `advance(amount)`."""
