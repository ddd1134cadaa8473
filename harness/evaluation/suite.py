"""What a suite is: something that measures candidates and yields one record an example.

A suite keeps what it computes as artifacts named by the candidate, the data and every setting that can change an
answer, so that no answer of one model is ever served to another, and what is there is not computed again. Under a dry
store the same code only plans.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from baselines.method import Artifact
from fusion.errors import UnknownName, UserError
from fusion.registry import Registry
from harness.config.errors import ConfigurationError, problems_of
from harness.data.corpus import Document
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.store.artifacts import Spec, Store
from harness.store.costs import Costs
from harness.store.files import parse_json, read_json, write_atomically, write_json
from harness.store.fingerprint import fingerprint

BATCH_SIZE = "batch_size.json"
"""File in which the artifact of a task says how many of its answers were generated at one time."""
NO_VOTE = "there is no answer to vote on"
NONE_FITS = "none of its prompts fits the context"


class SuiteConfig(BaseModel):
    """Base of the configuration of every suite: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid")


class LimitedConfig(SuiteConfig):
    """Base of the configuration of suites that may measure a part of their examples."""

    limit: int | None = Field(None, gt=0, description="only LIMIT examples of each task. Default: all")
    limit_by: Literal["first", "seed"] = Field(
        "first", description="which examples LIMIT takes: the first ones, as lm-eval does, or some drawn by `seed`"
    )
    seed: int = Field(0, ge=0, description="seed of what is drawn")

    def taken(self, names: Sequence[str]) -> list[int]:
        """The positions in `names` of the examples that are measured, in order.

        A draw depends on seed and names alone, and a greater limit only adds to it.
        """
        positions = range(len(names))
        if self.limit_by == "first" or self.limit is None:
            return list(positions[: self.limit])
        ranks = {name: fingerprint([self.seed, name]) for name in names}
        return sorted(sorted(positions, key=lambda i: ranks[names[i]])[: self.limit])

    def limit_identity(self) -> dict[str, Any]:
        """What the choice of examples depends on, for an artifact's parameters."""
        if self.limit is None or self.limit_by == "first":
            return {"limit": self.limit}
        return {"limit": self.limit, "limit_seed": self.seed}


@dataclass(frozen=True)
class Example:
    """One example's result under one metric; numerator / denominator is the score."""

    task: str
    example: str
    metric: str
    numerator: float
    denominator: float = 1.0
    tokens: int | None = None
    """Training tokens before the measurement; None for a finished candidate."""
    cluster: str = ""
    """What the example shares with others, which therefore do not vary independently; '' for nothing."""


@dataclass(frozen=True)
class StoredAnswer:
    """One example as a person reads it: the question, what is right, and what a candidate answered."""

    example: str
    prompt: str
    target: str
    answer: str
    score: float
    """From 0 to 1."""


@dataclass
class SuiteResult:
    """What a suite measured of one candidate."""

    examples: Callable[[], Iterator[Example]]
    artifacts: dict[str, Path] = field(default_factory=dict)
    """By task (or a name for all of them): the folder of prompts, answers and targets."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """By task (or a name for all of them): the fingerprint of that artifact."""
    missing: dict[str, str] = field(default_factory=dict)
    """By task that could not be run: why not."""
    dtype: str = ""
    """Precision that the candidate computed in; '' where its members answered each by itself."""
    notes: list[str] = field(default_factory=list)
    """Sentences that belong below its table."""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """By task: the examples that were not measured, so that they must count for no row of a table."""


class Suite(Protocol):
    """Base of the classes that measure candidates.

    Registered by `@SUITES.register(NAME, parameters=MODEL)`, MODEL being that of its settings. Packages offer theirs by
    the entry-point group `fusellm.suites`.
    """

    config: Any

    def __init__(self, config: Any, data_root: Path | None) -> None: ...

    def task_metrics(self) -> dict[str, str]:
        """The tasks that were asked for, in the order of the table's columns, and the metric shown for each."""

    def identity(self) -> dict[str, Any]:
        """What the numbers come from beside the configuration and the candidate: versions, hashes of the data."""

    in_parts: ClassVar[bool] = False
    """Whether several processes can measure a candidate together (see `measure`)."""

    def measure(self, evaluated: EvaluatedModel, store: Store, costs: Costs) -> SuiteResult:
        """Evaluates what is missing. Under a dry store only plans it, and must not load the candidate.

        A suite `in_parts` is also called with `store.sharing()`, on all ranks: it then makes what parts it can, prints
        nothing, and its result is not used.
        """

    @property
    def documents(self) -> Sequence[Document]:
        """Texts that are tested on as a whole, so that no training corpus may hold them. Default: none."""
        return ()

    def check_context(self, label: str, context: int) -> None:
        """Raises UserError, before anything is made, where a model with so many positions cannot be measured."""
        return

    def check_memory(self, label: str, members: Sequence[tuple[float, str]], device: str) -> None:
        """Raises UserError, before anything is made, where models do not fit the device together.

        members: parameters and precision of each model that is in memory at one time.
        """
        return

    def with_curve(self, result: SuiteResult, curve: Artifact) -> SuiteResult:
        """The result of a trained candidate with what was measured during its training. Default: nothing is added."""
        return result

    @classmethod
    def answers(cls, folder: Path, metric: str) -> Iterator[StoredAnswer]:
        """The answers that an artifact of this suite holds, scored by `metric`; none where it keeps no answers."""
        return iter(())


# Modules of the suites that ship with the harness; each registers its suites when it is imported.
SUITES: Registry[type[Suite]] = Registry(
    "suite",
    "fusellm.suites",
    own={
        "perplexity": "harness.evaluation.perplexity",
        "bbh": "harness.evaluation.lm_eval.suites",
        "commonsense": "harness.evaluation.lm_eval.suites",
        "generative": "harness.evaluation.lm_eval.suites",
        "lm_eval": "harness.evaluation.lm_eval.suites",
        "multipl_e": "harness.evaluation.multipl_e.code_suite",
    },
)


def suite_parameters(name: str) -> type[BaseModel]:
    """The model of a suite's settings. Raises UserError for an unknown suite and for one that is not made as others."""
    part = SUITES.part(name)
    if part.parameters is None or Suite not in part.value.__mro__:
        raise UserError(
            f"The suite {name!r} is no subclass of Suite that @SUITES.register({name!r}, parameters=...) decorates: "
            "correct or uninstall the package that offers it."
        )
    return part.parameters


def suite_config(name: str, given: Any, where: str | None = None) -> BaseModel:
    """A suite's settings, validated by the suite's own model.

    where: what errors call the configuration that they are in. Raises UserError for an unknown suite, and a
    ConfigurationError with every unknown key and wrong value.
    """
    schema = suite_parameters(name)
    try:
        return given if isinstance(given, schema) else schema.model_validate(given)
    except ValidationError as error:
        where, above = (f"suites.{name}", ()) if where is None else (where, ("suites", name))
        raise ConfigurationError(where, problems_of(error, schema, given, where, above)) from None


class Unfinished(UserError):
    """Keeps an artifact that could not be finished from getting its name."""


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON line each, in ASCII."""
    write_atomically(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a finished file that `write_lines` wrote. Raises UserError naming one that is damaged."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rows.append(parse_json(line))
        except ValueError as reason:
            remedy = f"remove {path.parent} to have it made again"
            raise UserError(f"{path}, line {number} is damaged ({reason}): {remedy}.") from None
    return rows


def take_over(
    store: Store, spec: Spec, folder: Path, file: str, usable: Callable[[Mapping[str, Any]], bool], *others: str
) -> list[dict[str, Any]]:
    """Answers for the artifact of `spec` from another one, which took fewer or more examples.

    `file` holds an answer a line, of which those that are `usable` are given. `others` are more parameters that change
    no answer. Of several artifacts the one with the most is taken, and its batch size is noted in `folder`, so that all
    answers have one.
    """
    taken: list[dict[str, Any]] = []
    batch_size = None
    for path in store.variants(spec, "limit", "limit_seed", *others):
        with suppress(UserError):  # it is damaged
            if store.verify(path)["info"].get("batch_tokens") != spec.info.get("batch_tokens"):
                continue
            made_with = read_json(path / BATCH_SIZE, "")["batch_size"] if (path / BATCH_SIZE).exists() else None
            lines = [line for line in read_lines(path / file) if usable(line)] if (path / file).exists() else []
            if len(lines) > len(taken) and spec.info.get("batch_size") in ("auto", made_with):
                taken, batch_size = lines, made_with
    if batch_size is not None:
        write_json(folder / BATCH_SIZE, {"batch_size": batch_size})
    return taken


def chosen(wanted: Sequence[str] | None, known: Sequence[str], suite_name: str) -> list[str]:
    """The tasks of a suite that were asked for, in the suite's order; all where none was.

    Raises UserError with the nearest spelling for one that the suite does not have.
    """
    for name in wanted or ():
        if name not in known:
            raise UnknownName(f"task of the suite {suite_name}", name, known)
    return [name for name in known if wanted is None or name in wanted]
