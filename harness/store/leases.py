"""Who makes which part: claims that processes on any number of machines lay in a folder which they share.

A claim is a file that only one process can create, and that its owner touches while it is at work. An owner that has
ended is noticed at once on its own machine and by its silence from another. Locks of the operating system would say it
sooner, but not every shared file system passes them on. Where two come to hold one claim all the same (one of them was
suspended, or both took over at one moment), a part is made twice: whoever uses claims must bear that.
"""

import json
import os
import socket
import threading
import uuid
from contextlib import suppress
from functools import cache
from pathlib import Path

HEARTBEAT_S = 10.0
LEASE_TIMEOUT_S = 180.0  # a file server's clients may believe for a minute that nothing has changed


@cache
def _place() -> str:
    """Where a process id means one process: a machine since its start, and the container on it."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # only Linux tells
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return "/".join(parts)


def _started(pid: int) -> float | None:
    """When the process was started (seconds since the epoch); None when it does not run."""
    import psutil

    with suppress(psutil.Error):
        process = psutil.Process(pid)
        if process.status() != psutil.STATUS_ZOMBIE:
            return float(process.create_time())
    return None


def _is_dead(lease: Path) -> bool:
    """Whether the claim's owner has ended or been silent for too long. A claim that is gone is not dead."""
    now = lease.parent / "now"
    now.touch()  # the file server's clock is the one that counts
    try:
        with lease.open(encoding="utf-8") as file:  # opening asks a file server for its present state
            owner, beat = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return False
    if now.stat().st_mtime - beat > LEASE_TIMEOUT_S:
        return True
    try:
        place, pid, started = json.loads(owner)
    except ValueError:  # its owner is just writing it
        return False
    if place != _place():
        return False
    running = _started(pid)
    return running is None or abs(running - started) > 1  # else another process with its number


def in_use(folder: Path) -> bool:
    """Whether a process is at work with the claims in `folder`."""
    return any(not _is_dead(lease) for lease in folder.glob("*.lease"))


class Leases:
    """One process' claims in a folder, to be used in a `with` block, whose end gives them all back.

    A process makes one part at a time: to take the next is to have finished the one before, whose claim stays, so that
    nobody makes it again who does not see the part yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._taken: list[Path] = []
        self._ended = threading.Event()

    def __enter__(self) -> "Leases":
        self.take(uuid.uuid4().hex)  # a part of its own that says: somebody is here, between two parts too
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for lease in self._taken:
            lease.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            for lease in {self._taken[0], self._taken[-1]}:
                with suppress(OSError):
                    os.utime(lease)

    def take(self, part: str) -> bool:
        """Whether the part is ours to make. Raises FileNotFoundError when the folder is gone."""
        lease = self.folder / f"{part}.lease"
        if lease.exists() and _is_dead(lease):
            lease.unlink(missing_ok=True)
        try:
            with lease.open("x", encoding="utf-8") as file:
                self._taken.append(lease)
                json.dump([_place(), os.getpid(), _started(os.getpid())], file)
        except FileExistsError:
            return False
        return True
