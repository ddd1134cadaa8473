"""The report of finished runs, put together from what they left behind: records, manifests and the suites' answers."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fusion.errors import UserError
from harness.reporting.figures import drawings
from harness.reporting.runs import (
    RUN_FILE,
    SUITES_FILE,
    described,
    find_run,
    open_run,
    opened,
    run_folder,
    table,
    text_table,
)
from harness.store.artifacts import read_manifest
from harness.store.files import write_atomically
from harness.store.fingerprint import canonical
from results.report import Answer, Asked, Cost, Entry, Figure, Run, Task, findings, page

if TYPE_CHECKING:
    import pandas as pd

    from results.layout import Table

PAGE = "report.html"
_SHORT = 16  # characters of a fingerprint that tell it from others


def report(root: Path, runs: Sequence[str], profile: str | None, out: Path, *, examples: int) -> Path:
    """Writes the page about `runs`: names of experiments (the newest run of each) or runs' folders; all without any.

    examples: how many of a task are kept for reading, those first about which methods disagree. Raises UserError for
    what is not there.
    """
    folders = [run_folder(root, name, profile) for name in runs] or _all(root, profile)
    made = [read(folder, examples=examples) for folder in folders]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / PAGE, page(made, made[0].title if len(made) == 1 else f"{len(made)} experiments"))
    return out / PAGE


def _all(root: Path, profile: str | None) -> list[Path]:
    names = sorted({path.parents[2].name for path in (root / "runs").glob(f"*/{profile or '*'}/*/{RUN_FILE}")})
    if not names:
        raise UserError(
            f"There are no finished runs below {root}: run `fusellm experiment run` (see `experiment list`)."
        )
    return [find_run(root, name, profile) for name in names]


@dataclass(frozen=True)
class _Evaluated:
    """One record file: what it holds, and what its provenance says."""

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


def read(folder: Path, *, examples: int) -> Run:
    """Everything that the page says about the run in `folder`."""
    description = opened(folder)
    artifacts = description.get("artifacts", [])
    configuration, records = open_run(folder)
    made = table(folder)
    root = folder.resolve().parents[3]
    manifests = {m["fingerprint"]: (path, m) for path, m in _manifests(root, artifacts)}
    order = list(configuration["methods"])
    evaluated = sorted(_evaluated(folder, description["records"]), key=lambda one: (order.index(one.method), one.seed))
    noted = described(folder / SUITES_FILE)
    name = f"{configuration['experiment']}, {configuration['profile']}"
    seeds = sorted({int(seed) for seed in records["seed"].unique() if seed >= 0})
    finished = datetime.fromtimestamp(description["finished"], UTC)
    costs = list(_costs(manifests.values()))
    gone = len(artifacts) - len(manifests)
    facts = {
        "experiment": configuration["experiment"],
        "profile": configuration["profile"],
        "methods": len(configuration["methods"]),
        "seeds": ", ".join(map(str, seeds)) or "none",
        "examples": f"{len(records[['suite', 'task', 'example']].drop_duplicates()):,}",
        "finished": f"{finished:%Y-%m-%d %H:%M} UTC",
        "time of all stages": f"{sum(cost.seconds for cost in costs) / 60:.1f} min",
        "commit": (description.get("commit") or "")[:12] or "not from a checkout",
    }
    return Run(
        name=name,
        title=f"{configuration['title']} ({name})",
        banner=configuration["banner"] or "",
        facts=[(key, str(text)) for key, text in facts.items()],
        findings=[*findings(made), *_equal_quality(folder)],
        tables=[made, *_other_tables(folder, configuration, records)],
        figures=list(_figures(folder, made)),
        tasks=list(_tasks(evaluated, manifests, noted, examples)),
        costs=costs,
        configuration=yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True),
        evaluations=[_evaluation(one, manifests) for one in evaluated],
        artifacts=[_artifact(path, root, manifest, manifests) for path, manifest in manifests.values()],
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
        path = folder / "records" / name
        if path.suffix != ".parquet" or not path.exists():
            continue
        beside = path.with_suffix(".json")
        first = pq.read_table(path, columns=["method", "seed", "suite"]).slice(0, 1).to_pylist()[0]
        provenance = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {"evaluation": ""}
        yield _Evaluated(name, files[name], **first, provenance=provenance)


def _other_tables(folder: Path, configuration: Mapping[str, Any], records: "pd.DataFrame") -> "list[Table]":
    from harness.evaluation.standalone import suite_tables
    from results.paper_layouts import LAYOUTS

    rows, banner, reference = (configuration[key] for key in ("methods", "banner", "reference"))
    layout, found = LAYOUTS.get(configuration["experiment"]), []
    if layout and layout.columns and "perplexity" in set(records["suite"]):  # the paper's table has no held-out text
        found.append(text_table(configuration, records, reference))
    if layout and (layout.methods_across or not layout.columns):  # it shows every task already
        return found
    title = f"{configuration['title']} ({configuration['experiment']}, {configuration['profile']})"
    return [*found, *suite_tables(folder, records, list(rows), title, banner or "", reference).values()]


def _equal_quality(folder: Path) -> list[str]:
    path = folder / "equal_quality.txt"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _figures(folder: Path, made: "Table") -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as beside:
        for drawing in drawings(folder, made):
            for path in drawing.draw(Path(beside, "figure")):
                if path.suffix == ".svg":
                    yield Figure(drawing.caption, path.read_bytes())


_Manifests = Mapping[str, tuple[Path, dict[str, Any]]]


def _tasks(
    evaluated: Sequence[_Evaluated], manifests: _Manifests, noted: Mapping[str, Any], limit: int
) -> Iterator[Task]:
    """The examples of every task whose answers were kept, of all methods and seeds."""
    seeds = {one.seed for one in evaluated if one.seed >= 0}
    found: dict[tuple[str, str], dict[str, dict[str, tuple[str, str, Answer]]]] = {}
    for one in evaluated:
        label = f"{one.method} (seed {one.seed})" if one.seed >= 0 and len(seeds) > 1 else one.method
        for task, fingerprint in one.by_task.items():
            metric = noted.get(one.suite, {}).get("shown", {}).get(task)
            if metric is None or fingerprint not in manifests:
                continue
            for example, prompt, target, answer in _answers(manifests, fingerprint, metric):
                found.setdefault((one.suite, task), {}).setdefault(example, {})[label] = (prompt, target, answer)
    for (suite, task), by_example in sorted(found.items()):
        metric = noted[suite]["shown"][task]
        everything = [
            Asked(
                example,
                *next(iter(said.values()))[:2],
                {label: answer for label, (_, _, answer) in said.items()},
            )
            for example, said in sorted(by_example.items())
        ]
        differing = sorted(everything, key=lambda asked: len({a.score > 0.5 for a in asked.answers.values()}) < 2)
        kept = sorted(differing[:limit], key=lambda asked: asked.example)
        yield Task(f"{suite}: {task}", metric, len(everything), kept)


def _answers(manifests: _Manifests, fingerprint: str, metric: str) -> Iterator[tuple[str, str, str, Answer]]:
    """Example, prompt, target and answer from a suite's artifact; nothing where it keeps none in a form known here."""
    from harness.evaluation.lm_eval import suites
    from harness.evaluation.multipl_e import code_suite

    path, _ = manifests[fingerprint]
    if (path / suites.EXAMPLES).exists():
        for line in suites.read_lines(path / suites.EXAMPLES):
            if metric in line["scores"]:
                yield str(line["example"]), *_of_lm_eval(line, metric)
    elif (path / code_suite.RESULTS).exists():
        for line in suites.read_lines(path / code_suite.RESULTS):
            passing = [bool(r["strict"] if metric == "passed" else r["exit_code"] == 0) for r in line["results"]]
            first = line["results"][0]
            text = f"{first['program'].removeprefix(line['prompt']).removesuffix(line['tests']).strip()}"
            said = f"{text}\n\n[{first['status']}; {sum(passing)} of {len(passing)} samples pass]"
            yield (
                line["name"],
                line["prompt"],
                "programs that pass the tests",
                Answer(said, sum(passing) / len(passing)),
            )


def _of_lm_eval(line: Mapping[str, Any], metric: str) -> tuple[str, str, Answer]:
    choices, target, answers = line["choices"], line["target"], line["answer"]
    question, score = line["question"] or "", float(line["scores"][metric])
    if choices and all(isinstance(one, list) for one in answers):
        likelihoods = [float(one[0]) for one in answers[: len(choices)]]
        by = [v / len(c) for v, c in zip(likelihoods, choices, strict=True)] if metric == "acc_norm" else likelihoods
        best = by.index(max(by))
        lines = [
            f"{'→' if i == best else ' '} {choice}  ({value:.2f} nats)"
            for i, (choice, value) in enumerate(zip(choices, likelihoods, strict=True))
        ]
        right = choices[target] if isinstance(target, int) and target < len(choices) else target
        return question, str(right), Answer("\n".join(lines), score)
    if isinstance(answers[0], list):
        likelihood, greedy = answers[0][:2]
        said = f"{'the likeliest' if greedy else 'not the likeliest'} continuation ({float(likelihood):.2f} nats)"
    else:
        said = str(answers[0])
    right = ", ".join(map(str, target)) if isinstance(target, list) else str(target)
    return question, right, Answer(said, score)


def _costs(made: Any) -> Iterator[Cost]:
    from harness.stages.training_log import tokens_seen

    groups: dict[tuple[str, str], list[tuple[Path, dict[str, Any]]]] = {}
    for path, manifest in made:
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


def _evaluation(one: _Evaluated, manifests: _Manifests) -> Entry:
    fingerprint = str(one.provenance.get("evaluation", ""))
    seed = f", seed {one.seed}" if one.seed >= 0 else ""
    facts = {
        "record file": f"records/{one.file}",
        "its SHA-256": one.sha256,
        "evaluation": fingerprint,
        **{key: one.provenance[key] for key in ("candidate", "method") if key in one.provenance},
    }
    sources = [f for f in one.by_task.values() if f in manifests]
    return Entry(fingerprint, f"{one.method}{seed}, {one.suite}", _facts(facts), sources)


def _artifact(path: Path, root: Path, manifest: Mapping[str, Any], known: _Manifests) -> Entry:
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
    return Entry(manifest["fingerprint"], f"{manifest['kind']}: {manifest['label']}", _facts(facts), sources)


def _facts(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, canonical(one) if isinstance(one, dict) else str(one)) for name, one in facts.items()]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, str):
        yield value
