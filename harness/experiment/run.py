"""Running an experiment: what is missing is made, and records, tables and figures are written."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baselines.method import Ensemble
from fusion.errors import UserError
from harness.config.schema import Config
from harness.data.passages import corpus_sentence, corpus_summary
from harness.evaluation.records import note_suites, write_records
from harness.evaluation.suite import SuiteResult
from harness.experiment.candidates import FailedRow, Row, candidates, failure_sentence
from harness.experiment.checks import check_inputs, check_lengths, check_space, check_validation
from harness.experiment.identity import model_sources, named, run_fingerprint
from harness.experiment.pipeline import Experiment, evaluated_model, measure, open_experiment, share, start
from harness.experiment.plan import plan_stages
from harness.reporting.export import write_run
from harness.reporting.runs import Run, open_run
from harness.runtime import distributed
from harness.runtime.progress import notify, whole_run
from harness.stages.training_log import tokens_seen
from harness.store.artifacts import Planned, read_manifest
from harness.store.files import exclusive_lock, write_json
from harness.store.paths import RECORDS, RUN_FILE, place_of_artifact, run_path
from harness.store.provenance import made_by
from harness.store.run_files import list_measured, note_artifacts, read_run_file

if TYPE_CHECKING:
    from results.table import Table


class IncompleteRun(UserError):
    """A run that finished without some of its rows. `folder` holds its records; its tables name what is missing."""

    def __init__(self, folder: Path, failures: Sequence[FailedRow]) -> None:
        self.folder = folder
        self.failures = tuple(failures)
        super().__init__(failure_sentence(failures))


def run_folder(experiment: Experiment, root: Path) -> Path:
    """The folder of the experiment's run below `root`."""
    config = experiment.config
    return run_path(root, config.experiment, config.profile, run_fingerprint(experiment))


def run(
    config: Config, root: Path, *, show: "Callable[[Run, Mapping[str, Table]], object]" = lambda finished, tables: None
) -> Path:
    """Makes what is missing and writes records, tables and figures; returns the run's folder.

    show: called by the main process, once all is written, with the run and its tables by the stem of their files'
    names. Raises IncompleteRun, after that, when rows are missing.
    """
    folder, failures = make_records(config, root)
    if distributed.is_main_process():
        with exclusive_lock(folder / ".lock", f"run {folder.name}"):
            finished = open_run(folder)
            tables = write_run(finished)
        show(finished, tables)
        if failures:
            raise IncompleteRun(folder, failures)
    return folder


def make_records(config: Config, root: Path) -> tuple[Path, Sequence[FailedRow]]:
    """Makes what is missing, then writes records and the description of the run; returns the run's folder.

    A row that cannot be made or measured is noted in the description, returned beside the folder, and the others are
    finished. All ranks walk through the stages and divide the parts of suites; the first one writes. With several ranks
    a row that cannot be made ends the run, unless the plan has found it out. Raises UserError where no row can be made.
    """
    experiment = open_experiment(config, root)
    start(experiment)
    with experiment.workspace.store.in_use():
        return _plan_and_make(experiment, root)


def _plan_and_make(experiment: Experiment, root: Path) -> tuple[Path, Sequence[FailedRow]]:
    check_inputs(experiment)
    dry = open_experiment(experiment.config, root, dry=True)
    impossible: list[FailedRow] = []
    planned = plan_stages(dry, impossible)
    if impossible:
        notify(f"{failure_sentence(impossible)} The other rows are made.")
    missing = {stage.spec.fingerprint: stage.estimate.seconds for stage in planned if stage.state != "ready"}
    with whole_run(missing):
        check_validation(dry, experiment)
        if missing:
            check_space(planned, root)
            check_lengths(experiment, planned)
        return _make(experiment, planned, impossible, root)


def _make(
    experiment: Experiment, planned: Sequence[Planned], impossible: Sequence[FailedRow], root: Path
) -> tuple[Path, Sequence[FailedRow]]:
    """Makes the rows but the impossible ones, measures them, and writes the run's folder; that, and all that failed."""
    config, folder = experiment.config, run_folder(experiment, root)
    if not distributed.is_main_process():
        for _ in _shared(experiment, candidates(experiment, impossible=impossible)):
            pass  # the first rank completes and writes
        return folder, impossible
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    # What the plan has not asked for, naming the run has (the passages, where nothing is trained).
    artifacts = {str(p.path.relative_to(root)) for p in [*planned, *experiment.workspace.store.planned.values()]}
    note_artifacts(folder, artifacts)  # from the beginning, so that cleaning up spares what a killed run has made
    experiment.workspace.store.list_in(folder)  # and what it has chosen to make
    read_run_file(folder / RUN_FILE)  # refused now if it is damaged, not when all is done
    measured: list[dict[str, Any]] = []
    about: dict[str, list[dict[str, Any]]] = {"notes": [], "checkpoints": [], "tunings": []}
    passages = experiment.corpora.passages[1]
    if corpus_summary(passages).limits:
        about["notes"].append({"row": None, "seed": None, "sentence": corpus_sentence(config.corpus, passages)})
    failures = list(impossible)
    # Of several ranks the others wait for what this one makes: there the first row that fails ends the run.
    alone = distributed.world_size() == 1
    rows = candidates(experiment, failures=failures if alone else None, impossible=impossible)
    for row in rows if alone else _shared(experiment, rows):
        evaluated = evaluated_model(experiment, row.label, row.candidate)
        try:
            of_row = measure(experiment, evaluated)
        except UserError as error:
            failures.append(FailedRow(row.label, row.seed, error))
            continue
        finally:
            evaluated.release()  # before the next row is trained
        key = {"row": row.label, "seed": row.seed}
        about["notes"] += [{**key, "sentence": note} for note in _notes(experiment, row)]
        if (checkpoint := _selected(row)) is not None:
            about["checkpoints"].append({**key, **checkpoint})
        if (tuning := row.candidate.tuning) is not None:
            tried = [[*values, nll if math.isfinite(nll) else None] for values, nll in tuning.tried]
            about["tunings"].append({**key, "names": tuning.names, "tried": tried, "chosen": tuning.chosen})
        measured += _record(experiment, row, of_row, folder)
    if failures and not any(entry["file"] for entry in measured):
        raise UserError(failure_sentence(failures))
    names, sources = named(experiment), model_sources(experiment)  # outside of the lock, which listing artifacts takes
    with exclusive_lock(folder / ".lock", f"run {folder.name}"):
        # Other seeds that were finished before, or meanwhile by another process, belong to the same table.
        before = read_run_file(folder / RUN_FILE)
        # What was made to find out what to make is known by now, and of what is tuned what was chosen.
        artifacts = {name for name in artifacts if (root / name).exists()}
        artifacts |= {str(p.path.relative_to(root)) for p in experiment.workspace.store.planned.values()}
        listed = list_measured(folder, before, measured)
        note_suites(folder, experiment.suites, listed["measured"])
        again = {(None, None), *((entry["row"], entry["seed"]) for entry in measured)}
        for name, entries in about.items():
            kept = [entry for entry in before.get(name, []) if (entry["row"], entry["seed"]) not in again]
            about[name] = kept + entries
        description = {
            "configuration": config.model_dump(mode="json"),
            "named": names,
            "model_sources": sources,
            **made_by(),
            "artifacts": sorted(artifacts.union(before.get("artifacts", []))),
            **listed,
            **about,
            "failures": _failures(config, failures, before.get("failures", [])),
            "finished": time.time(),
        }
        write_json(folder / RUN_FILE, description)
    return folder, failures


def _shared(experiment: Experiment, rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, each when all parts of its suites are made or under way on some rank, and those of the next row, too.

    So no rank waits for the last parts of a row.
    """
    before: Row | None = None
    for row in rows:
        evaluated = evaluated_model(experiment, row.label, row.candidate)
        share(experiment, evaluated)
        evaluated.release()  # before the next row is trained
        if before is not None:
            yield before
        before = row
    if before is not None:
        yield before


def _failures(
    config: Config, failures: Sequence[FailedRow], before: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """The rows that failed, now or under seeds that are not of this run, as its description lists them."""
    kept = [failure for failure in before if failure["seed"] not in (None, *config.seeds)]
    return kept + [{"row": f.label, "seed": f.seed, "reason": str(f.error)} for f in failures]


def _selected(row: Row) -> dict[str, Any] | None:
    """Which checkpoint of its training the row is, where validation text has chosen it (see `trainer.selected`)."""
    training = row.candidate.training
    return None if training is None else read_manifest(training)["info"].get("selected")


def _notes(experiment: Experiment, row: Row) -> Iterator[str]:
    """Sentences about how a candidate was made that belong below the tables."""
    if isinstance(row.candidate, Ensemble):
        weights = ", ".join(f"{member.name} {member.weight:.3f}" for member in row.candidate.members)
        seed = "" if row.seed is None else f" (seed {row.seed})"
        yield f"{row.label}{seed} asks several models at once, with the weights {weights}."
        return
    role, models = row.candidate.role, experiment.models
    if models.role(role).corpus is not None and row.candidate.fingerprint == models.fingerprint(role):
        tokens = tokens_seen(row.candidate.folder.parent) or 0
        base = models.base(role).name
        yield f"{row.label} is {base} continued on {tokens:,} tokens of its own text, which no other row counts."
    own = {key: values[0] for key, values in experiment.config.own_training(row.label).items() if len(values) == 1}
    if own:
        settings = ", ".join(f"{key} {value}" for key, value in own.items())
        yield f"{row.label} is trained with settings of its own: {settings}."
    if (tuning := row.candidate.tuning) is not None:
        yield f"{row.label} is tuned on validation text with seed {experiment.config.seeds[0]}: {tuning.sentence()}."
    if start := experiment.config.methods[row.label].get("warm_start"):
        yield f"{row.label} starts from the checkpoint of {start}, whose tokens are not among its own."
    if (checkpoint := _selected(row)) is not None:
        seed = "" if row.seed is None else f" (seed {row.seed})"
        tokens, last = checkpoint["points"][-1]
        yield (
            f"{row.label}{seed} is its checkpoint at {checkpoint['tokens']:,} of {tokens:,} tokens, the best of "
            f"{len(checkpoint['points']) - 1} on validation text: {checkpoint['nats_per_byte'] / math.log(2):.4f} bits "
            f"per byte there, {last / math.log(2):.4f} at the end."
        )
    curve, training = row.candidate.curve, row.candidate.training
    if curve is not None and training is not None and not curve.folder.exists():
        seed = "" if row.seed is None else f" (seed {row.seed})"
        yield (
            f"{row.label}{seed} has no learning curve: it was trained before under other settings of the curve, or "
            "the curve was removed, and the checkpoints along the way are gone. Remove "
            f"{place_of_artifact(training)} to train it again."
        )
    artifact = experiment.workspace.store.planned.get(row.candidate.fingerprint)
    if artifact is not None and (note := read_manifest(artifact.path)["info"].get("note")):
        yield str(note)


def _record(
    experiment: Experiment, row: Row, results: Mapping[str, SuiteResult], folder: Path
) -> Iterator[dict[str, Any]]:
    """Writes the records of a row, one file a suite, and gives the entries of `run.json` about them.

    They hold what a suite has of the held-out curve of the row's training, too.
    """
    config, curve = experiment.config, row.candidate.curve
    for name, result in results.items():
        if curve is not None and curve.folder.exists():
            result = experiment.suites[name].with_curve(result, curve)
        yield write_records(
            folder,
            name,
            result,
            candidate=row.candidate.fingerprint,
            experiment=config.experiment,
            profile=config.profile,
            method=row.label,
            seed=row.seed,
        )
