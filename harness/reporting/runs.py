"""Finished runs: finding and opening them, from their files alone and without importing anything heavy."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UnknownName, UserError
from harness.config.shipped import names, shipped
from harness.runtime.progress import notify
from harness.store.fingerprint import file_sha256
from harness.store.paths import (
    RECORDS,
    RUN_FILE,
    RUNS,
    SUITES_FILE,
    experiment_of,
    root_of_evaluation,
    root_of_run,
    run_files,
)
from harness.store.run_files import read_run_file

if TYPE_CHECKING:
    import pandas as pd

PUBLISHED = "paper/"


@dataclass(frozen=True, repr=False)
class Run:
    """A finished run of an experiment, or of `fusellm eval`: opened once, its record files checked, and passed on."""

    folder: Path
    description: Mapping[str, Any]
    """What the run wrote about itself when it finished (`run.json`)."""
    suites: Mapping[str, Any]
    """By suite: its tasks with the metric shown for each, why methods have no numbers in a task, and notes."""
    records: "pd.DataFrame"
    """One row an example, method, seed and metric (see `results.records`)."""

    def __repr__(self) -> str:
        return f"<Run {self.experiment} ({self.profile}): {len(self.records)} records in {self.folder}>"

    @property
    def root(self) -> Path:
        """The folder below which runs and artifacts lie (the `--root` of the command that made the run)."""
        return root_of_evaluation(self.folder) if "evaluation" in self.description else root_of_run(self.folder)

    @property
    def configuration(self) -> Mapping[str, Any]:
        """The resolved configuration, as JSON values."""
        configuration: Mapping[str, Any] = self.description["configuration"]
        return configuration

    @property
    def experiment(self) -> str:
        """The name of the experiment; `eval` for the evaluation of one model."""
        return str(self.configuration["experiment"])

    @property
    def profile(self) -> str:
        """The profile that it was run in; for the evaluation of one model the computing precision."""
        return str(self.configuration["profile"])

    @property
    def title(self) -> str:
        """What the titles of the run's tables begin with."""
        if "evaluation" in self.description:
            return str(self.configuration["title"])
        return f"{self.configuration['title']} ({self.experiment}, {self.profile})"

    @property
    def methods(self) -> Mapping[str, Mapping[str, Any]]:
        """The rows of the run's tables, by label and in their order: the method of each and its parameters."""
        methods: Mapping[str, Mapping[str, Any]] = self.configuration["methods"]
        return methods

    @property
    def roles(self) -> dict[str, str]:
        """The rows of models as they are, by role: target, teacher, and each source."""
        rows = self.methods.items()
        return {entry.get("role", "target"): label for label, entry in rows if entry["method"] == "as_is"}

    @property
    def reference(self) -> str | None:
        """The row that the others are compared with."""
        return self.configuration["reference"]

    @property
    def banner(self) -> str:
        """The warning that is printed above its tables; empty where there is none."""
        return self.configuration["banner"] or ""

    @property
    def notes(self) -> list[str]:
        """Sentences about how its rows were made, and why some are missing, printed below its tables."""
        missing: dict[tuple[str, str], list[str]] = {}
        for failure in self.description.get("failures", []):
            seeds = missing.setdefault((failure["row"], failure["reason"]), [])
            seeds += [] if failure["seed"] is None else [str(failure["seed"])]
        sentences = []
        for (row, reason), seeds in missing.items():
            of_seeds = f" with seed {', '.join(seeds)}" if seeds else ""
            sentences.append(f"{row} is missing{of_seeds}: {reason}")
        notes = dict.fromkeys(note["sentence"] for note in self.description.get("notes", []))
        return [*notes, *sentences]

    def suite_notes(self, *suites: str) -> list[str]:
        """Sentences about how these suites were measured, printed below their tables."""
        return [note for name in suites if name in self.suites for note in self.suites[name].get("notes", ())]

    def precision(self, *suites: str) -> str:
        """What its models computed these suites in, such as `float32`; empty where that is not known."""
        measured = [entry for entry in self.description.get("measured", []) if entry["suite"] in suites]
        return " and ".join(sorted({dtype for entry in measured for dtype in entry["dtype"].split("+") if dtype}))

    @cached_property
    def seeds(self) -> list[int]:
        """The seeds of its records, which several commands may have made; rows without a seed are left out."""
        return sorted({int(seed) for seed in self.records["seed"].unique() if seed >= 0})

    @cached_property
    def reasons(self) -> dict[tuple[str, str, str], str]:
        """Why a method has no numbers in a task, by method, suite and task, where the run noted it."""
        return {
            (method, suite, task): reason
            for suite, noted in self.suites.items()
            for method, tasks in noted["missing"].items()
            for task, reason in tasks.items()
        }


def open_run(folder: Path) -> Run:
    """Opens the finished run in `folder` and checks its record files against their hashes.

    Record files that are gone are left out: the table says what it lacks. Raises UserError where the description or a
    record file is damaged, and where the folder was made by another version.
    """
    from results.records import read

    description = read_run_file(folder / RUN_FILE)
    hashes = description.get("records")
    if not isinstance(hashes, dict) or not _is_configuration(description.get("configuration")):
        raise UserError(f"{folder} was made by another version of fusellm-harness: run the experiment again.")
    paths = []
    for name, sha256 in sorted(hashes.items()):
        path = folder / RECORDS / name
        records = path.with_suffix(".parquet")  # its provenance lies beside it
        if not records.exists():
            continue
        if not path.exists() or file_sha256(path) != sha256:
            raise UserError(f"{path} does not match its SHA-256 in {RUN_FILE}: remove it and run the experiment again.")
        if path == records:
            paths.append(path)
    suites = read_run_file(folder / SUITES_FILE)
    if description.get("measured") and not suites:  # it says which examples count for all rows
        raise UserError(f"{folder / SUITES_FILE} is missing or empty: run the experiment again, with all its seeds.")
    return Run(folder, description, suites, _measured_for_all(read(paths), suites))


def _measured_for_all(records: "pd.DataFrame", suites: Mapping[str, Any]) -> "pd.DataFrame":
    """The records without the examples that a row could not be asked, so that all rows have the same ones."""
    skipped = {
        (suite, task, example)
        for suite, noted in suites.items()
        for task, examples in noted.get("skipped", {}).items()
        for example in examples
    }
    if not skipped:
        return records
    keys = zip(records["suite"], records["task"], records["example"], strict=True)
    return records[[key not in skipped for key in keys]]


def _is_configuration(configuration: Any) -> bool:
    if not isinstance(configuration, dict) or not isinstance(configuration.get("methods"), dict):
        return False
    keys = ("experiment", "profile", "title", "reference", "banner")
    entries = configuration["methods"].values()
    return all(key in configuration for key in keys) and all("method" in entry for entry in entries)


def find_run(root: Path, name: str, profile: str | None) -> Path:
    """The folder of the newest finished run of an experiment. Raises UserError when there is none."""
    name = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    finished = sorted((root / RUNS / name).glob(f"{profile or '*'}/*/{RUN_FILE}"))
    if not finished:
        from results.paper_numbers import NAMES

        if name not in experiments(root):
            if name in NAMES:
                raise UserError(
                    f"There is no experiment {name!r}: `fusellm tables {PUBLISHED}{name}` prints the published table."
                )
            raise UnknownName("experiment or folder of a run", name, experiments(root))
        if profile and profile not in (known := profiles(name)):
            raise UnknownName(f"profile of {name}", profile, known)
        wanted = f" in profile {profile}" if profile else ""
        raise UserError(
            f"The experiment {name!r} has no finished run{wanted} below {root}: run `fusellm experiment run {name}"
            f"{' --profile ' + profile if profile else ''}`."
        )
    if len(finished) == 1:
        return finished[0].parent
    described = _described(finished)
    return max(described, key=lambda run: run[1].get("finished", 0))[0] if described else finished[0].parent


def resolve_run(root: Path, name: str, profile: str | None) -> Path:
    """The folder of a run that is given by its own path, or by an experiment's name for the newest."""
    folder = Path(name)
    if (folder / RUN_FILE).exists():
        return folder
    if len(folder.parts) > 1 and folder.is_dir():
        raise UserError(f"{name} holds no finished run, as it has no {RUN_FILE}: see `fusellm run list`.")
    return find_run(root, name, profile)


def newest_runs(root: Path, profile: str | None) -> list[Path]:
    """The folder of the newest finished run of every experiment. Raises UserError when there is none at all."""
    ran = sorted({experiment_of(path) for path in (root / RUNS).glob(f"*/{profile or '*'}/*/{RUN_FILE}")})
    if not ran:
        raise no_runs(root)
    return [find_run(root, name, profile) for name in ran]


def finished_runs(root: Path, profile: str | None = None) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and description of every finished run and evaluation of one model below `root`, the newest first.

    Their records are not read. Of one profile there are no evaluations.
    """
    paths = sorted((root / RUNS).glob(f"*/{profile}/*/{RUN_FILE}") if profile else run_files(root))
    return sorted(_described(paths), key=lambda run: run[1].get("finished", 0), reverse=True)


def _described(paths: Iterable[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and description of the runs with these files; one whose file is damaged is named and left out."""
    described = []
    for path in paths:
        try:
            described.append((path.parent, read_run_file(path)))
        except UserError as error:
            notify(f"A run is left out: {error}")
    return described


def no_runs(root: Path) -> UserError:
    """The error for a root folder below which no run has finished."""
    return UserError(f"There are no finished runs below {root}: run `fusellm experiment run` (see `experiment list`).")


def differences(one: Run, other: Run) -> list[tuple[str, str, str]]:
    """In what two runs differ (configuration, models, texts, versions, seeds, command): key, and its value in each."""
    from harness.store import provenance

    return list(provenance.differences(_identity(one), _identity(other)))


def _identity(run: Run) -> dict[str, Any]:
    return {**run.description, "configuration": {**run.configuration, "seeds": run.seeds}}


def experiments(root: Path) -> list[str]:
    """The experiments that ship with the harness, and those that were run."""
    return sorted({*names("experiments"), *(path.name for path in (root / RUNS).glob("*") if path.is_dir())})


def profiles(name: str) -> list[str]:
    """The profiles that an experiment can be run in: all of them for one that does not ship with the harness."""
    return list(shipped("experiments", name).profiles) if name in names("experiments") else names("profiles")
