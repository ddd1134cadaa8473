"""The console command as tests start it, and what must hold of the folder that it leaves behind."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

from harness import cli
from harness.store.artifacts import Store
from harness.store.files import read_json
from results.records import read


def fusellm(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-c", "from harness.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=600)


def answer(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command, run in this process."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    argv = mock.patch.object(sys, "argv", ["fusellm", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def sentence(err: str) -> str:
    """The one sentence on standard error that the command ended with; fails where there is another number of them."""
    assert "Traceback" not in err, err
    said = [line for line in err.splitlines() if line.startswith("fusellm: ")]
    assert len(said) == 1 and err.splitlines()[-1] == said[0], err
    return said[0]


def sentences(err: str) -> list[str]:
    """The sentences on standard error that the command ended with where it found several mistakes, one a line."""
    assert "Traceback" not in err, err
    head, *lines = err.splitlines()
    assert head.startswith("fusellm: The configuration of ") and head.endswith(f" has {len(lines)} errors:"), err
    assert all(line.startswith("  ") and line.endswith(".") for line in lines), err
    return [line.strip() for line in lines]


_server = multiprocessing.get_context("forkserver")
# What takes seconds to import is imported once; every process is then a fork of that one.
_server.set_forkserver_preload(
    [
        "harness.experiment.headroom",
        "harness.stages.trainer.loop",
        "harness.data.sequences",
        "results.figures.learning_curves",
        "fusion.alignment.fuse",
    ]
)


def start(err: Path, *arguments: str | Path, before: Callable[[], None] | None = None) -> ForkServerProcess:
    """Starts the command in a process that can be killed; `before` (of a module) runs in it first."""
    process = _server.Process(target=_run, args=(err, list(map(str, arguments)), before))
    process.start()
    return process


def _run(err: Path, arguments: list[str], before: Callable[[], None] | None) -> None:
    with err.open("wb") as file:
        os.dup2(file.fileno(), 2)
    with Path(os.devnull).open("wb") as file:
        os.dup2(file.fileno(), 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method("fork", force=True)  # the default of a process that a shell starts
    sys.argv = ["fusellm", *arguments]
    if before is not None:
        before()
    cli.main()


def assert_whole(root: Path) -> None:
    """Whatever has its final name is complete: artifacts match their manifests, records and descriptions are read."""
    store = Store(root / "artifacts")
    for folder in (root / "artifacts").glob("*/*"):
        if not folder.name.startswith("."):
            store.verify(folder, anew=True)
    for run in (root / "runs").glob("*/*/*"):
        for path in run.rglob("*"):
            if path.is_dir() or path.name.startswith("."):
                continue
            if path.name in ("run.json", "plan.json"):
                read_json(path, "a test")
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".parquet":
                assert len(read(path))


def results(root: Path) -> dict[str, bytes]:
    """Tables, curve sentences and records of the one run below `root`."""
    (run,) = (path.parent for path in root.glob("runs/*/*/*/run.json"))
    found = [*run.glob("table.*"), *run.glob("*.txt"), *run.glob("records/*.parquet")]
    return {path.name: path.read_bytes() for path in found}
