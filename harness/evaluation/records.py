"""Records of what suites measured, and the notes that tables need beside them."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from harness.evaluation.suite import Suite, SuiteResult
from harness.store.files import write_json
from harness.store.fingerprint import fingerprint
from harness.store.paths import RECORDS, SUITES_FILE, place_of_artifact


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
) -> str | None:
    """Writes one record file of a candidate's examples in a suite; its name, or None where there are no examples.

    experiment, profile, method, seed: what every record is stamped with; seed None for a candidate without. candidate:
    the candidate's fingerprint, for the provenance beside the records.
    """
    from results.records import NO_SEED, Record, write

    number = NO_SEED if seed is None else seed
    records = [
        Record(experiment=experiment, profile=profile, method=method, seed=number, suite=name, **asdict(example))
        for example in result.examples()
    ]
    if not records:
        return None
    evaluation = fingerprint(result.fingerprints)
    slug = "".join(c if c.isalnum() else "-" for c in method)
    file = f"{slug}-{'as-is' if seed is None else seed}-{name}-{evaluation[:16]}.parquet"
    provenance = {
        "evaluation": evaluation,
        "candidate": candidate,
        "evaluations": result.fingerprints,
        "artifacts": places(result.artifacts),
    }
    write(folder / RECORDS / file, records, provenance)
    return file


def places(artifacts: Mapping[str, Path]) -> dict[str, str]:
    """Paths of artifacts relative to the root folder, for the provenance of records."""
    return {name: place_of_artifact(path) for name, path in artifacts.items()}


def note_suites(folder: Path, suites: Mapping[str, Suite], results: Mapping[str, Mapping[str, SuiteResult]]) -> None:
    """Writes what tables need beside the records: tasks and their metrics, what was left out by row, and notes.

    results: what every suite measured, by row.
    """
    noted = {
        name: {
            "metrics": suite.task_metrics(),
            "k": getattr(suite.config, "k", 1),
            "missing": {row: result.missing for row, result in results[name].items()},
            "notes": sorted({note for result in results[name].values() for note in result.notes}),
        }
        for name, suite in suites.items()
    }
    write_json(folder / SUITES_FILE, noted)
