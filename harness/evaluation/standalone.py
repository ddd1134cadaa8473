"""Suites on candidates: their records and tables, in an experiment and by themselves (`fusellm eval`)."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError
from harness.config.loading import load, suite_section
from harness.evaluation.suite import EvaluatedModel, Suite, SuiteResult, suite
from harness.models.checkpoints import ModelSpec, compute_dtype, count_parameters, resolve
from harness.reporting.runs import RUN_FILE, SUITES_FILE, described, hashes, open_run
from harness.runtime.progress import notify
from harness.store.artifacts import Store
from harness.store.costs import Costs
from harness.store.files import write_atomically, write_json
from harness.store.fingerprint import fingerprint
from harness.store.provenance import made_by

if TYPE_CHECKING:
    import pandas as pd

    from results.layout import Table

FOLDER = "evaluations"
_MANY = 12  # tasks that do not fit side by side


def write_measured(
    folder: Path, name: str, measured: SuiteResult, *, experiment: str, profile: str, method: str, seed: int | None
) -> str | None:
    """One record file of a candidate's examples in a suite; its name, or None where there are none."""
    from results.records import NO_SEED, Record, write

    number = NO_SEED if seed is None else seed
    records = [
        Record(experiment=experiment, profile=profile, method=method, seed=number, suite=name, **asdict(example))
        for example in measured.examples()
    ]
    if not records:
        return None
    evaluation = fingerprint(measured.fingerprints)
    slug = "".join(c if c.isalnum() else "-" for c in method)
    file = f"{slug}-{'as-is' if seed is None else seed}-{name}-{evaluation[:16]}.parquet"
    provenance = {
        "evaluation": evaluation,
        "evaluations": measured.fingerprints,
        "artifacts": places(measured.artifacts),
    }
    write(folder / "records" / file, records, provenance)
    return file


def places(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """Where artifacts lie below --root, for the provenance of records."""
    return {name: path.relative_to(path.parents[2]).as_posix() for name, path in artifacts.items()}


def note_suites(folder: Path, suites: Mapping[str, Suite], found: Mapping[str, Mapping[str, SuiteResult]]) -> None:
    """Writes down what tables need beside the records: tasks and their metrics, what was left out by row, and notes.

    `found` is what every suite measured, by row.
    """
    noted = {
        name: {
            "shown": one.shown(),
            "k": getattr(one.section, "k", 1),
            "missing": {row: measured.missing for row, measured in found[name].items()},
            "notes": sorted({note for measured in found[name].values() for note in measured.notes}),
        }
        for name, one in suites.items()
    }
    write_json(folder / SUITES_FILE, noted)


def suite_tables(
    folder: Path,
    records: "pd.DataFrame",
    order: Sequence[str],
    title: str,
    banner: str = "",
    reference: str | None = None,
) -> "dict[str, Table]":
    """The table of every suite that `note_suites` noted: a row a candidate, a column a task, and their average.

    Where there are many tasks they are the rows. Averages are compared with `reference`'s.
    """
    final = records[records["tokens"].isna() & records["method"].isin(list(order))]
    return {
        name: _table(final[final["suite"] == name], name, order, noted, f"{title}: {name}", banner, reference)
        for name, noted in described(folder / SUITES_FILE).items()
    }


def _table(
    records: "pd.DataFrame",
    suite: str,
    order: Sequence[str],
    noted: Mapping[str, Any],
    title: str,
    banner: str,
    reference: str | None,
) -> "Table":
    from results.layout import Table
    from results.metrics import measure
    from results.tables import suite_table, transposed

    missing: dict[str, dict[str, str]] = noted["missing"]
    if noted["k"] != 1:
        at_k = {"passed": f"passed@{noted['k']}"}
        noted = {**noted, "shown": {task: at_k.get(metric, metric) for task, metric in noted["shown"].items()}}
        records = records.assign(metric=records["metric"].replace(at_k))
    there = set(zip(records["task"], records["metric"], strict=True))
    shown = {task: metric for task, metric in noted["shown"].items() if (task, metric) in there}
    notes = list(noted["notes"])
    for task in noted["shown"]:
        if task not in shown:
            why = sorted({reasons[task] for reasons in missing.values() if task in reasons}) or ["not run"]
            notes.append(f"Left out, also of the average: {task}: {'; '.join(why)}.")
    title = f"{title} ({'; '.join(dict.fromkeys(measure(metric).label for metric in shown.values()))})"
    if not shown:
        return Table(title, tuple(order), (), ((),) * len(order), True, 2, banner=banner, notes=tuple(notes))
    reasons = {(row, suite, task): why for row, tasks in missing.items() for task, why in tasks.items()}
    made = suite_table(records, order, shown, reference, suite=suite, title=title, banner=banner, reasons=reasons)
    made = replace(made, notes=(*made.notes, *notes))
    return transposed(made) if len(shown) > _MANY else made


def sections(
    names: Sequence[str],
    *,
    tasks: Sequence[str],
    common: Mapping[str, Any],
    settings: Sequence[str],
    data_root: Path | None,
) -> dict[str, Suite]:
    """The suites of a command line. `common` holds options that each suite takes if it knows them; settings are
    SUITE.KEY=VALUE. Raises UserError for what no suite knows.
    """
    from omegaconf import OmegaConf

    made: dict[str, Suite] = {}
    skipped: list[str] = []
    unknown = {task: UserError("") for task in tasks}
    for item in settings:
        if "=" not in item or item.split(".")[0] not in names:
            raise UserError(f"--set {item} is no setting of {', '.join(names)}: write --set SUITE.KEY=VALUE.")
    own: Any = OmegaConf.to_container(OmegaConf.from_dotlist(list(settings)), resolve=True)
    for name in dict.fromkeys(names):
        kind = suite(name)
        fields = kind.schema.model_fields
        given = {key: value for key, value in common.items() if key in fields and value is not None}
        if name == "perplexity":
            given = load("main", profile="small").suites.perplexity.model_dump()
            if common.get("limit") is not None:
                given["documents"]["per_domain"] = common["limit"]
        merged: Any = OmegaConf.to_container(OmegaConf.merge(given, own.get(name) or {}))
        if tasks and "tasks" in fields:
            known = []
            for task in tasks:
                try:
                    kind(suite_section(name, {**merged, "tasks": [task]}), data_root)
                    known.append(task)
                    unknown.pop(task, None)
                except UserError as error:
                    if task in unknown and "did you mean" not in str(unknown[task]):
                        unknown[task] = error
            if not known:
                skipped.append(name)
                continue
            merged["tasks"] = known
        made[name] = kind(suite_section(name, merged), data_root)
    if unknown:
        raise next(iter(unknown.values()))
    for name in skipped:
        notify(f"{name} is left out: it has none of the tasks that were asked for.")
    return made


def evaluate(
    spec: ModelSpec, suites: Mapping[str, Suite], root: Path, *, device: str, batch_tokens: int = 2048
) -> Path:
    """Measures one model on the suites; the folder with records and tables. What is there is not computed again."""
    resolved = resolve(spec, root / "models")
    dtype = compute_dtype(spec.dtype, device)
    evaluated = EvaluatedModel(
        label=resolved.name,
        fingerprint=resolved.fingerprint,
        spec=spec,
        dtype=dtype,
        device=device,
        batch_tokens=batch_tokens,
        parameters=count_parameters(resolved.folder),
        models_dir=root / "models",
    )
    parts = {name: {"section": one.section.model_dump(mode="json"), **one.identity()} for name, one in suites.items()}
    identity = {"model": resolved.fingerprint, "dtype": dtype, "suites": parts}
    folder = root / FOLDER / resolved.name / fingerprint(identity)[:16]
    (folder / "records").mkdir(parents=True, exist_ok=True)
    costs = Costs(device)
    plan = Store(root / "artifacts", dry=True)
    for one in suites.values():
        one.measure(evaluated, plan, costs)
    # Known from the beginning, so that cleaning up spares what is under way.
    _describe(folder, identity, plan, root, [])
    store = Store(root / "artifacts", info={"configuration": identity})
    files: list[str] = []
    found: dict[str, dict[str, SuiteResult]] = {}
    for name, one in suites.items():
        measured = one.measure(evaluated, store, costs)
        found[name] = {evaluated.label: measured}
        file = write_measured(
            folder, name, measured, experiment="eval", profile=dtype, method=evaluated.label, seed=None
        )
        files += [file] if file else []
    note_suites(folder, suites, found)
    _describe(folder, identity, store, root, files)
    return folder


def _describe(folder: Path, identity: Mapping[str, Any], store: Store, root: Path, files: Sequence[str]) -> None:
    artifacts = sorted(str(p.path.relative_to(root)) for p in store.planned.values())
    description = {"evaluation": identity, **made_by(), "artifacts": artifacts, "records": hashes(folder, files)}
    write_json(folder / RUN_FILE, {**description, "configuration": {}, "finished": time.time()})


def generated(folder: Path) -> list[str]:
    """The files of completions that an evaluation wrote."""
    from harness.evaluation.multipl_e.code_suite import COMPLETIONS

    description = described(folder / RUN_FILE)
    root = folder.parents[2]
    found = (root / name / COMPLETIONS for name in description["artifacts"])
    return [str(path) for path in found if path.exists()]


def tables(folder: Path) -> "dict[str, Table]":
    """The tables of a finished evaluation, by suite; written beside its records, too."""
    from results.formats import FORMATS, render

    _, records = open_run(folder)
    made = suite_tables(folder, records, [folder.parent.name], folder.parent.name)
    for name, table in made.items():
        for form in FORMATS:
            write_atomically(folder / f"table-{name}.{form}", render(table, form))
    return made
