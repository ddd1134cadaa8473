"""The files that a run writes about itself, and the hashes by which its records are checked.

`run.json` lists what was measured, one entry for each row, seed and suite: another command that measures the same again
puts its entry in the place of the one before, so that no two files of records can disagree.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from harness.store.files import exclusive_lock, read_json, write_json
from harness.store.fingerprint import file_sha256
from harness.store.paths import PLAN_FILE, RECORDS


def read_run_file(path: Path) -> dict[str, Any]:
    """What a run wrote about itself in a JSON file at `path`; empty where there is none.

    Raises UserError where the file is damaged.
    """
    if not path.exists():
        return {}
    return read_json(path, "remove that file and run the experiment again, with all its seeds")


def list_measured(folder: Path, before: Mapping[str, Any], measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `run.json` says of the measurements of the run in `folder`: `measured` and the hashes of their `records`.

    before: what it said. measured: what was measured since, with row, seed, suite and file (None where there are no
    records). Entries of other rows, seeds and suites are kept.
    """
    key = itemgetter("row", "seed", "suite")
    entries = {key(entry): dict(entry) for entry in [*before.get("measured", []), *measured]}
    written = {entry["file"] for entry in measured} - {None}
    kept = {entry["file"] for entry in entries.values()} - written
    hashes = {n: sha256 for n, sha256 in before.get("records", {}).items() if f"{Path(n).stem}.parquet" in kept}
    return {"measured": list(entries.values()), "records": {**hashes, **record_hashes(folder, written)}}


def note_artifacts(folder: Path, places: Iterable[str]) -> None:
    """Adds artifacts (paths relative to the root) to the plan in a folder of runs, so that no clean-up removes them.

    Raises UserError where the plan is damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(folder / ".lock", f"run {folder.name}"):
        before = read_run_file(folder / PLAN_FILE).get("artifacts", [])
        if after := set(places) - set(before):
            write_json(folder / PLAN_FILE, {"artifacts": sorted(after.union(before))})


def record_hashes(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the record files of the run in `folder`, and of the provenance file beside each, by file name."""
    paths = [path.with_suffix(end) for path in (folder / RECORDS / f for f in files) for end in (".parquet", ".json")]
    return {path.name: file_sha256(path) for path in paths}
