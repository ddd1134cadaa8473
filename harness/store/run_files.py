"""The files that a run writes about itself, and the hashes by which its records are checked."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness.store.files import read_json
from harness.store.fingerprint import file_sha256
from harness.store.paths import RECORDS


def read_run_file(path: Path) -> dict[str, Any]:
    """What a run wrote about itself in a JSON file at `path`; empty where there is none.

    Raises UserError where the file is damaged.
    """
    if not path.exists():
        return {}
    return read_json(path, "remove that file and run the experiment again, with all its seeds")


def record_hashes(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the record files of the run in `folder`, and of the provenance file beside each, by file name."""
    paths = [path.with_suffix(end) for path in (folder / RECORDS / f for f in files) for end in (".parquet", ".json")]
    return {path.name: file_sha256(path) for path in paths}
