"""Finished runs and the tables made of them: from records alone, and without importing anything heavy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from harness.store.files import read_json
from harness.store.fingerprint import file_sha256
from harness.store.paths import PRESETS, RUN_FILE, SUITES_FILE

if TYPE_CHECKING:
    import pandas as pd

    from results.layout import Table

PUBLISHED = "paper/"
ALL = "all"


@dataclass(frozen=True)
class Tables:
    """Tables by name, the folder of each that has a run, and a sentence for each that was asked for and has none."""

    made: "dict[str, Table]"
    folders: dict[str, Path]
    absent: tuple[str, ...]


def find_run(root: Path, name: str, profile: str | None) -> Path:
    """The newest finished run of an experiment. Raises UserError when there is none."""
    name = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    runs = sorted((root / "runs" / name).glob(f"{profile or '*'}/*/{RUN_FILE}"))
    if not runs:
        from results.metrics import unknown
        from results.paper_numbers import NAMES

        if name not in _experiments(root):
            if name in NAMES:
                raise UserError(
                    f"There is no experiment {name!r}: `fusellm tables {PUBLISHED}{name}` prints the published table."
                )
            raise UserError(unknown("table", name, [ALL, *dict.fromkeys([*NAMES, *_experiments(root)])]))
        if profile and profile not in (known := _profiles(name)):
            raise UserError(unknown(f"profile of {name}", profile, known))
        wanted = f" in profile {profile}" if profile else ""
        raise UserError(
            f"The experiment {name!r} has no finished run{wanted} below {root}: run `fusellm experiment run {name}"
            f"{' --profile ' + profile if profile else ''}`."
        )
    return max(runs, key=lambda p: described(p).get("finished", 0)).parent


def run_folder(root: Path, name: str, profile: str | None) -> Path:
    """The folder of a run that is given by its own path, or by an experiment's name for the newest."""
    return Path(name) if Path(name, RUN_FILE).exists() else find_run(root, name, profile)


def differences(one: Path, other: Path) -> list[tuple[str, str, str]]:
    """In what two runs differ: key, and its value in each."""
    from harness.store.provenance import differences

    return list(differences(*(_identity(folder) for folder in (one, other))))


def _identity(folder: Path) -> dict[str, Any]:
    """What a run's description says of it; its seeds are those of the records, which several commands may have made."""
    _, records = open_run(folder)
    description = opened(folder)
    seeds = sorted({int(seed) for seed in records["seed"].unique() if seed >= 0})
    return {**description, "configuration": {**description["configuration"], "seeds": seeds}}


def described(path: Path) -> dict[str, Any]:
    """What a run wrote at `path` about itself; empty where there is nothing, refused when damaged."""
    if not path.exists():
        return {}
    return read_json(path, "remove that file and run the experiment again, with all its seeds")


def opened(folder: Path) -> dict[str, Any]:
    """What the finished run in `folder` says of itself. Raises UserError where that is damaged, or no run's."""
    description = described(folder / RUN_FILE)
    if not isinstance(description.get("configuration"), dict) or not isinstance(description.get("records"), dict):
        raise UserError(f"{folder} was made by another version of fusellm-harness: run the experiment again.")
    return description


def hashes(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of record files and of the provenance beside each, by name: what `open_run` checks."""
    paths = [path.with_suffix(end) for path in (folder / "records" / f for f in files) for end in (".parquet", ".json")]
    return {path.name: file_sha256(path) for path in paths}


def open_run(folder: Path) -> "tuple[dict[str, Any], pd.DataFrame]":
    """The resolved configuration and the records of a finished run. Raises UserError where they are damaged.

    Record files that are gone are left out: the table says what it lacks.
    """
    from results.records import read

    description = opened(folder)
    paths = []
    for name, sha256 in sorted(description["records"].items()):
        path = folder / "records" / name
        records = path.with_suffix(".parquet")  # beside each lies its provenance
        if not records.exists():
            continue
        if not path.exists() or file_sha256(path) != sha256:
            raise UserError(f"{path} does not match its SHA-256 in {RUN_FILE}: remove it and run the experiment again.")
        if path == records:
            paths.append(path)
    return description["configuration"], read(paths)


def _experiments(root: Path) -> list[str]:
    """The experiments that ship with the harness, and those that were run."""
    return sorted(_shipped("experiments") | {path.name for path in (root / "runs").glob("*") if path.is_dir()})


def _shipped(kind: str) -> set[str]:
    return {path.name.removesuffix(".yaml") for path in (PRESETS / kind).iterdir()}


def _profiles(name: str) -> list[str]:
    """The profiles that an experiment can be run in: all of them for one that does not ship with the harness."""
    import yaml

    if name not in _shipped("experiments"):
        return sorted(_shipped("profiles"))
    path = PRESETS / "experiments" / f"{name}.yaml"
    return list(yaml.safe_load(path.read_text(encoding="utf-8"))["profiles"])


def table(folder: Path, *, reference: str | None = None, with_paper: bool = False) -> "Table":
    """The table of a run, from its records alone; in the paper's layout where it measured what the paper did.

    reference: the row that the others are compared with, by default the configuration's. with_paper: the published
    values beside ours. Raises UserError for an unknown reference, and where the paper has no such table.
    """
    from results.paper_layouts import LAYOUTS, comparison, measured_for

    config, records = open_run(folder)
    try:
        name, profile, methods, _ = (config[key] for key in ("experiment", "profile", "methods", "title"))
        reference, banner = reference or config["reference"], config["banner"] or ""
        roles = {entry.get("role", "target"): label for label, entry in methods.items() if entry["method"] == "as_is"}
    except (KeyError, TypeError):
        raise UserError(f"{folder} was made by another version of fusellm-harness: run the experiment again.") from None
    noted = described(folder / RUN_FILE).get("notes", [])
    if measured_for(name, records) or (with_paper and name in LAYOUTS):
        made = comparison(
            name,
            records,
            list(methods),
            roles,
            profile=profile,
            reference=reference,
            with_paper=with_paper,
            banner=banner,
            command=f"fusellm experiment run {name} --profile {profile}",
            reasons=_reasons(folder),
        )
        return replace(made, notes=(*made.notes, *noted))
    if with_paper:
        raise UserError(f"The paper has no table {name!r}: those it has are {', '.join(LAYOUTS)}.")
    made = text_table(config, records, reference)
    return replace(made, notes=(*made.notes, *noted))


def text_table(config: Mapping[str, Any], records: "pd.DataFrame", reference: str) -> "Table":
    """Held-out text by domain, from a run's configuration and records."""
    from results.tables import main_table

    text = records[(records["suite"] == "perplexity") & records["tokens"].isna()]
    return main_table(
        records,
        list(config["methods"]),
        reference,
        metric=str(text["metric"].iloc[0]) if len(text) else "bits_per_byte",
        title=f"{config['title']} ({config['experiment']}, {config['profile']})",
        banner=config["banner"] or "",
    )


def _reasons(folder: Path) -> dict[tuple[str, str, str], str]:
    """Why a method has no numbers in a task, by method, suite and task, where the run noted it."""
    noted = described(folder / SUITES_FILE)
    return {
        (method, suite, task): why
        for suite, one in noted.items()
        for method, tasks in one["missing"].items()
        for task, why in tasks.items()
    }


def tables(
    root: Path, names: Sequence[str], profile: str | None, *, reference: str | None = None, with_paper: bool = False
) -> Tables:
    """The tables of the newest runs of `names`: experiments, `paper/NAME` for a published table, or `all` there are.

    Under `all` a table that was not run is left to `absent`, or is the published one under with_paper. Raises UserError
    for a name that is not there, and where there is nothing at all.
    """
    from results.paper_numbers import NAMES, paper_table

    everything = ALL in names or not names
    asked = names
    if everything:
        asked = [*NAMES, *(one for one in _experiments(root) if profile in (None, *_profiles(one)))]
    made: dict[str, Table] = {}
    folders: dict[str, Path] = {}
    absent = []
    for name in dict.fromkeys(asked):
        if name.startswith(PUBLISHED):
            made[name] = paper_table(name.removeprefix(PUBLISHED))
            continue
        try:
            folder = find_run(root, name, profile)
        except UserError as error:
            if not everything:
                raise
            absent.append(str(error))
            if with_paper and name in NAMES:
                made[PUBLISHED + name] = paper_table(name)
            continue
        made[name] = table(folder, reference=reference, with_paper=with_paper and (name in NAMES or not everything))
        folders[name] = folder
    if not made:
        raise UserError(
            f"There are no finished runs below {root}: run `fusellm experiment run` (see `experiment list`)."
        )
    return Tables(made, folders, tuple(absent))


def write(found: Tables, out: Path, forms: Sequence[str]) -> list[Path]:
    """Each table below `out` in each of the formats, and the figures of its run (see `harness.reporting.figures`)."""
    from harness.reporting.figures import drawings
    from harness.store.files import write_atomically
    from results.formats import ENDINGS, render

    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name, one in found.made.items():
        stem = out / name.replace("/", "-")
        for form in forms:
            path = stem.with_name(f"{stem.name}.{ENDINGS[form]}")
            write_atomically(path, render(one, form))
            written.append(path)
        for drawing in drawings(found.folders[name], one) if name in found.folders else ():
            written += drawing.draw(stem.with_name(f"{stem.name}-{drawing.name}"))
    return written
