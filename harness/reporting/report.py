"""The report of finished runs: one HTML page from their records, the manifests of artifacts, and stored answers."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusion.errors import UserError
from harness.reporting.export import equal_quality
from harness.reporting.figures import drawings
from harness.reporting.runs import Run, newest_runs, open_run, resolve_run
from harness.reporting.tables import held_out_table, run_table, suite_tables
from harness.runtime.progress import notify
from harness.store.artifacts import read_manifest
from harness.store.files import make_folder, write_atomically
from harness.store.fingerprint import canonical
from harness.store.paths import RECORDS
from results.errors import UserError as RecordsError
from results.report import Answer, Cost, Figure, Provenance, ReportedExample, RunPage, Task, findings, page

if TYPE_CHECKING:
    from harness.evaluation.suite import StoredAnswer
    from results.table import Table

PAGE = "report.html"


def report(
    root: Path, runs: Sequence[str], profile: str | None, out: Path, *, examples: int, reference: str | None = None
) -> tuple[Path, list[Path]]:
    """Writes one page about `runs` into the folder `out`; gives its path and the folders of the runs on it.

    runs: names of experiments (the newest run of each) or folders of runs. Default: the newest run of every experiment.
    examples: how many of each task can be read on the page; those about which methods disagree come first. reference:
    the row that the others are compared with. Default: that of each experiment. Raises UserError for a run that is not
    there.
    """
    folders = [resolve_run(root, name, profile) for name in runs] or newest_runs(root, profile)
    pages: dict[Path, RunPage] = {}
    for folder in folders:
        try:
            pages[folder] = read(open_run(folder), examples=examples, reference=reference)
        except (UserError, RecordsError) as error:
            if runs or len(folders) == 1:
                raise
            notify(f"A run is left out: {error}")
    if not pages:
        raise UserError("Every run is damaged, as the lines above say: run the experiments again.")
    make_folder(out, "--out")
    title = next(iter(pages.values())).title if len(pages) == 1 else f"{len(pages)} experiments"
    write_atomically(out / PAGE, page(list(pages.values()), title))
    return out / PAGE, list(pages)


@dataclass(frozen=True)
class _Evaluated:
    """One record file: the method, seed and suite of its records, and its provenance."""

    file: str
    sha256: str
    method: str
    seed: int
    suite: str
    provenance: Mapping[str, Any]

    @property
    def by_task(self) -> dict[str, str]:
        """Fingerprints of the artifacts by task (or a name for all of them)."""
        return self.provenance.get("evaluations") or {self.suite: self.provenance.get("evaluation", "")}


def read(run: Run, *, examples: int, reference: str | None = None) -> RunPage:
    """Everything that the page shows of a run. examples, reference: as for `report`."""
    description, configuration = run.description, run.configuration
    artifacts = description.get("artifacts", [])
    one_model = run.reference is None and reference is None  # its evaluation has no table of methods
    main = None if one_model else run_table(run, reference=reference)
    manifests = {m["fingerprint"]: (path, m) for path, m in _manifests(run.root, artifacts)}
    order = list(run.methods)
    evaluated = sorted(
        _evaluated(run.folder, description["records"]), key=lambda file: (order.index(file.method), file.seed)
    )
    finished = datetime.fromtimestamp(description["finished"], UTC)
    costs = list(_costs(manifests.values()))
    gone = len(artifacts) - len(manifests)
    facts = {
        "experiment": run.experiment,
        "profile": run.profile,
        "methods": len(run.methods),
        "seeds": ", ".join(map(str, run.seeds)) or "none",
        "examples": f"{len(run.records[['suite', 'task', 'example']].drop_duplicates()):,}",
        "finished": f"{finished:%Y-%m-%d %H:%M} UTC",
        "time of all stages": f"{sum(cost.seconds for cost in costs) / 60:.1f} min",
        "commit": (description.get("commit") or "")[:12] or "not from a checkout",
    }
    return RunPage(
        name=f"{run.experiment}, {run.profile}",
        title=run.title,
        banner=run.banner,
        facts=[(key, str(text)) for key, text in facts.items()],
        findings=[*([f"Values: {main.measured_in}.", *findings(main)] if main else []), *equal_quality(run.folder)],
        tables=[*([main] if main else []), *_other_tables(run, reference)],
        figures=list(_figures(run, main)) if main else [],
        tasks=list(_tasks(evaluated, manifests, run.suites, examples)),
        costs=costs,
        configuration=yaml.safe_dump(dict(configuration), sort_keys=False, allow_unicode=True),
        evaluations=[_evaluation(file, manifests) for file in evaluated],
        artifacts=[_artifact(path, run.root, manifest, manifests) for path, manifest in manifests.values()],
        notes=[
            "A stage that other runs share is counted here, too. Tokens are those that a model was trained on or read "
            "in an extraction.",
            *([f"{gone} artifacts have been removed since; nothing is known of them here."] if gone else []),
        ],
    )


def _manifests(root: Path, names: Sequence[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for name in sorted(names):
        if (root / name).is_dir():
            yield root / name, read_manifest(root / name)


def _evaluated(folder: Path, files: Mapping[str, str]) -> Iterator[_Evaluated]:
    import pyarrow.parquet as pq

    for name in sorted(files):
        path = folder / RECORDS / name
        if path.suffix != ".parquet" or not path.exists():
            continue
        provenance_file = path.with_suffix(".json")
        first = pq.read_table(path, columns=["method", "seed", "suite"]).slice(0, 1).to_pylist()[0]
        provenance = {"evaluation": ""}
        if provenance_file.exists():
            provenance = json.loads(provenance_file.read_text(encoding="utf-8"))
        yield _Evaluated(name, files[name], **first, provenance=provenance)


def _other_tables(run: Run, reference: str | None) -> "list[Table]":
    from results.paper_layouts import LAYOUTS

    layout, tables = LAYOUTS.get(run.experiment), []
    if layout and layout.columns and "perplexity" in set(run.records["suite"]):
        tables.append(held_out_table(run, reference))  # which the paper's table lacks
    if layout and (layout.methods_across or not layout.columns):
        return tables  # the paper's table shows every task already
    return [*tables, *suite_tables(run, reference).values()]


def _figures(run: Run, table: "Table") -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        for drawing in drawings(run, table):
            for path in drawing.draw(Path(folder, "figure")):
                if path.suffix == ".svg":
                    yield Figure(drawing.caption, path.read_bytes())


_Manifests = Mapping[str, tuple[Path, dict[str, Any]]]


def _tasks(
    evaluated: Sequence[_Evaluated], manifests: _Manifests, noted: Mapping[str, Any], limit: int
) -> Iterator[Task]:
    """The examples of every task whose answers were kept, of all methods and seeds."""
    seeds = {file.seed for file in evaluated if file.seed >= 0}
    by_task: dict[tuple[str, str], dict[str, dict[str, StoredAnswer]]] = {}
    for file in evaluated:
        label = f"{file.method} (seed {file.seed})" if file.seed >= 0 and len(seeds) > 1 else file.method
        for task, fingerprint in file.by_task.items():
            metric = noted.get(file.suite, {}).get("metrics", {}).get(task)
            if metric is None or fingerprint not in manifests:
                continue
            for answer in _stored_answers(file.suite, manifests[fingerprint][0], metric):
                by_task.setdefault((file.suite, task), {}).setdefault(answer.example, {})[label] = answer
    for (suite, task), by_example in sorted(by_task.items()):
        examples = [_reported(rows) for _, rows in sorted(by_example.items())]
        differing_first = sorted(examples, key=lambda one: len({a.score > 0.5 for a in one.answers.values()}) < 2)
        kept = sorted(differing_first[:limit], key=lambda one: one.example)
        yield Task(f"{suite}: {task}", noted[suite]["metrics"][task], len(examples), kept)


def _reported(rows: "Mapping[str, StoredAnswer]") -> ReportedExample:
    """One example with the answers of all methods, by label."""
    first = next(iter(rows.values()))
    answers = {label: Answer(row.answer, row.score) for label, row in rows.items()}
    return ReportedExample(first.example, first.prompt, first.target, answers)


def _stored_answers(suite: str, folder: Path, metric: str) -> "Iterator[StoredAnswer]":
    """The answers that a suite's artifact holds; none where the package that offers the suite has been removed."""
    from harness.evaluation.suite import SUITES

    try:
        kind = SUITES.get(suite)
    except UserError:
        return
    yield from kind.answers(folder, metric)


def _costs(manifests: Any) -> Iterator[Cost]:
    from harness.stages.training_log import tokens_seen

    groups: dict[tuple[str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for path, manifest in manifests:
        label = str(manifest["info"].get("candidate", manifest["label"]))  # the tasks of a suite are one line
        groups.setdefault((manifest["kind"], label), []).append((path, manifest))
    for (kind, label), parts in sorted(groups.items()):
        trained = kind in ("train", "continued_model")
        tokens = [tokens_seen(path) if trained else manifest["info"].get("tokens") for path, manifest in parts]
        yield Cost(
            kind,
            label,
            None if None in tokens else sum(n for n in tokens if n is not None),
            _covered([_interval(manifest) for _, manifest in parts]),
            max(manifest["peak_memory_bytes"] for _, manifest in parts),
            sum(file["bytes"] for _, manifest in parts for file in manifest["files"].values()),
        )


def _interval(manifest: Mapping[str, Any]) -> tuple[float, float]:
    start = datetime.strptime(manifest["created"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    return start, start + manifest["duration_s"]


def _covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Seconds in at least one of the intervals: tasks that share a model's batches were made at the same time."""
    total, end = 0.0, -1.0
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def _evaluation(file: _Evaluated, manifests: _Manifests) -> Provenance:
    fingerprint = str(file.provenance.get("evaluation", ""))
    seed = f", seed {file.seed}" if file.seed >= 0 else ""
    facts = {
        "record file": f"records/{file.file}",
        "its SHA-256": file.sha256,
        "evaluation": fingerprint,
        **{key: file.provenance[key] for key in ("candidate",) if key in file.provenance},
    }
    sources = [f for f in file.by_task.values() if f in manifests]
    return Provenance(fingerprint, f"{file.method}{seed}, {file.suite}", _facts(facts), sources)


def _artifact(path: Path, root: Path, manifest: Mapping[str, Any], known: _Manifests) -> Provenance:
    facts = {
        "folder": path.relative_to(root),
        "fingerprint": manifest["fingerprint"],
        "made": manifest["created"],
        "command line": " ".join(manifest.get("command", [])),
        "git commit": manifest.get("commit") or "not from a checkout",
        "package versions": ", ".join(f"{name} {version}" for name, version in manifest["libraries"].items()),
        "parameters": manifest["params"],
        "inputs (hashes of texts, models and rows)": manifest["inputs"],
        "resolved configuration": "in its manifest.json, under info.configuration",
    }
    sources = sorted({one for one in _strings(manifest["inputs"]) if one in known})
    return Provenance(manifest["fingerprint"], f"{manifest['kind']}: {manifest['label']}", _facts(facts), sources)


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, canonical(one) if isinstance(one, dict) else str(one)) for name, one in facts.items()]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, str):
        yield value
