"""Which rank hangs or has died while all of them work together: one sentence, where a library would wait or abort.

A rank that dies leaves the others in a collective operation that never ends, and one that hangs does so, too; which one
it was cannot be seen from inside the operation. Every rank therefore notes how far it is in a file that all can read,
and a thread of each looks at those of the others.
"""

import contextlib
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.runtime import distributed

_INTERVAL = 0.5  # seconds between two looks at the other ranks
_REFRESH = 10.0  # seconds after which a rank shows that it lives, though it is no further
_SILENT = 180.0  # seconds without a sign of life after which a rank of another machine is taken for dead
_SETTLE = 5.0  # seconds in which the cause of a failed collective operation shows
_LEFT, _SAID = "left", "said"  # notes of a rank that is done, and of one that ends the run


@dataclass(frozen=True)
class Rank:
    """A process, which may be one of another machine."""

    number: int
    host: str
    pid: int
    started: str
    """When the process began, by the kernel's clock: another process may get its number."""

    def __str__(self) -> str:
        return f"rank {self.number} (process {self.pid} on {self.host})"

    def is_gone(self) -> bool:
        """True if it is a process of this machine that has ended."""
        return self.host == socket.gethostname() and _started(self.pid) != self.started


@dataclass
class _Seen:
    """What is known of a rank: how far it is, and when (`time.monotonic`) that and its sign of life last changed."""

    count: int = 0
    doing: str = "the start"
    note: str = ""
    advanced: float = 0.0
    alive: float = 0.0


class Heartbeat:
    """Context manager, entered by all ranks together: ends the run when one of them hangs or dies inside.

    The lowest rank that is well says which one it is, by `end`; the launcher then ends the others. `beat` must be
    called equally often by all ranks: the one that has done so least often is the one that the others wait for.
    """

    def __init__(self, folder: Path, *, what: str, patience: float, end: Callable[[str], None] | None = None) -> None:
        """`folder` is seen by all ranks and removed afterwards; `patience` in seconds without any rank's progress.

        what: a name of the work for the sentence.
        """
        self._folder, self._what, self._patience = folder, what, patience
        self._end = end or _end
        self._own = _Seen()
        self._stopped = threading.Event()
        self._ranks: Sequence[Rank] = []

    def __enter__(self) -> "Heartbeat":
        if distributed.world_size() == 1:
            return self
        pid = os.getpid()
        me = Rank(distributed.rank(), socket.gethostname(), pid, _started(pid))
        self._ranks = distributed.gather(me)
        self._me = me
        self._folder = self._folder / f"{self._ranks[0].pid}-{self._ranks[0].started}"
        self._folder.mkdir(parents=True, exist_ok=True)
        now = time.monotonic()
        self._seen = {rank.number: _Seen(advanced=now, alive=now) for rank in self._ranks}
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._ranks:
            return
        if error is not None:
            self._explain(error)
        self._stopped.set()
        self._thread.join()
        self._write(_LEFT)
        if self._me.number == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._folder.parent)

    def beat(self, doing: str) -> None:
        """Notes that this rank is further, and what it does now, as the end of "in ..."."""
        self._own.doing = doing
        self._own.count += 1

    def _explain(self, error: BaseException) -> None:
        """Says so where an error is that of a collective operation which another rank has left by dying."""
        wait = _SETTLE if isinstance(error, RuntimeError) else 0.0
        until = time.monotonic() + wait
        while not self._death() and time.monotonic() < until:
            try:
                time.sleep(_INTERVAL / 5)
            except BaseException:  # the launcher ends this rank because it has seen that another has died
                self._death()
                raise

    def _death(self) -> bool:
        """Looks at the others, and whether one of them has died."""
        self._look()
        return self._judge(deaths_only=True)

    def _watch(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            self._look()
            self._judge()

    def _look(self) -> None:
        now = time.monotonic()
        own = self._seen[self._me.number]
        changed = own.count != self._own.count
        if changed or now - own.alive >= _REFRESH:
            self._write(f"{self._own.count}\n{self._own.doing}\n{now}")
            own.count, own.doing, own.alive = self._own.count, self._own.doing, now
            own.advanced = now if changed else own.advanced
        for rank in self._ranks:
            seen = self._seen[rank.number]
            note = self._read(rank)
            if rank == self._me or note is None or note == seen.note:
                continue
            seen.note, seen.alive = note, now
            if note in (_LEFT, _SAID):
                continue
            count, seen.doing, _ = note.split("\n")
            if int(count) != seen.count:
                seen.count, seen.advanced = int(count), now

    def _judge(self, *, deaths_only: bool = False) -> bool:
        """Whether a rank has died or hangs, or another has said so; ends the run if it is this one that has to."""
        if any(seen.note == _SAID for seen in self._seen.values()):
            return True
        now = time.monotonic()
        here = [rank for rank in self._ranks if self._seen[rank.number].note != _LEFT]
        dead = [r for r in here if r.is_gone() or now - self._seen[r.number].alive > _SILENT]
        if dead:
            doing = self._seen[dead[0].number].doing
            self._say(dead, f"{_names(dead)} died in {doing} of {self._what}")
            return True
        if deaths_only or now - max(self._seen[rank.number].advanced for rank in here) < self._patience:
            return False
        least = min(self._seen[rank.number].count for rank in here)
        hung = [rank for rank in here if self._seen[rank.number].count == least]
        minutes = f"{self._patience / 60:g} minutes (training.timeout_minutes)"
        doing = self._seen[hung[0].number].doing
        self._say(hung, f"{_names(hung)} did not get on for {minutes} in {doing} of {self._what}")
        return True

    def _say(self, ill: Sequence[Rank], sentence: str) -> None:
        well = [r for r in self._ranks if r not in ill and self._seen[r.number].note != _LEFT]
        if self._me == (well or ill)[0]:
            self._write(_SAID)
            self._end(f"{sentence}; look at that machine's log and memory. The same command goes on from here.")

    def _write(self, note: str) -> None:
        file = self._folder / f"rank-{self._me.number}"
        with contextlib.suppress(OSError):  # a full disk, or rank 0 has removed the folder
            beside = file.with_suffix(".new")
            beside.write_text(note, encoding="utf-8")
            beside.replace(file)

    def _read(self, rank: Rank) -> str | None:
        with contextlib.suppress(OSError):
            return (self._folder / f"rank-{rank.number}").read_text(encoding="utf-8")
        return None


def _names(ranks: Sequence[Rank]) -> str:
    return " and ".join(str(rank) for rank in ranks)


def _started(pid: int) -> str:
    """When a process of this machine began, in ticks since the machine did; empty where it has ended."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        if fields[0] not in "ZX":
            return fields[19]
    return ""


def _end(sentence: str) -> None:
    """Prints the sentence and ends this process at once: its main thread may be in a call that never returns."""
    print(f"fusellm: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)
