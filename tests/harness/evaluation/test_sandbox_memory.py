"""The memory of a sandbox is bounded, whoever it belongs to, by the kernel where it lends a cgroup."""

import threading
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from harness.evaluation import sandbox as sandboxes
from harness.evaluation.sandbox import Program, Sandbox, memory_cgroup
from tests.harness.evaluation.conftest import LIMITS, Continuation
from tests.shared import needed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "code",
    [
        """
        def hold():
            hoard = bytearray(os.urandom(1 << 20) * 40)
            time.sleep(60)
        for _ in range(20):
            if os.fork() == 0:
                threading.Thread(target=hold).start()
                libc.pthread_exit(None)  # of the first thread, which /proc then knows no memory of
        time.sleep(60)
        """,
        """
        libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: /proc shows less of such a process
        for _ in range(20):
            if os.fork() == 0:
                hoard = bytearray(os.urandom(1 << 20) * 40)
                time.sleep(60)
        time.sleep(60)
        """,
        """
        for _ in range(20):
            if os.fork() == 0:
                pairs = [socket.socketpair() for _ in range(100)]
                for one in (one for pair in pairs for one in pair):
                    one.setblocking(False)
                    try:
                        while True:
                            one.send(bytes(1 << 15))
                    except BlockingIOError:
                        pass
                time.sleep(60)
        time.sleep(60)
        """,
        """
        for number in range(10 ** 8):
            os.mkdir(f"/tmp/{number}")
        """,
        """
        for number in range(10 ** 8):
            os.symlink("x" * 100, f"/dev/shm/{number}")
        """,
        """
        libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
        while True:  # every page that is read belongs to nobody, but has a table of its own
            start = libc.mmap(None, 1 << 40, 1, 0x4022, 2 ** 64 - 1, 0)
            for page in range(start, start + (1 << 40), 1 << 21):
                ctypes.c_char.from_address(page).value
        """,
    ],
    ids=["after_the_first_thread", "undumpable", "socket_pairs", "folders", "links", "page_tables"],
)
def test_memory_in_no_process_of_ones_own_counts(run: Continuation, code: str) -> None:
    outcome = run("import ctypes, os, socket, threading, time\nlibc = ctypes.CDLL(None)\n" + dedent(code))
    assert outcome.stopped == "memory", outcome


def test_no_program_escapes_being_ended_when_memory_runs_short(run: Continuation) -> None:
    outcome = run("""
        import os
        print(open("/proc/self/oom_score_adj").read().strip(), os.access("/proc/self/oom_score_adj", os.W_OK))
        open("/proc/self/oom_score_adj", "w").write("0")
    """)
    assert outcome.stdout == "1000 False\n"
    assert "Read-only" in outcome.stderr


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of the machine's cgroups, of which this process has `own`."""
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(memory_cgroup, "ROOT", tmp_path)
    monkeypatch.setattr(memory_cgroup, "cgroup_of", lambda pid: tmp_path / "own")
    monkeypatch.setattr(memory_cgroup, "which", lambda name: None)
    memory_cgroup._systemd_run.cache_clear()
    yield tmp_path
    memory_cgroup._systemd_run.cache_clear()


def test_where_a_cgroup_is_delegated_the_kernel_bounds_the_memory(cgroups: Path) -> None:
    needed(sandboxes.refusal())
    (cgroups / "cgroup.subtree_control").write_text("cpu memory pids")
    with Sandbox(limits=LIMITS) as sandbox:
        (folder,) = cgroups.glob("fusellm-*")
        assert "kernel" in sandbox.memory_limit
        assert int((folder / "memory.max").read_text()) > LIMITS.memory + LIMITS.disk + LIMITS.shared
        assert (folder / "memory.swap.max").read_text() == "0"
        assert int((folder / "cgroup.procs").read_text()) == sandbox._process.pid
        assert sandbox.run(Program({}, ["/bin/false"])).stopped == ""
        events = folder / "memory.events"
        killing = threading.Timer(0.5, lambda: events.write_text("low 0\noom 1\noom_kill 1\n"))
        killing.start()
        assert sandbox.run(Program({}, ["/bin/sh", "-c", "sleep 1; exit 137"])).stopped == "memory"
        assert sandbox.run(Program({}, ["/bin/false"])).stopped == ""  # that was the program before


@pytest.mark.parametrize("controllers", [None, "cpu pids"])
def test_without_a_cgroup_the_supervisor_bounds_the_memory(cgroups: Path, controllers: str | None) -> None:
    needed(sandboxes.refusal())
    if controllers:
        (cgroups / "cgroup.subtree_control").write_text(controllers)
    with Sandbox(limits=LIMITS) as sandbox:
        assert "kernel" not in sandbox.memory_limit
        assert sandbox.run(Program({}, ["/bin/true"])).exit_code == 0
    assert not list(cgroups.glob("fusellm-*"))


@pytest.mark.parametrize("works", [True, False])
def test_systemd_lends_a_scope_only_where_its_limit_holds(
    works: bool, cgroups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed(sandboxes.refusal())
    program = cgroups / "systemd-run"
    program.write_text(
        f"""#!/bin/sh
        while [ "$1" != -- ]; do
            case $1 in MemoryMax=*) {"echo ${1#*=}" if works else "echo max"} >{cgroups}/memory.max ;; esac
            shift
        done
        shift
        exec "$@"
        """
    )
    program.chmod(0o755)
    monkeypatch.setattr(memory_cgroup, "which", lambda name: str(program))
    monkeypatch.setattr(memory_cgroup, "_ASK_LIMIT", f"cat {cgroups}/memory.max")
    memory_cgroup._systemd_run.cache_clear()
    with Sandbox(limits=LIMITS) as sandbox:
        assert ("kernel" in sandbox.memory_limit) is works
        assert sandbox.run(Program({}, ["/bin/sh", "-c", "echo works"])).stdout == "works\n"
