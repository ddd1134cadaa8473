"""The rows of an experiment: every method with every seed, made in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from baselines.method import Candidate, Ensemble
from baselines.registry import get_method, schema_of
from fusion.errors import UserError
from harness.config.named_rows import cycle_sentence
from harness.config.schema import Config
from harness.config.validation import method_parameters
from harness.experiment.checks import check_inputs, check_lengths, check_space, check_validation
from harness.experiment.method_context import MethodContext
from harness.experiment.pipeline import Experiment, open_experiment, start
from harness.store.paths import command_path


@dataclass(frozen=True)
class Row:
    """One candidate of the experiment: a method with a seed."""

    label: str
    """The name of the row in tables."""
    seed: int | None
    """None where another seed would give the same candidate."""
    candidate: Candidate | Ensemble


@dataclass(frozen=True)
class FailedRow:
    """A row that cannot be made or measured, and why."""

    label: str
    seed: int | None
    """The seed that it was tried with; None for a row that does not depend on the seed."""
    error: UserError


def failure_sentence(failures: Sequence[FailedRow]) -> str:
    """Why rows failed, in one sentence: the reason itself where all failed for the same."""
    reasons = dict.fromkeys(str(failure.error) for failure in failures)
    if len(reasons) == 1:
        return next(iter(reasons))
    labels = dict.fromkeys(failure.label for failure in failures)
    return f"{len(labels)} rows cannot be made ({', '.join(labels)}): {' '.join(reasons)}"


class RowCycle(UserError):
    """A row that needs itself, directly or through other rows."""


class CandidateBuilder:
    """Makes the candidates of rows, each once, and before it those of the rows that it names."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._results: dict[tuple[str, int], Candidate | Ensemble | UserError] = {}
        self._in_progress: list[str] = []
        """The labels of the rows that are being made, each needed by the one before it."""

    def build(self, label: str, seed: int) -> Candidate | Ensemble:
        """The candidate of the row `label` with a seed. Raises UserError, at every call, when it cannot be made."""
        if label in self._in_progress:
            raise RowCycle(cycle_sentence(self._in_progress[self._in_progress.index(label) :]))
        if (label, seed) not in self._results:
            self._in_progress.append(label)
            try:
                self._results[label, seed] = self._make(label, seed)
            except UserError as error:
                self._results[label, seed] = error
            finally:
                self._in_progress.pop()
        result = self._results[label, seed]
        if isinstance(result, UserError):
            raise result
        return result

    def _make(self, label: str, seed: int) -> Candidate | Ensemble:
        entry = self._experiment.config.methods[label]
        method = get_method(entry["method"])
        parameters = method_parameters(label, entry, schema_of(method))
        context = MethodContext(self._experiment, label, seed, partial(self._named, label))
        return method.value(context, parameters)

    def _named(self, label: str, row: str, seed: int) -> Candidate:
        """The candidate of `row`, which the row `label` names."""
        try:
            candidate = self.build(row, seed)
        except RowCycle:
            raise
        except UserError as error:
            raise UserError(f"{label} needs the row {row}, which cannot be made: {error}") from error
        if isinstance(candidate, Ensemble):
            raise UserError(
                f"{label} names the row {row}, which is an ensemble and has no checkpoint of its own: name its members."
            )
        return candidate


def candidates(
    experiment: Experiment,
    labels: Sequence[str] | None = None,
    failures: list[FailedRow] | None = None,
    impossible: Sequence[FailedRow] = (),
) -> Iterator[Row]:
    """Every row of the table made in turn, for every seed; only the rows `labels` where they are given.

    failures: takes the rows that cannot be made, while the others go on. Default: the first of them raises UserError.
    impossible: rows that the plan has found to be so; they are not tried.
    """
    config = experiment.config
    builder = CandidateBuilder(experiment)
    refused = {(row.label, row.seed) for row in impossible}
    for label in config.methods if labels is None else labels:
        for seed in config.seeds:
            if (label, seed) in refused:
                continue
            try:
                candidate = builder.build(label, seed)
            except UserError as error:
                if failures is None:
                    raise
                failures.append(FailedRow(label, seed, error))
                continue
            yield Row(label, seed if candidate.seeded else None, candidate)
            if not candidate.seeded:
                break


def build(config: Config, labels: Sequence[str], root: Path) -> Iterator[Row]:
    """Makes the candidates of rows without evaluating them; what is there is not made again."""
    experiment = open_experiment(config, root)
    start(experiment)
    with experiment.workspace.store.in_use(command_path(root, config.experiment, config.profile, "build")):
        check_inputs(experiment)
        dry = open_experiment(config, root, dry=True)
        for _ in candidates(dry, labels):
            pass
        check_validation(dry, experiment)
        planned = list(dry.workspace.store.planned.values())
        check_space(planned, root)
        check_lengths(experiment, planned)
        yield from candidates(experiment, labels)
