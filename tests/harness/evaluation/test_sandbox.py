"""The sandbox against programs that mean harm, one test each. Nothing here ever runs outside of it."""

import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from fusion.errors import UserError
from harness.evaluation import sandbox as sandboxes
from harness.evaluation.multipl_e.toolchains import find
from harness.evaluation.sandbox import Program, Sandbox
from harness.evaluation.sandbox.guarantees import guarantees
from harness.evaluation.sandbox.seccomp import refused_numbers, seccomp_filter
from tests.harness.evaluation.conftest import LIMITS, Continuation, MiB, processes_with
from tests.shared import needed

pytestmark = pytest.mark.slow


def test_a_decent_program_runs(run: Continuation) -> None:
    outcome = run("import sys\nprint('x' * 5000, 'the nonce')\nprint('oh', file=sys.stderr)\nsys.exit(3)")
    assert (outcome.exit_code, outcome.stderr, outcome.stopped) == (3, "oh\n", "")
    assert outcome.stdout == "x" * LIMITS.output
    assert outcome.seen  # though it came after what is kept
    assert outcome.cpu > 0


def test_a_fork_bomb_stays_small(run: Continuation) -> None:
    outcome = run("""
        import os, time
        forks = 0
        try:
            while True:
                if os.fork() == 0:
                    time.sleep(60)
                forks += 1
        except OSError:
            print(forks)
    """)
    assert 10 < int(outcome.stdout) <= LIMITS.processes
    outcome = run("""
        import os
        while True:
            try:
                os.fork()
            except OSError:
                pass
    """)
    assert outcome.stopped
    assert run("print(1)").stdout == "1\n"


def test_an_endless_loop_is_ended(run: Continuation) -> None:
    assert run("while True: pass").stopped == "time"


def test_a_sleep_that_ignores_signals_is_ended(run: Continuation) -> None:
    outcome = run("""
        import signal, time
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGXCPU):
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(60)
    """)
    assert outcome.stopped == "time"


def test_silence_is_no_way_out(run: Continuation) -> None:
    assert run("import os, time; os.close(1); os.close(2); time.sleep(60)").stopped == "time"


def test_a_memory_hog_is_refused(run: Continuation) -> None:
    outcome = run("""
        hoard = []
        while True:
            hoard.append(bytearray(1 << 24))
    """)
    assert outcome.stopped == "memory" or "MemoryError" in outcome.stderr


def test_many_processes_each_hogging_are_counted_together(run: Continuation) -> None:
    outcome = run("""
        import os, time
        for _ in range(20):
            if os.fork() == 0:
                hoard = bytearray(os.urandom(1 << 20) * 40)
                time.sleep(60)
        time.sleep(60)
    """)
    assert outcome.stopped == "memory"


@pytest.mark.parametrize(
    "code",
    [
        """
        with open("/dev/shm/hoard", "wb") as file:
            while True:
                file.write(bytes(1 << 20))
        """,
        """
        import os
        hoard = os.memfd_create("hoard")
        while True:
            os.write(hoard, bytes(1 << 20))
        """,
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.shmget(0, 1 << 30, 0o1600) < 0:
            raise OSError(ctypes.get_errno(), "shmget")
        """,
    ],
    ids=["dev_shm", "memfd", "system_v"],
)
def test_shared_memory_is_bounded_or_refused(run: Continuation, code: str) -> None:
    outcome = run(code)
    assert outcome.exit_code == 1
    assert "No space left" in outcome.stderr or "PermissionError" in outcome.stderr


def test_shared_mappings_count_though_who_filled_them_is_gone(run: Continuation) -> None:
    outcome = run("""
        import mmap, os
        hoard = []
        while True:
            hoard.append(mmap.mmap(-1, 1 << 25))
            if os.fork() == 0:
                hoard[-1].write(bytes(1 << 25))
                os._exit(0)
            os.wait()
    """)
    assert outcome.stopped == "memory"


def test_every_refused_call_is_refused(run: Continuation) -> None:
    calls = refused_numbers()
    outcome = run(f"""
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def error(number, *arguments):
            return libc.syscall(number, *arguments) and ctypes.get_errno()
        print([name for name, number in {calls!r}.items() if error(number, 0, 0, 0, 0, 0, 0) != 1])
        socket = {calls["socket"]}
        print([family for family in range(50) for kind in range(1, 6) if error(socket, family, kind, 0) != 1])
    """)
    assert outcome.stdout == "[]\n[]\n"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86_64")
def test_no_namespace_can_be_made_by_clone_and_no_other_abi_used(run: Continuation) -> None:
    outcome = run("""
        import ctypes, errno
        libc = ctypes.CDLL(None, use_errno=True)
        def answer(number, *arguments):
            libc.syscall(number, *arguments)
            return errno.errorcode[ctypes.get_errno()]
        print({answer(56, 1 << bit | 17, 0, 0, 0, 0) for bit in (17, 25, 26, 27, 28, 29, 30)})
        print(answer(435, 0, 0))
        print(answer(53, 2, 1, 0, 0), answer(53, 40, 1, 0, 0))  # pairs of another family
        print(answer(0x40000000 | 41, 1, 1, 0))
    """)
    assert outcome.stdout.split("\n") == ["{'EPERM'}", "ENOSYS", "EPERM EPERM", "EPERM", ""]


def test_the_filter_knows_other_machines() -> None:
    assert len(seccomp_filter("aarch64")) % 8 == 0
    assert refused_numbers("aarch64").keys() < refused_numbers("x86_64").keys()
    with pytest.raises(UserError, match="not for s390x"):
        seccomp_filter("s390x")


def test_every_guarantee_holds_here(tmp_path: Path) -> None:
    needed(sandboxes.refusal())
    toolchain = find("python", tmp_path)
    tried = list(guarantees(toolchain.run[0], toolchain.roots))
    assert len(tried) == 4
    assert [what for what in tried if not what[2]] == []


def test_endless_output_is_not_kept(run: Continuation) -> None:
    outcome = run("""
        import os
        while True:
            os.write(1, b"x" * 65536)
    """)
    assert outcome.stopped == "time"
    assert len(outcome.stdout) == LIMITS.output


def test_the_disk_cannot_be_filled(run: Continuation) -> None:
    outcome = run("""
        written = 0
        try:
            for number in range(1000):
                with open(f"/tmp/{number}", "wb") as file:
                    written += file.write(bytes(1 << 20))
        except OSError as error:
            print(written >> 20, error.strerror)
    """)
    megabytes, _, why = outcome.stdout.strip().partition(" ")
    assert int(megabytes) <= LIMITS.disk // MiB
    assert why == "No space left on device"


def test_nothing_outside_can_be_written(run: Continuation, tmp_path: Path) -> None:
    places = ["/", "/usr", "/usr/local", "/etc", "/dev", "/proc", "/root", "/var/tmp", str(tmp_path), str(Path.cwd())]
    name = uuid.uuid4().hex
    outcome = run(f"""
        import os
        for place in {places!r}:
            try:
                os.makedirs(place, exist_ok=True)
                open(f"{{place}}/{name}", "w").write("x")
            except OSError:
                pass
    """)
    assert outcome.exit_code == 0
    assert not [place for place in places if Path(place, name).exists()]


def test_secrets_in_files_cannot_be_read(run: Continuation, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    for path in ("/etc/shadow", "/etc/passwd", str(secret), str(Path(__file__))):
        assert "No such file" in run(f"print(open({path!r}).read())").stderr


def test_the_environment_is_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed(sandboxes.refusal())
    monkeypatch.setenv("FUSELLM_SECRET", "hunter2")
    toolchain = find("python", tmp_path)
    code = """
        import os
        print(sorted(os.environ))
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                print(open(f"/proc/{pid}/environ").read())
            except OSError:
                pass
    """
    with Sandbox(toolchain.roots, LIMITS) as sandbox:
        shown = sandbox.run(toolchain.program(dedent(code), "")).stdout
    assert "HOME" in shown
    assert "hunter2" not in shown
    assert "SECRET" not in shown


def test_the_processes_of_the_machine_are_not_seen(run: Continuation) -> None:
    outcome = run("""
        import os
        print(sorted(filter(str.isdigit, os.listdir("/proc"))))
        os.kill(os.getppid(), 9)
    """)
    assert outcome.stdout == "['1', '2']\n"
    assert run("print(1)").stdout == "1\n"


def test_no_port_of_the_machine_can_be_reached(run: Continuation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        outcome = run(f"import socket\nsocket.create_connection({server.getsockname()!r}, timeout=2)")
        assert "PermissionError" in outcome.stderr
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_abstract_socket_of_the_machine_can_be_reached(run: Continuation) -> None:
    name = f"\0fusellm-{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        server.settimeout(0.1)
        outcome = run(f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})")
        assert "PermissionError" in outcome.stderr
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_daemon_does_not_outlive_its_program(run: Continuation) -> None:
    outcome = run("""
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(600)
            os._exit(0)
        os.wait()
        print("the nonce")
    """)
    assert (outcome.exit_code, outcome.seen) == (0, True)  # and the fixture finds no process


def test_neither_a_user_namespace_nor_another_core_can_be_had(run: Continuation) -> None:
    outcome = run("""
        import ctypes, os
        print(ctypes.CDLL(None).unshare(0x10000000))
        try:
            os.sched_setaffinity(0, os.sched_getaffinity(0))
        except OSError:
            print("refused")
    """)
    assert outcome.stdout == "-1\nrefused\n"


def test_text_of_any_kind_is_a_program(run: Continuation) -> None:
    for code in ("print(1)\0", "print('\ud800')", "print('\udcff')"):
        assert run(code).exit_code in (0, 1)  # as the interpreter has it
    assert run("# " + "x" * MiB + "\nprint('done')").stdout == "done\n"


def test_a_harness_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    needed(sandboxes.refusal())
    mark = f"hostile-{uuid.uuid4().hex}"
    code = (
        "from harness.evaluation.sandbox import *\nwith Sandbox() as sandbox:\n    print('ready', flush=True)\n"
        f"    sandbox.run(Program({{}}, ['/bin/sh', '-c', ': {mark}; sleep 600 & sleep 600']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as harness:
        assert harness.stdout
        assert harness.stdout.readline() == "ready\n"
        wait_until(lambda: len(processes_with(f": {mark}")) >= 3)  # the harness, bubblewrap and its shell
        harness.send_signal(signal.SIGKILL)
    wait_until(lambda: processes_with(mark) == [])


def wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    refused = sandboxes.refusal()
    assert refused is not None
    assert "apt-get install bubblewrap" in refused


def test_a_bubblewrap_that_fails_is_no_failure_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as folder:  # unlike pytest's folders it can be opened to everybody
        fake = Path(folder, "bwrap")
        fake.write_text("#!/bin/sh\necho bwrap: No permissions to create a new namespace >&2\nexit 1\n")
        for path in (fake, fake.parent):
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        with Sandbox() as sandbox, pytest.raises(UserError, match="No permissions"):
            sandbox.run(Program({}, ["/bin/true"]))
        assert "No permissions" in (sandboxes.refusal() or "")


def test_a_folder_that_holds_the_home_folder_is_not_shown() -> None:
    with pytest.raises(UserError, match="home folder"):
        Sandbox([Path.home().parent])


def test_unsafe_runs_without_a_sandbox_and_still_leaves_nothing(tmp_path: Path) -> None:
    mark = f"decent-{uuid.uuid4().hex}.sh"
    with Sandbox(limits=LIMITS, unsafe=True) as sandbox:
        outcome = sandbox.run(
            Program({mark: "sleep 600 >/dev/null 2>&1 &\npwd\ncat\n"}, ["/bin/sh", mark], env={"A": "b"})
        )
        assert outcome.exit_code == 0
        assert not Path(outcome.stdout.strip()).exists()
        assert processes_with(mark) == []
