"""Leases: how processes on any number of machines divide the parts of one artifact, through a folder that they share.

A lease is a file that only one process can create, and that its owner touches while it is at work. An owner that has
ended is detected at once on its own machine, and by the age of the file from another. Locks of the operating system
would tell it sooner, but not every shared file system passes them on. Two processes can come to hold the same lease
(one was suspended, or both took over at the same moment), and a part is then made twice: callers must tolerate that.

`filelock.SoftFileLease` has the same protocol but starts a thread for every lease held, and takes over a lease of
another machine only after having watched it itself for the whole timeout, even if its owner has been silent for hours.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Self

HEARTBEAT_S = 10.0
LEASE_TIMEOUT_S = 180.0  # clients of a file server may see a state that is a minute old
POLL_S = 0.5


@cache
def _machine() -> str:
    """Where a process id means one process: a machine since its start, and the container on it."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # only Linux has these files
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)


def _started(pid: int) -> float | None:
    """The start of a running process (seconds since the epoch); None where it does not run."""
    import psutil

    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return float(process.create_time())
    return None


def _is_dead(lease: Path) -> bool:
    """True if the owner of the lease has ended or has been silent for too long; False if the lease does not exist."""
    now = lease.parent / "now"
    now.touch()  # ages are measured by the clock of the file server
    try:
        with lease.open(encoding="utf-8") as file:  # opening makes the client ask the file server for the present state
            owner, beat = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return False
    if now.stat().st_mtime - beat > LEASE_TIMEOUT_S:
        return True
    try:
        machine, pid, started = json.loads(owner)
    except ValueError:  # its owner is just writing it
        return False
    if machine != _machine():
        return False
    running = _started(pid)
    return running is None or abs(running - started) > 1  # otherwise another process has got its number


def in_use(folder: Path) -> bool:
    """True if any process that holds a lease in `folder` is running."""
    return any(not _is_dead(lease) for lease in folder.glob("*.lease"))


class Leases:
    """The leases that one process holds in a folder; a context manager that gives all of them back at its end.

    A process makes one part at a time: taking the next lease implies that the part before is finished. The leases of
    finished parts are kept, so that no process that does not see the part yet makes it again.
    """

    def __init__(self, folder: Path, *, wait: bool = True) -> None:
        """wait: whether `make_missing` waits for the parts that other processes are making."""
        self.folder = folder
        self.wait = wait
        self._taken: list[Path] = []
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        self.take(uuid.uuid4().hex)  # marks the folder as in use, also between two parts
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for lease in self._taken:
            lease.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Touches the lease of the folder and that of the part under way every `HEARTBEAT_S` seconds."""
        while not self._ended.wait(HEARTBEAT_S):
            for lease in {self._taken[0], self._taken[-1]}:
                with suppress(OSError):
                    os.utime(lease)

    def take(self, part: str) -> bool:
        """True if this process got the lease of a part. Raises FileNotFoundError when the folder is gone."""
        lease = self.folder / f"{part}.lease"
        if lease.exists() and _is_dead(lease):
            lease.unlink(missing_ok=True)
        try:
            with lease.open("x", encoding="utf-8") as file:
                self._taken.append(lease)
                json.dump([_machine(), os.getpid(), _started(os.getpid())], file)
        except FileExistsError:
            return False
        return True

    def make_missing(self, files: Sequence[Path], make: Callable[[int], bool], *, wait: bool | None = None) -> None:
        """Makes files that no other process makes, in turn: `make(i)` writes `files[i]`, or gives False if it cannot.

        Returns when there are all files but those that cannot be made, which are tried once; without `wait` (default:
        as these leases wait) already when other processes are at work on all that are missing.
        """
        missing = list(range(len(files)))
        while missing := [i for i in missing if not files[i].exists()]:
            refused = set[int]()
            for i in missing:
                if not files[i].exists() and self.take(files[i].stem) and not files[i].exists() and not make(i):
                    refused.add(i)
            missing = [i for i in missing if i not in refused and not files[i].exists()]
            if missing:
                if not (self.wait if wait is None else wait):
                    return
                time.sleep(POLL_S)


MakeParts = Callable[[Path, Leases], None]
"""make_parts(folder, leases) makes the parts in a folder whose leases it gets (see `Leases.make_missing`)."""


class InUse(Leases):
    """The names of what one process uses, for `names_in_use`; they are withdrawn when the context ends."""

    def add(self, name: str) -> None:
        """Adds a name, which holds no line end."""
        with self._taken[0].with_suffix(".names").open("a", encoding="utf-8") as file:
            file.write(f"{name}\n")

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._taken[0].with_suffix(".names").unlink(missing_ok=True)


def names_in_use(folder: Path) -> set[str]:
    """The names that running processes have added in `folder`; files of processes that have ended are removed."""
    names: set[str] = set()
    for lease in folder.glob("*.lease"):
        listed = lease.with_suffix(".names")
        if _is_dead(lease):
            listed.unlink(missing_ok=True)
            lease.unlink(missing_ok=True)
        elif listed.exists():
            names.update(listed.read_text(encoding="utf-8").splitlines())
    return names
