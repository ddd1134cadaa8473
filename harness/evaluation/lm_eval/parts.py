"""Answers in parts: consecutive examples that one process answers together, whichever of several it is.

The batches of a model hold requests of one part and nothing else, so that answers are the same bit for bit whoever
makes which parts, in whatever order and after however many kills. A part is written when all of it is answered: a kill
costs the parts under way.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from harness.evaluation.suite import write_lines
from harness.runtime.progress import track
from harness.store.files import read_json, write_json
from harness.store.leases import Leases

REQUESTS = 256  # of a part: enough to fill batches, few enough to divide among processes and to lose in a kill
_FOLDER = "parts"

Lines = dict[str, list[dict[str, Any]]]
"""Lines by the name of their file."""


@dataclass
class AnswerParts:
    """The answers to one task, which several processes make in parts and one joins."""

    description: str
    """What progress is shown of."""
    sizes: Callable[[], Mapping[str, int]]
    """The number of requests of every example, in order."""
    answer: Callable[[Path, Leases, Sequence[str], Lines], tuple[Lines, Mapping[str, str]]]
    """answer(folder, leases, examples, known lines) -> the lines of some examples, and by example why it has none."""
    known: Callable[[Path], Mapping[str, Lines]]
    """known(folder) -> by example, the lines that are known before the first part is made."""
    files: Sequence[str]
    """The names of the files of lines, of which the first is always there."""
    failures: dict[str, str] = field(default_factory=dict)
    """By example: why this process could not answer it."""

    @cached_property
    def parts(self) -> list[list[str]]:
        """The examples of each part."""
        from fusion.inference.decoding import pack_consecutive  # which needs torch

        sizes = self.sizes()
        names = list(sizes)
        return [[names[i] for i in part] for part in pack_consecutive(list(sizes.values()), REQUESTS)]

    def make(self, folder: Path, leases: Leases) -> None:
        """Makes the parts that no other process makes; what is answered of a part with `failures` is kept."""
        if self._joined(folder):
            return
        parts = folder / _FOLDER
        parts.mkdir(exist_ok=True)
        leases.make_missing([parts / "begun.json"], lambda _: self._begin(folder), wait=True)
        files = [parts / _name(number) for number in range(len(self.parts))]
        sizes = [len(part) for part in self.parts]
        done = sum(size for size, file in zip(sizes, files, strict=True) if file.exists())

        def make(number: int) -> bool:
            if self._joined(folder):  # by another process meanwhile
                return True
            if not self.failures.keys().isdisjoint(self.parts[number]):
                return False
            kept = parts / _kept_name(number)
            lines, failures = self.answer(folder, leases, self.parts[number], _read(kept) if kept.exists() else {})
            self.failures |= failures
            write_json(kept if failures else files[number], lines)
            advance(sizes[number])
            return not failures

        with track(self.description, sum(sizes), "examples", done=done) as advance:
            leases.make_missing(files, make)

    def join(self, folder: Path) -> None:
        """Joins the parts to the files of lines, in the order of the examples, where that is not done yet."""
        parts = folder / _FOLDER
        if not self._joined(folder):
            read = [_read(parts / _name(number)) for number in range(len(self.parts))]
            for file in reversed(self.files):  # the first last: where it is, the others are
                lines = [line for part in read for line in part.get(file, [])]
                if lines or file == self.files[0]:
                    write_lines(folder / file, lines)
        shutil.rmtree(parts, ignore_errors=True)

    def _begin(self, folder: Path) -> bool:
        known = self.known(folder)
        for number, examples in enumerate(self.parts):
            kept: Lines = {}
            for example in examples:
                for file, lines in known.get(example, {}).items():
                    kept.setdefault(file, []).extend(lines)
            if kept:
                write_json(folder / _FOLDER / _kept_name(number), kept)
        write_json(folder / _FOLDER / "begun.json", {})
        return True

    def _joined(self, folder: Path) -> bool:
        return (folder / self.files[0]).exists() or not folder.exists()


def _name(number: int) -> str:
    """The file of a part that is made."""
    return f"part-{number:05d}.json"


def _kept_name(number: int) -> str:
    """The file of what is known of a part that is not made."""
    return f"kept-{number:05d}.json"


def _read(file: Path) -> Lines:
    lines: Lines = read_json(file, "remove that file to have it made again")
    return lines
