"""Runs untrusted programs in bubblewrap, without network, with bounded time, memory, processes, disk and output.

A program sees the machine's /usr and its toolchain, all read-only, a temporary folder of bounded size, and nothing
else: no other file, process, key or environment variable, and no socket but pairs of its own (`seccomp`). Nothing of it
remains when it ends or is stopped. `guarantees` tries what holds on this machine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from fusion.errors import UserError
from harness.evaluation.sandbox.memory_cgroup import MemoryCgroup
from harness.evaluation.sandbox.seccomp import seccomp_filter
from harness.runtime.programs import which

INSTALL = "apt-get install bubblewrap"
_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_MiB = 1 << 20
_OWN_MEMORY = 64 * _MiB  # bytes, of the supervisor and bubblewrap


@dataclass(frozen=True)
class Limits:
    """The resources that one program may use.

    Processor time is limited, so that a verdict does not depend on the machine's load; wall-clock time, which stops a
    sleeping program, is counted anew after compiling.
    """

    cpu: int = 15  # seconds of one process
    wall: float = 30.0  # seconds
    memory: int = 2048 * _MiB  # bytes, of one process and of all together
    processes: int = 128  # with their threads
    disk: int = 128 * _MiB  # bytes below /tmp, and of one file
    shared: int = 16 * _MiB  # bytes below /dev/shm
    output: int = 2048  # bytes that are kept of standard output, and of standard error


@dataclass(frozen=True)
class Program:
    """What is run: `files` in a new folder, there the command `compile` (may be empty), and if it succeeds `run`."""

    files: Mapping[str, str]
    run: Sequence[str]
    compile: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    watch: str = ""  # a text that standard output is searched for, however long it is


@dataclass(frozen=True)
class Outcome:
    """How a program ended. `cpu` (seconds) covers compiler and sandbox, but no process that was killed."""

    exit_code: int  # the compiler's where it failed; 128 + n for signal n; -1 where the program was stopped
    stdout: str
    stderr: str
    compiled: bool
    stopped: Literal["", "time", "memory"]
    seen: bool
    cpu: float


class Sandbox:
    """Runs programs one after another, for one thread. Several may run side by side, each (`slot`) on its own core."""

    def __init__(
        self, roots: Iterable[Path] = (), limits: Limits | None = None, *, slot: int = 0, unsafe: bool = False
    ) -> None:
        """Starts the supervisor. Raises UserError where bubblewrap is not installed.

        `roots` are the folders outside /usr that programs may read. With `unsafe` there is no sandbox, only the limits
        of a process.
        """
        limits = limits or Limits()
        bwrap = which("bwrap")
        if bwrap is None and not unsafe:
            raise UserError(f"bubblewrap is not installed: {INSTALL}.")
        seen = {str(root) for root in map(Path, roots) if not root.is_relative_to("/usr")}
        for root in seen:
            if Path.home().is_relative_to(root):
                raise UserError(f"Programs would see your home folder in {root}: install that toolchain elsewhere.")
        cores = sorted(os.sched_getaffinity(0))
        config = {
            "bwrap": None if unsafe else bwrap,
            "roots": sorted(seen),
            "cpu": cores[slot % len(cores)],
            "limits": asdict(limits),
            "seccomp": "" if unsafe else seccomp_filter().hex(),
        }
        # What lies in the temporary folders is memory, too, and bounded by their size.
        self._cgroup = MemoryCgroup(limits.memory + limits.disk + limits.shared + _OWN_MEMORY)
        command = [*self._cgroup.prefix, sys.executable, "-I", "-S", str(_SUPERVISOR), json.dumps(config)]
        # A session of its own: an interrupt at the terminal is the harness's to handle, and no program has a terminal.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._cgroup.environment,  # which no program sees: bubblewrap starts with none
            start_new_session=True,
        )
        self._cgroup.add(self._process.pid)

    @property
    def memory_limit(self) -> str:
        """Who bounds the memory of all processes of a program together, in words."""
        by_kernel = "by the kernel (cgroup) and " if self._cgroup.bounded else ""
        return f"{by_kernel}by the supervisor, which looks ten times a second"

    def run(self, program: Program) -> Outcome:
        """Runs one program; whatever it does is an Outcome. Raises UserError where the sandbox itself fails."""
        assert self._process.stdin
        assert self._process.stdout
        killed = self._cgroup.killed()
        try:
            self._process.stdin.write(json.dumps(asdict(program)) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise UserError("The sandbox's supervisor ended unexpectedly: run again; what is finished is kept.")
        reply = json.loads(answer)
        if "error" in reply:
            raise UserError(f"The sandbox cannot run programs ({reply['error']}).")
        if not reply.pop("started"):
            why = reply["stderr"].strip().partition("\n")[0] or f"exit status {reply['exit_code']}"
            raise UserError(f"The sandbox cannot start programs ({why}).")
        outcome = Outcome(**reply)
        if outcome.exit_code and self._cgroup.killed() > killed:
            outcome = replace(outcome, exit_code=-1, stopped="memory")
        return outcome

    def close(self) -> None:
        """Ends the running program, if any."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._cgroup.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def refusal() -> str | None:
    """The reason, in one sentence, why programs cannot be run in the sandbox here; None where they can."""
    try:
        with Sandbox() as sandbox:
            outcome = sandbox.run(Program({}, ["/bin/sh", "-c", "echo works"]))
    except UserError as error:
        return str(error)
    return None if outcome.stdout == "works\n" else f"The sandbox does not work ({outcome.stderr.strip()})."
