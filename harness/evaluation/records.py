"""Records of what suites measured, and the notes that tables need beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.evaluation.suite import Suite, SuiteResult
from harness.store.files import write_json
from harness.store.fingerprint import fingerprint
from harness.store.paths import RECORDS, SUITES_FILE, place_of_artifact, safe_name


def write_records(
    folder: Path,
    name: str,
    result: SuiteResult,
    *,
    candidate: str,
    experiment: str,
    profile: str,
    method: str,
    seed: int | None,
) -> dict[str, Any]:
    """Writes one record file of a candidate's examples in a suite; gives the entry of `run.json` about it.

    Its `file` is the file's name, None where there are no examples.

    experiment, profile, method, seed: what every record is stamped with; seed None for a candidate without. candidate:
    the candidate's fingerprint, for the provenance beside the records.
    """
    from results.records import NO_SEED, Record, write

    number = NO_SEED if seed is None else seed
    records = [
        Record(experiment=experiment, profile=profile, method=method, seed=number, suite=name, **asdict(example))
        for example in result.examples()
    ]
    entry: dict[str, Any] = {"row": method, "seed": seed, "suite": name}
    entry |= {"missing": result.missing, "notes": result.notes, "skipped": result.skipped, "dtype": result.dtype}
    if not records:
        return {**entry, "file": None}
    evaluation = fingerprint(result.fingerprints)
    slug = safe_name(method)
    if slug != method:  # another label may have the same one
        slug += f"-{fingerprint(method)[:8]}"
    file = f"{slug}-{'as-is' if seed is None else seed}-{name}-{evaluation[:16]}.parquet"
    provenance = {
        "evaluation": evaluation,
        "candidate": candidate,
        "evaluations": result.fingerprints,
        "artifacts": places(result.artifacts),
    }
    write(folder / RECORDS / file, records, provenance)
    return {**entry, "file": file}


def places(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """Paths of artifacts relative to the root folder, for the provenance of records."""
    return {name: place_of_artifact(path) for name, path in artifacts.items()}


def note_suites(folder: Path, suites: Mapping[str, Suite], measured: Sequence[Mapping[str, Any]]) -> None:
    """Writes what tables need beside the records: tasks and their metrics, what was left out by row, notes, and
    the examples that could not be measured for every row.

    measured: the entries of `run.json`, of all rows, seeds and suites.
    """
    noted: dict[str, Any] = {}
    for name, suite in suites.items():
        of_suite = [entry for entry in measured if entry["suite"] == name]
        missing: dict[str, dict[str, str]] = {}
        skipped: dict[str, set[str]] = {}
        for entry in of_suite:
            missing.setdefault(entry["row"], {}).update(entry["missing"])
            for task, examples in entry["skipped"].items():
                skipped.setdefault(task, set()).update(examples)
        precision = _precision(name, of_suite)
        noted[name] = {
            "metrics": suite.task_metrics(),
            "k": getattr(suite.config, "k", 1),
            "missing": missing,
            "notes": sorted({note for entry in of_suite for note in [*entry["notes"], *precision]}),
            "skipped": {task: sorted(examples) for task, examples in skipped.items()},
        }
    write_json(folder / SUITES_FILE, noted)


def _precision(suite: str, entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence about the precision that the rows of a suite were computed in; [] where it is not known."""
    rows: dict[str, dict[str, None]] = {}
    for entry in entries:
        if entry["dtype"]:
            rows.setdefault(entry["dtype"], {})[entry["row"]] = None
    if len(rows) == 1:
        return [f"{suite} is computed in {next(iter(rows))}."]
    listed = "; ".join(f"{dtype}: {', '.join(labels)}" for dtype, labels in sorted(rows.items()))
    return [f"{suite} is computed in several precisions ({listed})."] if rows else []
