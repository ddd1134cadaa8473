"""Leases: one owner each, given back by the living, taken over from the dead."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.store import leases
from harness.store.leases import Leases, in_use


def _write_lease(folder: Path, part: str, owner: list[object], *, silent_s: float = 0) -> None:
    path = folder / f"{part}.lease"
    path.write_text(json.dumps(owner), encoding="utf-8")
    beat = time.time() - silent_s
    os.utime(path, (beat, beat))


def test_one_of_several_has_a_part_and_gives_it_back(tmp_path: Path) -> None:
    with Leases(tmp_path) as one, Leases(tmp_path) as two:
        assert one.take("a")
        assert not two.take("a")
        assert one.take("b")
        assert not two.take("a")  # finished, but perhaps not yet to be seen by all
        assert in_use(tmp_path)
    assert not in_use(tmp_path)
    with Leases(tmp_path) as three:
        assert three.take("a")


def test_a_process_that_was_killed_has_no_leases(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from harness.store.leases import Leases\n"
        "with Leases(pathlib.Path(sys.argv[1])) as c: c.take('a'); print('taken', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other, Leases(tmp_path) as ours:
        assert other.stdout is not None and other.stdout.readline() == "taken\n"
        assert not ours.take("a")
        other.kill()
        other.wait()
        assert ours.take("a")


@pytest.mark.parametrize(
    ("owner", "silent_s", "taken"),
    [
        (["another machine", 1, 0.0], 0, False),
        (["another machine", 1, 0.0], leases.LEASE_TIMEOUT_S + 60, True),
        ([leases._machine(), os.getpid(), leases._started(os.getpid())], 0, False),
        ([leases._machine(), os.getpid(), 1e9], 0, True),  # an earlier process had our number
        ([leases._machine(), os.getpid(), leases._started(os.getpid())], leases.LEASE_TIMEOUT_S + 60, True),
    ],
)
def test_who_is_dead(tmp_path: Path, owner: list[object], silent_s: float, taken: bool) -> None:
    _write_lease(tmp_path, "a", owner, silent_s=silent_s)
    with Leases(tmp_path) as ours:
        assert ours.take("a") is taken


def test_the_living_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.01)
    with Leases(tmp_path) as ours:
        ours.take("a")
        ours.take("b")
        for part in ("a", "b"):
            os.utime(tmp_path / f"{part}.lease", (0, 0))
        deadline = time.monotonic() + 60
        while (tmp_path / "b.lease").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "b.lease").stat().st_mtime > 0
        assert (tmp_path / "a.lease").stat().st_mtime == 0  # what is finished needs no voice


def test_a_folder_that_is_gone_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    folder.mkdir()
    with Leases(folder) as ours:
        shutil.rmtree(folder)
        with pytest.raises(FileNotFoundError):
            ours.take("a")
