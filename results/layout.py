"""What a table is, before it has a format: rows, columns, cells, and the sentences needed to read them."""

from dataclasses import dataclass
from math import isclose
from typing import Literal, NamedTuple

Verdict = Literal["better", "worse"]


class Part(NamedTuple):
    """What is measured: one task of a suite under one metric."""

    suite: str
    task: str
    metric: str


@dataclass(frozen=True)
class Column:
    """One column of values; `parts` are what it is the unweighted mean of, `n` the examples in them, the same for every
    row.
    """

    label: str
    parts: tuple[Part, ...] = ()
    n: int | None = None
    compared: bool = False  # its difference to the reference is tested

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(part.task for part in self.parts)


@dataclass(frozen=True)
class Cell:
    """One number and what is known about it; value None: it is missing, and `note` says why.

    difference is this row minus the table's reference. seeds are those behind the value, -1 alone for a method without.
    spread is the standard deviation over seeds. An interval is None below 20 examples in any task behind the cell.
    p is a paired test's that the difference is zero, p_corrected that for all comparisons of the table (Holm), and
    verdict is None where the latter is above 5 %; `general` says that the test counted seeds too, so that the verdict
    is about the method and not only about these checkpoints.
    change is relative to the target (0.05: five percent more). evaluations are the fingerprints of what was evaluated.
    """

    value: float | None
    interval: tuple[float, float] | None = None
    n: int | None = None
    seeds: tuple[int, ...] = ()
    spread: float | None = None
    note: str = ""
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    difference_seeds: tuple[int, ...] = ()
    difference_note: str = ""
    p: float | None = None
    p_corrected: float | None = None
    verdict: Verdict | None = None
    general: bool = False
    change: float | None = None
    published: float | None = None
    published_change: float | None = None
    evaluations: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Cells in rows and columns, `cells[row][column]`.

    best_along "column" marks the best value of each column, "row" that of each row. digits are those printed for
    people; CSV and JSON carry full precision. notes are sentences printed below. differences: those of compared columns
    are printed in columns of their own. published heads, for every column, the published values printed beside it; it
    is empty where none are.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    higher_is_better: bool
    digits: int
    corner: str = "method"  # heads the row labels
    best_along: Literal["column", "row"] = "column"
    reference: str | None = None
    differences: bool = True
    published: tuple[str, ...] = ()
    banner: str = ""
    notes: tuple[str, ...] = ()

    def best(self, published: bool = False) -> frozenset[tuple[int, int]]:
        """The (row, column) of every best value, or published one; equal ones are all best, unless all are equal."""
        lines: dict[int, list[tuple[float, tuple[int, int]]]] = {}
        for i, row in enumerate(self.cells):
            for j, cell in enumerate(row):
                value = cell.published if published else cell.value
                if value is not None:
                    lines.setdefault(j if self.best_along == "column" else i, []).append((value, (i, j)))
        top = max if self.higher_is_better else min
        marked: set[tuple[int, int]] = set()
        for line in lines.values():
            best = top(value for value, _ in line)
            # Means of the same in another order differ in the last digit.
            ties = {at for value, at in line if isclose(value, best, rel_tol=1e-12)}
            if len(ties) < len(line):
                marked |= ties
        return frozenset(marked)
