"""What a method is: something that turns an experiment's roles into a candidate that can be evaluated.

A method imports nothing of the harness. It asks its context for what is expensive (training, extraction, scores), and
the context decides whether that is there already. The same `build` therefore also serves to plan: under a dry run the
context answers with artifacts that do not exist yet, so a method must not open what it is given.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, get_args

from pydantic import BaseModel, ConfigDict

from fusion.errors import UserError
from fusion.losses.specs import Learning
from fusion.registry import Registry


class Parameters(BaseModel):
    """Base of every method's parameters: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)


Role = Annotated[str, "role"]
"""A parameter that names a role of the experiment: that there is one is checked before anything is run."""


def named_roles(parameters: BaseModel) -> list[str]:
    """What is named by parameters of type `Role`, alone or in a list."""
    found: list[str] = []
    for name, field in type(parameters).model_fields.items():
        if "role" in field.metadata or _has_role(field.annotation):
            given = getattr(parameters, name)
            found += [given] if isinstance(given, str) else given or []
    return found


def _has_role(annotation: Any) -> bool:
    return annotation == Role or any(map(_has_role, get_args(annotation)))


@dataclass(frozen=True)
class Candidate:
    """What can be evaluated: a checkpoint folder, known by the fingerprint of what made it."""

    folder: Path
    fingerprint: str
    seeded: bool
    """Whether another seed would give another candidate."""
    training: Path | None = None
    """The training artifact, which holds the held-out curve."""

    @property
    def checkpoints(self) -> "Sequence[Candidate]":
        return [self]


Need = Literal["training", "same tokenizer", "same architecture", "teacher"]


@dataclass(frozen=True)
class Artifact:
    """A folder that is complete, or will be when a plan is carried out, and the fingerprint of what made it."""

    folder: Path
    fingerprint: str


@dataclass(frozen=True)
class Member:
    """A model of an ensemble; its role says how it is run."""

    role: str
    candidate: Candidate
    weight: float


@dataclass(frozen=True)
class Ensemble:
    """What can be evaluated, too: models that answer together, of which there is no one checkpoint."""

    members: tuple[Member, ...]
    """The first is the pivot, whose tokens are read and written; the weights sum to 1."""
    combine: Literal["probabilities", "logits", "vote"]
    map: str
    """The vocabulary map of members with other tokenizers than the pivot's."""
    fingerprint: str
    seeded: bool
    training: None = None

    @property
    def checkpoints(self) -> Sequence[Candidate]:
        return [member.candidate for member in self.members]


class Context(Protocol):
    """What a method is given. Everything it makes is an artifact: made once, shared by all who ask."""

    seed: int
    label: str

    @property
    def sources(self) -> Sequence[str]:
        """Names of the experiment's sources, in its order."""

    def model(self, role: str) -> Candidate:
        """The model of a role as it is: `target`, `teacher` or a source's name; or any other model by its own name.

        UserError for a name that is neither.
        """

    def extract(self, role: str) -> Path:
        """The stored extraction of a role's model on the training corpus."""

    def train(self, *, lam: float, learn: Learning | None = None) -> Candidate:
        """The target trained on the corpus with lam * CLM + (1 - lam) * what is learnt besides (`fusion.losses.specs`).

        The same rows in the same order for every method. UserError where what it needs cannot be had.
        """

    @property
    def held_out(self) -> str:
        """Fingerprint of the text that `score` reads and of how: an input of what is chosen by scores.

        UserError where the experiment has no validation text.
        """

    def score(self, candidate: Candidate, label: str = "") -> float:
        """Nats per byte on validation text, on which nothing is trained and which no suite measures; lower is better.

        `label` names the candidate in progress bars. In a plan NaN, where it was not measured before.
        """

    def make(
        self,
        kind: str,
        build: Callable[[Path], Mapping[str, Any] | None],
        *,
        version: int,
        inputs: Mapping[str, str],
        params: Mapping[str, Any],
        scores: int = 0,
    ) -> Artifact:
        """What `build(folder)` writes into a folder, made once; `params` is all that can change it beside `inputs`.

        `inputs` are fingerprints; `version` is raised when `build` itself changes. `build` may find what an interrupted
        run left there. What it returns is kept in the manifest; a sentence under "note" is printed below tables.
        `scores` says how often it asks for `score`, for estimates.
        """

    def progress(self, description: str, total: float, unit: str) -> AbstractContextManager[Callable[[float], None]]:
        """A progress bar: gives `advance(amount)`."""


class Method(Protocol):
    """One row of a table. Registered in `METHODS` or by the entry-point group `fusellm.methods`."""

    schema: ClassVar[type[Parameters]]
    needs: ClassVar[Sequence[Need]]
    """What the models must have in common, and what else the experiment must offer."""

    def __init__(self, parameters: Any) -> None: ...

    def build(self, context: Context) -> Candidate | Ensemble: ...


METHODS: Registry[type[Method]] = Registry("method", "fusellm.methods")


def method(name: str) -> type[Method]:
    """The registered method of that name; imports the ones that come with the project first.

    Raises UserError where there is none, its package cannot be imported, or what it offers is no method.
    """
    _register_own()
    kind = METHODS.get(name)
    schema = getattr(kind, "schema", None)
    if not (isinstance(schema, type) and issubclass(schema, Parameters) and hasattr(kind, "build")):
        raise UserError(
            f"The method {name!r} is no class with a schema (of baselines.method.Parameters) and build: correct or "
            "uninstall the package that offers it."
        )
    return kind


def method_names() -> list[str]:
    """The names of all methods; those of other packages are read without importing them."""
    _register_own()
    return METHODS.names()


def _register_own() -> None:
    from baselines import alm, as_is, clm, distillation, ensemble, fusellm, merge, uld  # noqa: F401  they register themselves
