"""Cleaning up: artifacts and leftovers that no run uses. Imports nothing heavy."""

import shutil
from collections.abc import Iterator
from pathlib import Path

from harness.store.artifacts import Store
from harness.store.paths import ARTIFACTS, PLAN_FILE, RUN_FILE, run_files
from harness.store.run_files import read_run_file


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def unused(root: Path) -> Iterator[tuple[Path, int]]:
    """Leftovers of interrupted stages and artifacts that no run lists, each with its size in bytes.

    Raises UserError for a damaged description of a run: what that run uses is not known.
    """
    store = Store(root / ARTIFACTS)
    used = {
        root / name
        for file_name in (RUN_FILE, PLAN_FILE)
        for run_file in run_files(root, file_name)
        for name in read_run_file(run_file)["artifacts"]
    }
    for path in [*store.leftovers(), *(p for p in store.artifacts() if p not in used)]:
        yield path, _size(path)


def remove(root: Path, path: Path) -> None:
    """Removes an artifact or a leftover; renamed first, so that no half-removed artifact is ever found."""
    if not path.is_relative_to(root / ARTIFACTS):
        raise ValueError(f"{path} is no artifact")
    beside = path.with_name(f".{path.name.lstrip('.')}.removed")
    path.replace(beside)
    shutil.rmtree(beside)
