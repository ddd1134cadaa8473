"""What a run survives: kills, signals, a full disk, a read-only folder, another process beside it.

Afterwards the next start gives the same table byte for byte, or one sentence refuses; nothing half-written has its
final name.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import typer
from filelock import FileLock

from harness import cli
from harness.runtime import progress
from harness.store.artifacts import Store
from harness.store.cleanup import leftovers, unused
from harness.store.files import exclusive_lock
from tests.harness.command import answer, assert_whole, results, sentence, start
from tests.shared import needed

pytestmark = pytest.mark.slow
RUN = ("experiment", "run")


def _kill_at(root: str, count: int) -> None:
    """Kills this process where it is about to write, make, rename or remove something below `root` for that time."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.link") or root not in str(arguments[0]):
            return
        if event == "open" and not set(str(arguments[1])) & set("wax+"):
            return
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_run_killed_between_two_files_ends_in_the_same_table(
    undisturbed: Path, experiment_file: Path, tmp_path: Path
) -> None:
    generator = random.Random(5)
    root, err = tmp_path / "root", tmp_path / "err"
    for _ in range(5):
        kill = partial(_kill_at, str(root), generator.randint(20, 150))
        process = start(err, *RUN, experiment_file, "--root", root, before=kill)
        process.join()
        assert process.exitcode == -signal.SIGKILL, err.read_text()
        assert_whole(root)
    status, _, said = answer(*RUN, experiment_file, "--root", root)
    assert status == 0, said
    assert results(root) == results(undisturbed)
    assert not list(leftovers(Store(root / "artifacts")))


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_table(tmp_path: Path) -> None:
    """The profile `micro`, which makes its models, too; the moments are shares of the time that it takes."""
    generator = random.Random(20)
    err, root = tmp_path / "err", tmp_path / "root"
    arguments = (*RUN, "quickstart", "--profile", "micro", "--root")
    started = time.monotonic()
    process = start(err, *arguments, tmp_path / "undisturbed")
    process.join()
    seconds = time.monotonic() - started
    assert process.exitcode == 0, err.read_text()
    expected = results(tmp_path / "undisturbed")
    kills = 0
    while kills < 20:
        process = start(err, *arguments, root)
        process.join(generator.uniform(0, 0.25 * seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            assert_whole(root)
        else:
            assert process.exitcode == 0, err.read_text()
            assert results(root) == expected
            shutil.rmtree(root)
    process = start(err, *arguments, root)
    process.join()
    assert process.exitcode == 0, err.read_text()
    assert results(root) == expected


def _workers(pid: int) -> list[psutil.Process]:
    """Processes that a process has forked: they have its command line, and those that it started another."""
    parent, found = psutil.Process(pid), []
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            found += [child] if child.cmdline() == parent.cmdline() else []
    return found


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_in_one_sentence_and_leaves_no_process(
    undisturbed: Path, experiment_file: Path, tmp_path: Path, number: signal.Signals, status: int, word: str
) -> None:
    err = tmp_path / "err"
    arguments = [*RUN, experiment_file, "--root", tmp_path / "root", "--set", "training.workers=1"]
    arguments += ["--set", "methods.FuseLLM=null", "--set", "methods.FuseLLM published=null"]
    process = start(err, *arguments)
    while not (workers := _workers(process.pid or 0)):
        assert process.is_alive(), err.read_text()
        time.sleep(0.05)
    time.sleep(0.5)  # in its first moments after the fork a worker cannot answer a signal quietly
    # A terminal sends Ctrl-C to every process of the command, a batch system its signal to the first.
    for one in workers if number == signal.SIGINT else []:
        one.send_signal(number)
    os.kill(process.pid or 0, number)
    process.join()
    assert process.exitcode == status, err.read_text()
    assert sentence(err.read_text()) == f"fusellm: {word}; the same command goes on from here."
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert_whole(tmp_path / "root")
    assert answer(*arguments)[0] == 0
    records = {name: raw for name, raw in results(tmp_path / "root").items() if name.endswith(".parquet")}
    assert len(records) == 3 and records.items() <= results(undisturbed).items()


def test_a_signal_is_not_lost_in_a_callback_of_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thing: ...

    app = typer.Typer()

    @app.command()
    def work() -> None:
        thing = Thing()
        _kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del thing
        time.sleep(60)

    monkeypatch.setattr(cli, "app", app)
    status, _, err = answer()
    assert status == 143
    assert sentence(err) == "fusellm: terminated; the same command goes on from here."


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    needed("only root can mount a small disk" if os.geteuid() else None)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    needed(f"no small disk: {mounted.stderr}" if mounted.returncode else None)
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_ends_in_one_sentence(undisturbed: Path, experiment_file: Path, disk: Path, tmp_path: Path) -> None:
    err, ballast = tmp_path / "err", disk / "ballast"
    for room in (100_000, 345_000, 385_000, 430_000):
        ballast.write_bytes(b"")
        with ballast.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - room))
        process = start(err, *RUN, experiment_file, "--root", disk / "root")
        process.join()
        assert process.exitcode == 2, err.read_text()
        wanted = "The run needs about" if room == 100_000 else "does not fit on the disk: free space and run again"
        assert wanted in sentence(err.read_text())
        assert_whole(disk / "root")
    ballast.unlink()
    status, _, said = answer(*RUN, experiment_file, "--root", disk / "root")
    assert status == 0, said
    assert results(disk / "root") == results(undisturbed)


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_disk_ends_in_one_sentence(
    begun: bool, undisturbed: Path, experiment_file: Path, disk: Path
) -> None:
    root = disk / "root"
    if begun:
        shutil.copytree(undisturbed, root)
        shutil.rmtree(next(root.glob("artifacts/train/CLM-*")))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    status, _, said = answer(*RUN, experiment_file, "--root", root)
    assert status == 2 and re.search(r"[Rr]ead-only file system\)?: choose another --root", sentence(said)), said
    if begun:  # what is there can still be looked at
        status, printed, _ = answer("tables", "small-experiment", "--format", "json", "--root", root)
        assert status == 0 and printed.encode() == results(undisturbed)["table.json"]
        assert answer("artifact", "verify", "--root", root)[0] == 0


def test_a_folder_without_permission_ends_in_one_sentence(experiment_file: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root (the read-only disk stands for this)")
    tmp_path.chmod(0o555)
    status, _, said = answer(*RUN, experiment_file, "--root", tmp_path / "root")
    assert status == 2 and "change its permissions" in sentence(said)


def test_two_processes_make_one_run(experiment_file: Path, tmp_path: Path) -> None:
    """Each with a seed of its own; what both need is made by one of them, and both seeds are in the table."""
    settings = [
        "--set",
        "methods.FuseLLM=null",
        "--set",
        "methods.FuseLLM published=null",
        "--set",
        "curve.per_domain=0",
    ]
    command = (*RUN, experiment_file, *settings)
    both = [
        start(tmp_path / f"err{seed}", *command, "--seed", str(seed), "--root", tmp_path / "together")
        for seed in (0, 1)
    ]
    for seed, process in enumerate(both):
        process.join()
        assert process.exitcode == 0, (tmp_path / f"err{seed}").read_text()
    assert_whole(tmp_path / "together")
    assert answer(*command, "--seed", "0", "--seed", "1", "--root", tmp_path / "one")[0] == 0
    assert results(tmp_path / "together") == results(tmp_path / "one")
    assert not list(unused(tmp_path / "together"))


def test_who_waits_for_another_process_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "notify", said.append)

    def wait() -> None:
        with exclusive_lock(tmp_path / "lock", "train CLM"):
            said.append("alone")

    waiting = threading.Thread(target=wait)
    with FileLock(tmp_path / "lock"):
        waiting.start()
        while not said:
            time.sleep(0.05)
        assert said == ["train CLM: another process is at work on it, waiting for that ..."]
    waiting.join()
    assert said[1:] == ["alone"]
