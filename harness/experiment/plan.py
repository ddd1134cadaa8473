"""The plan of an experiment: all artifacts that it needs, in the order in which they are made, and what they cost."""

from pathlib import Path

from fusion.errors import UserError
from harness.config.schema import Config
from harness.experiment.candidates import FailedRow, candidates, failure_sentence
from harness.experiment.checks import check_sizes
from harness.experiment.pipeline import Experiment, evaluated_model, measure, open_experiment, start
from harness.runtime.progress import notify
from harness.store.artifacts import Planned


def plan(config: Config, root: Path, *, flops: float | None = None) -> list[Planned]:
    """All artifacts that the experiment needs, what is there of them, and what the others cost. Makes nothing.

    `flops` are the floating-point operations a second that models reach on the machine that is planned for (default:
    measured on this machine).
    """
    experiment = open_experiment(config, root, dry=True, flops=flops)
    start(experiment)
    return plan_stages(experiment)


def plan_stages(dry: Experiment, failures: list[FailedRow] | None = None) -> list[Planned]:
    """The stages of an experiment that was opened to plan, each once, in the order in which a run makes them.

    failures: takes the rows of which is known already that they cannot be made. Default: UserError, naming all of them.
    Raises UserError where no row can be made.
    """
    check_sizes(dry)
    impossible: list[FailedRow] = []
    unknown: dict[str, str] = {}
    possible = 0
    for row in candidates(dry, failures=impossible):
        measure(dry, evaluated_model(dry, row.label, row.candidate))
        possible += 1
        if (tuning := row.candidate.tuning) is not None and not tuning.known:
            unknown[row.label] = ", ".join(tuning.names)
    for label, names in unknown.items():
        notify(f"{label}: pilots will choose {names}; the plan has one training with the first values.")
    if impossible and (failures is None or not possible):
        raise UserError(failure_sentence(impossible))
    if failures is not None:
        failures += impossible
    return list(dry.workspace.store.planned.values())
