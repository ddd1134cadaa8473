"""What a method is: something that turns an experiment's roles into a candidate that can be evaluated.

A method imports nothing of the harness. It asks its context for what is expensive (training, extraction, scores), and
the context decides whether that is there already. The same `build` therefore also serves to plan: under a dry run the
context answers with artifacts that do not exist yet, so a method must not open what it is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from fusion.registry import Registry
from fusion.targets import Switches


class Parameters(BaseModel):
    """Base of every method's parameters: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Candidate:
    """What can be evaluated: a checkpoint folder, known by the fingerprint of what made it."""

    folder: Path
    fingerprint: str
    seeded: bool
    """Whether another seed would give another candidate."""
    training: Path | None = None
    """The training artifact, which holds the held-out curve."""


@dataclass(frozen=True)
class Fusion:
    """How sources are fused: which of them, through which map, by which switches, and how much of what is stored.

    k: only the k most probable of the entries stored a position; None: all of them.
    """

    sources: Sequence[str]
    map: str
    map_on: Literal["bytes", "strings"]
    switches: Switches
    k: int | None = None


class Context(Protocol):
    """What a method is given. Everything it makes is an artifact: made once, shared by all who ask."""

    seed: int
    label: str

    @property
    def sources(self) -> Sequence[str]:
        """Names of the experiment's sources, in its order."""

    def model(self, role: str) -> Candidate:
        """The model of a role as it is: `target` or a source's name. UserError for an unknown role."""

    def extract(self, role: str) -> Path:
        """The stored extraction of a role's model on the training corpus."""

    def train(self, *, lam: float, fusion: Fusion | None) -> Candidate:
        """The target trained on the corpus with lam * CLM + (1 - lam) * fusion; the same rows for every method."""


class Method(Protocol):
    """One row of a table. Registered in `METHODS` or by the entry-point group `fusellm.methods`."""

    schema: ClassVar[type[Parameters]]

    def __init__(self, parameters: Any) -> None: ...

    def build(self, context: Context) -> Candidate: ...


METHODS: Registry[type[Method]] = Registry("method", "fusellm.methods")


def method(name: str) -> type[Method]:
    """The registered method of that name; imports the ones that come with the project first."""
    from baselines import as_is, clm, fusellm  # noqa: F401  they register themselves

    return METHODS.get(name)
