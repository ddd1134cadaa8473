"""Artifacts are hashed once; what a command has made is not offered for deletion, whatever begins or ends meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion.errors import UserError
from harness.store import artifacts, cleanup
from harness.store.artifacts import Spec, Store, key_of
from harness.store.cleanup import unused
from harness.store.paths import command_path
from harness.store.run_files import note_artifacts
from tests.harness.command import answer


def _spec(name: str) -> Spec:
    return Spec("map", name, 1, {}, {"name": name})


def _build(folder: Path) -> None:
    (folder / "map").write_bytes(b"x" * 1500)


def _unused(root: Path) -> set[str]:
    return {path.name for path, _ in unused(root)}


def test_bytes_are_hashed_once_and_again_when_they_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    sha256 = artifacts.file_sha256
    monkeypatch.setattr(artifacts, "file_sha256", lambda file: (hashed.append(file.name), sha256(file))[1])
    path = Store(tmp_path).ensure(_spec("a"), _build)
    assert hashed == ["map"]  # when it was completed
    for _ in range(2):
        Store(tmp_path).verify(path, _spec("a"))
    assert hashed == ["map"]
    hashed.clear()
    Store(tmp_path).verify(path, anew=True)
    assert hashed == ["map"]
    os.utime(path / "map")
    Store(tmp_path).verify(path)
    assert hashed == ["map", "map"]
    raw = (path / "map").read_bytes()
    (path / "map").write_bytes(raw.replace(b"x", b"y"))  # of the same size
    with pytest.raises(UserError, match="does not match its SHA-256"):
        Store(tmp_path).verify(path)
    stat = (path / "map").stat()
    (path / "map").write_bytes(raw)
    Store(tmp_path).verify(path)
    (path / "map").write_bytes(raw.replace(b"x", b"y"))
    os.utime(path / "map", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match="does not match its SHA-256"):
        Store(tmp_path).verify(path)
    (path / "map").write_bytes(raw)
    Store(tmp_path).verify(path)
    (tmp_path / "other").write_bytes(raw.replace(b"x", b"y"))
    os.utime(tmp_path / "other", ns=(stat.st_atime_ns, (path / "map").stat().st_mtime_ns))
    (tmp_path / "other").replace(path / "map")  # of the same size and time
    for anew in (False, True):
        with pytest.raises(UserError, match="does not match its SHA-256"):
            Store(tmp_path).verify(path, anew=anew)


def test_what_a_command_lists_is_in_use(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    store.ensure(_spec("of nobody"), _build)
    folder = command_path(tmp_path, "main", "small", "extract")
    with store.in_use(folder):
        store.ensure(_spec("extracted"), _build)
    assert {name.rpartition("-")[0] for name in _unused(tmp_path)} == {"of-nobody"}
    status, said, _ = answer("artifact", "gc", "--root", tmp_path)
    assert status == 0 and "of-nobody" in said and "--yes removes these 1 folders and frees" in said
    assert answer("artifact", "gc", "--yes", "--root", tmp_path)[1].endswith(" in 1 folders are freed.\n")
    assert [path.name.rpartition("-")[0] for path in store.artifacts()] == ["extracted"]


def test_the_unfinished_state_of_what_a_run_lists_is_kept(tmp_path: Path) -> None:
    """A killed extraction goes on from its shards, but not after a clean-up that takes them."""
    store = Store(tmp_path / "artifacts")
    partial = store._partial_folder(_spec("a"))
    partial.mkdir(parents=True)
    assert _unused(tmp_path) == {partial.name}
    note_artifacts(tmp_path / "runs/main/small/run", [f"artifacts/map/{_spec('a').folder_name}"])
    assert _unused(tmp_path) == set()
    store.ensure(_spec("a"), _build)
    partial.mkdir()
    assert _unused(tmp_path) == {partial.name}  # superfluous by now


@pytest.mark.parametrize("ended", [False, True])
def test_what_a_process_begins_to_use_is_not_removed(
    ended: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that starts after the list was printed, and has ended or not before the folders are removed."""
    root = tmp_path / "root"
    path = Store(root / "artifacts").ensure(_spec("a"), _build)
    assert _unused(root) == {path.name}
    store, using = Store(root / "artifacts"), None
    using = store.in_use(None if not ended else command_path(root, "main", "small", "audit"))
    using.__enter__()
    store.ensure(_spec("a"), lambda folder: pytest.fail("made again"))
    if ended:
        using.__exit__(None, None, None)
    assert unused(root, remove=True) == [] and path.exists()
    if not ended:
        using.__exit__(None, None, None)
        assert [p for p, _ in unused(root, remove=True)] == [path] and not path.exists()
        assert not list((root / "artifacts").glob("map/.*removed"))


def test_nothing_begins_to_be_used_while_folders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that asks for an artifact meanwhile waits, and makes it again."""
    root = tmp_path / "root"
    path = Store(root / "artifacts").ensure(_spec("a"), _build)
    code = (
        "import sys, pathlib; from harness.store.artifacts import Store, Spec\n"
        "store = Store(pathlib.Path(sys.argv[1]) / 'artifacts')\n"
        "with store.in_use():\n"
        "    print('asks', flush=True)\n"
        "    store.ensure(Spec('map', 'a', 1, {}, {'name': 'a'}), lambda folder: (folder / 'again').touch())"
    )
    started: list[subprocess.Popen[str]] = []

    def size(folder: Path) -> int:
        started.append(subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True))
        assert started[0].stdout is not None and started[0].stdout.readline() == "asks\n"
        return 0

    monkeypatch.setattr(cleanup, "_size", size)
    assert unused(root, remove=True) == [(path, 0)]
    assert started[0].wait(60) == 0
    assert [file.name for file in path.iterdir() if file.name != "manifest.json"] == ["again"]


def test_the_key_of_a_folder_is_that_of_its_artifact(tmp_path: Path) -> None:
    store, spec = Store(tmp_path), _spec("a.b-c")
    partial = store._partial_folder(spec)
    assert key_of(partial) == key_of(store.path(spec)) == key_of(partial.with_suffix(".leases"))
