"""The rows of an experiment: every method with every seed, made in turn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from baselines.method import Candidate, Ensemble
from baselines.registry import get_method, schema_of
from harness.config.schema import Config
from harness.config.validation import method_parameters
from harness.experiment.checks import check_inputs, check_lengths, check_space, check_validation
from harness.experiment.method_context import MethodContext
from harness.experiment.pipeline import TARGET, Experiment, open_experiment, start


@dataclass(frozen=True)
class Row:
    """One candidate of the experiment: a method with a seed."""

    label: str
    """The name of the row in tables."""
    seed: int | None
    """None where another seed would give the same candidate."""
    candidate: Candidate | Ensemble
    role: str
    """The role whose settings (precision, batches) the candidate is evaluated with."""


def candidates(experiment: Experiment, labels: Sequence[str] | None = None) -> Iterator[Row]:
    """Every row of the table built in turn, for every seed; only the rows `labels` where they are given."""
    config = experiment.config
    for label in config.methods if labels is None else labels:
        entry = config.methods[label]
        method = get_method(entry["method"])
        parameters = method_parameters(label, entry, schema_of(method))
        for seed in config.seeds:
            candidate = method.value(MethodContext(experiment, label, seed), parameters)
            yield Row(label, seed if candidate.seeded else None, candidate, entry.get("role", TARGET))
            if not candidate.seeded:
                break


def build(config: Config, labels: Sequence[str], root: Path) -> Iterator[Row]:
    """Makes the candidates of rows without evaluating them; what is there is not made again."""
    experiment = open_experiment(config, root)
    start(experiment)
    check_inputs(experiment)
    check_lengths(experiment)
    dry = open_experiment(config, root, dry=True)
    for _ in candidates(dry, labels):
        pass
    check_validation(dry, experiment)
    check_space(list(dry.workspace.store.planned.values()), root)
    yield from candidates(experiment, labels)
