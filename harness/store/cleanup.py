"""Cleaning up: artifacts and leftovers that no run uses. Imports nothing heavy."""

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from harness.store.artifacts import Store, key_of, leases_of
from harness.store.leases import in_use
from harness.store.paths import ARTIFACTS, PLAN_FILE, RUN_FILE, run_files
from harness.store.run_files import read_run_file


def unused(root: Path, *, remove: bool = False) -> list[tuple[Path, int]]:
    """Leftovers of interrupted stages and artifacts that no run or command lists, each with its size in bytes.

    What a running process uses is not among them, nor the unfinished state of what a run lists, which goes on from it.
    With `remove` they are gone afterwards: renamed first, so that no half-removed artifact is ever found.

    Raises UserError for a damaged description of a run: what that run uses is not known.
    """
    store = Store(root / ARTIFACTS)
    removed: list[Path] = []
    with store.clean_up_lock() if remove and store.root.is_dir() else contextlib.nullcontext():
        # Read while no process can begin to use anything: what one that has ended meanwhile has made is listed.
        used, listed = store.names_in_use(), _listed(root)
        complete = {key_of(path): path for path in store.artifacts()}
        left = [
            path
            for path in leftovers(store)
            if path.suffix != ".partial" or key_of(path) not in used | (listed - complete.keys())
        ]
        paths = [*left, *(path for key, path in complete.items() if key not in used | listed)]
        sizes = [(path, _size(path)) for path in paths]
        for path in paths if remove else ():
            beside = path.with_name(f".{path.name.lstrip('.')}.{uuid.uuid4().hex}.removed")
            path.replace(beside)
            removed.append(beside)
    for path in removed:
        shutil.rmtree(path)
    return sizes


def leftovers(store: Store) -> Iterator[Path]:
    """Folders that interrupted stages and clean-ups left behind; none that a running process is using."""
    from filelock import FileLock, Timeout

    ends = ("partial", "leases", "ranks", "removed")
    for folder in sorted(p for end in ends for p in store.root.glob(f"*/.*.{end}")):
        if folder.suffix == ".leases" and folder.with_suffix(".partial").exists():
            continue  # the leases belong to an unfinished artifact, which is listed itself
        try:
            with FileLock(folder.with_suffix(".lock"), timeout=0):
                pass
        except Timeout:
            continue
        if not in_use(leases_of(folder)):
            yield folder


def _listed(root: Path) -> set[str]:
    """The keys of the artifacts that runs, evaluations and other commands list."""
    return {
        key_of(root / name)
        for file_name in (RUN_FILE, PLAN_FILE)
        for run_file in run_files(root, file_name)
        for name in read_run_file(run_file)["artifacts"]
    }


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
