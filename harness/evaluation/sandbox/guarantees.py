"""What holds of the sandbox on this machine, found out by programs that try to break it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import dedent

from fusion.errors import UserError
from harness.evaluation.sandbox import Limits, Program, Sandbox
from harness.evaluation.sandbox.seccomp import refused_numbers

Guarantee = tuple[str, str, bool]
"""What is tried, what came of it, and whether the sandbox held."""

_FAMILIES = 46  # of sockets, linux/socket.h
_MEMORY = Limits(cpu=10, wall=20.0, memory=128 << 20)

_CALLS = """
    import ctypes, json
    libc = ctypes.CDLL(None, use_errno=True)
    def refused(number, *arguments):
        return libc.syscall(number, *arguments) == -1 and ctypes.get_errno() == 1
    calls = {calls!r}
    passed = [name for name, number in calls.items() if not refused(number, 0, 0, 0, 0, 0, 0)]
    sockets = [family for family in range({families}) if not refused(calls["socket"], family, 1, 0)]
    print(json.dumps([passed, sockets]))
"""
_FILES = """
    import json, os
    def can(path, mode):
        try:
            with open(path, mode):
                return True
        except OSError:
            return False
    seen = [path for path in {there!r} if os.path.exists(path)]
    written = [path for path in {places!r} if can(os.path.join(path, "fusellm-probe"), "w")]
    kept = [name for name in os.environ if name not in {environment!r}]
    others = len([name for name in os.listdir("/proc") if name.isdigit()]) - 2  # init and this one
    print(json.dumps([seen, written, kept, others, can("/proc/self/oom_score_adj", "w")]))
"""
# The memory is held by a thread that outlives the first one, of which /proc then says nothing any more.
_HOG = """
    import ctypes, os, threading, time
    def hold():
        hoard = bytearray(os.urandom(1 << 20) * 40)
        time.sleep(60)
    for _ in range(9):
        if os.fork() == 0:
            threading.Thread(target=hold).start()
            ctypes.CDLL(None).pthread_exit(None)
    time.sleep(60)
"""


def guarantees(python: str, roots: Sequence[Path]) -> Iterator[Guarantee]:
    """What was tried in the sandbox, and what came of it. `python` runs the programs that try, and lies in `roots`.

    Raises UserError where the sandbox does not run at all.
    """
    there = ["/etc/passwd", "/etc/shadow", str(Path.home()), str(Path.cwd())]
    shown = [*roots, Path("/usr")]
    there = [path for path in there if not any(Path(path).is_relative_to(root) for root in shown)]
    with Sandbox(roots) as sandbox:

        def answer(code: str) -> list[list[object]]:
            outcome = sandbox.run(_program(python, code))
            if outcome.exit_code:
                raise UserError(f"The sandbox cannot be tried ({outcome.stderr.strip().splitlines()[-1]}).")
            parsed: list[list[object]] = json.loads(outcome.stdout)
            return parsed

        calls = refused_numbers()
        passed, sockets = answer(_CALLS.format(calls=calls, families=_FAMILIES))
        yield (
            "sockets",
            f"open: families {sockets}" if sockets else "every family is refused, but for pairs within a program",
            not sockets,
        )
        allowed = f"allowed: {', '.join(map(str, passed))}"
        yield "system calls", allowed if passed else f"{len(calls)} dangerous ones are refused", not passed
        places = ["/", "/usr", "/etc", "/dev", "/proc"]
        environment = ["HOME", "LANG", "LC_CTYPE", "PATH", "PWD", "TMPDIR"]
        found = answer(_FILES.format(there=there, places=places, environment=environment))
        yield (
            "files, environment, processes",
            f"seen: {found}" if any(found) else "nothing of this machine is seen or written",
            not any(found),
        )
    with Sandbox(roots, _MEMORY) as sandbox:
        stopped = sandbox.run(_program(python, _HOG)).stopped == "memory"
    yield "memory", f"bounded {sandbox.memory_limit}" if stopped else "the limit can be got past", stopped


def _program(python: str, code: str) -> Program:
    return Program({"probe.py": dedent(code)}, [python, "-I", "probe.py"])
