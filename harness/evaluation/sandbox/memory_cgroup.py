"""A memory cgroup (version 2) for the programs of a sandbox, where the machine lends one.

The supervisor looks at the programs' memory ten times a second, and estimates what the kernel holds for them; the
kernel's own limit is immediate and exact. It is had in one of two ways: systemd starts the supervisor in a scope
(`systemd-run --scope`), or a folder is made beside the harness's own cgroup where that is delegated to this user
(containers, batch systems, services with Delegate=yes).
"""

import os
import subprocess
from contextlib import suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

from harness.runtime.programs import which

ROOT = Path("/sys/fs/cgroup")
_SESSION = ("XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")  # how systemd-run finds the systemd of a user

_ASK_LIMIT = f'cat "{ROOT}$(sed -n s/^0:://p /proc/self/cgroup)/memory.max"'


class MemoryCgroup:
    """A cgroup of at most `limit` bytes, if one is to be had: for a command that begins with `prefix`, and after `add`.

    `environment` is what the prefix needs of the environment.
    """

    def __init__(self, limit: int) -> None:
        scope = _systemd_run()
        self.prefix = [*scope, "-p", f"MemoryMax={limit}", "--"] if scope else []
        self.environment = {name: os.environ[name] for name in _SESSION if scope and name in os.environ}
        self._folder = None if scope else _delegated(limit)
        self._pid = 0

    @property
    def bounded(self) -> bool:
        """Whether the kernel bounds the memory."""
        return bool(self.prefix or self._folder)

    def add(self, pid: int) -> None:
        """Puts a process that has no children yet into the cgroup, unless `prefix` has done so."""
        self._pid = pid
        try:
            if self._folder:
                (self._folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError:  # the folder is delegated to us and the cgroup above it is not
            self.close()
            self._folder = None

    def killed(self) -> int:
        """The number of processes that the kernel has ended because the memory was used up."""
        folder = cgroup_of(self._pid) if self.prefix else self._folder
        try:
            events = (folder / "memory.events").read_text(encoding="ascii") if folder else ""
        except OSError:
            return 0
        return sum(int(line.split()[1]) for line in events.splitlines() if line.startswith("oom_kill "))

    def close(self) -> None:
        """Removes the folder; its processes must have ended. A scope is removed by systemd."""
        if self._folder:
            with suppress(OSError):
                self._folder.rmdir()


def cgroup_of(pid: int | str) -> Path | None:
    """The folder of a process's cgroup; None where cgroups of version 2 are not mounted."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((ROOT / line[3:].lstrip("/") for line in lines if line.startswith("0::")), None)


@cache
def _systemd_run() -> tuple[str, ...]:
    """The command that starts another one in a scope whose memory the kernel bounds; empty where that does not work."""
    program, limit = which("systemd-run"), str(1 << 26)
    if program is None:
        return ()
    user = () if os.geteuid() == 0 else ("--user",)
    command = (program, *user, "--scope", "--quiet", "--collect", "-p", "MemorySwapMax=0")
    arguments = ["-p", f"MemoryMax={limit}", "--", "/bin/sh", "-c", _ASK_LIMIT]
    try:
        done = subprocess.run(
            [*command, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return command if done.stdout.strip() == limit else ()


def _delegated(limit: int) -> Path | None:
    """A new cgroup beside that of this process, with its limit; None where none can be made."""
    own = cgroup_of("self")
    if own is None or own == ROOT:
        return None
    folder = own.parent / f"fusellm-{uuid4().hex}"
    try:
        if "memory" not in (own.parent / "cgroup.subtree_control").read_text(encoding="ascii").split():
            return None
        folder.mkdir()
    except OSError:
        return None
    try:
        (folder / "memory.max").write_text(str(limit), encoding="ascii")
        with suppress(OSError):  # where the kernel has no swap space there is no such file
            (folder / "memory.swap.max").write_text("0", encoding="ascii")
    except OSError:
        folder.rmdir()
        return None
    return folder
