"""What a table is, before it has a format: rows, columns, cells, the sentences needed to read them, and its texts.

Imports no pandas and no SciPy, so that commands which only list things start fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose
from typing import Literal, NamedTuple

Verdict = Literal["better", "worse"]
MISSING = "—"
_SIGNS = {"better": "▲", "worse": "▼"}


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
        """The tasks that the column is an average of."""
        return tuple(part.task for part in self.parts)


@dataclass(frozen=True)
class Cell:
    """One number and what is known about it; value None: it is missing, and `note` says why.

    difference is this row minus the table's reference. seeds are those behind the value, -1 alone for a method without.
    spread is the standard deviation over seeds. An interval is None below 20 examples in any task behind the cell.
    p is a paired test's that the difference is zero, p_corrected that for all comparisons of its family (Holm), and
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
    lossy: bool = False
    """True where the tokens do not spell the text: the value is no measure of it and is never the best."""


@dataclass(frozen=True)
class Layout:
    """Cells in rows and columns, `cells[row][column]` (see `results.table.Table`, which is what is handed out).

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
    values: str = ""  # what the values are, with their unit
    precision: str = ""  # that they were computed in

    @property
    def measured_in(self) -> str:
        """Unit, direction and precision of the values."""
        better = "higher" if self.higher_is_better else "lower"
        return ", ".join(part for part in (self.values, f"{better} is better", self.precision) if part)

    def best(self, published: bool = False) -> frozenset[tuple[int, int]]:
        """The (row, column) of every best value, or published one; equal ones are all best, unless all are equal."""
        lines: dict[int, list[tuple[float, tuple[int, int]]]] = {}
        for i, row in enumerate(self.cells):
            for j, cell in enumerate(row):
                value = cell.published if published else cell.value
                if value is not None and (published or not cell.lossy):
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


@dataclass(frozen=True)
class CellText:
    """One text of a grid: the number, and what is known about it; `best` is for bold."""

    value: str
    about: tuple[str, ...] = ()  # on the same line
    interval: str = ""  # on a second line where there is room
    best: bool = False

    def text(self, between: str = " ") -> str:
        """The whole text, with `between` before the interval."""
        line = " ".join([self.value, *self.about])
        return line + between + self.interval if self.interval else line


@dataclass(frozen=True)
class Grid:
    """The header, the rows (each begins with its label), and the sentences below."""

    header: tuple[str, ...]
    rows: tuple[tuple[CellText, ...], ...]
    notes: tuple[str, ...]


def grid(table: Layout) -> Grid:
    """The table's texts, rounded for people: seeds, values (published ones beside them), differences, notes."""
    footnotes: list[str] = []
    best, best_published = table.best(), table.best(published=True)
    seeds = any(cell.seeds for row in table.cells for cell in row) and table.best_along == "column"
    header = [table.corner, *(["seeds"] if seeds else [])]
    for j, column in enumerate(table.columns):
        header.append(f"{column.label} (n={column.n})" if column.n is not None else column.label)
        if table.published and table.published[j]:
            header.append(table.published[j])
    compared = [j for j, one in enumerate(table.columns) if one.compared and table.reference and table.differences]
    header += [f"{table.columns[j].label} − {table.reference}" for j in compared]
    rows = []
    for i, label in enumerate(table.rows):
        entries = [CellText(_row_label(table, i, label))]
        if seeds:
            entries.append(CellText(_seeds(table.cells[i])))
        for j, cell in enumerate(table.cells[i]):
            entries.append(_value(table, cell, (i, j) in best, footnotes))
            if table.published and table.published[j]:
                entries.append(_published(table, cell, (i, j) in best_published))
        entries += [_difference(table, label, table.cells[i][j], footnotes) for j in compared]
        rows.append(tuple(entries))
    numbered = [f"({i}) {note}." for i, note in enumerate(footnotes, 1)]
    return Grid(tuple(header), tuple(rows), (*numbered, *table.notes))


def _row_label(table: Layout, at: int, label: str) -> str:
    counts = {cell.n for cell in table.cells[at] if cell.n is not None}
    # Where rows are tasks each has its own number of examples, the same for every method.
    return f"{label} (n={counts.pop()})" if table.best_along == "row" and len(counts) == 1 else label


def _seeds(cells: Sequence[Cell]) -> str:
    counts = sorted({sum(seed >= 0 for seed in cell.seeds) for cell in cells if cell.seeds})
    return "–".join(str(count) if count else "none" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))


def _value(table: Layout, cell: Cell, best: bool, footnotes: list[str]) -> CellText:
    form = f"z.{table.digits}f"
    about = [f"±{cell.spread:{form}}"] if cell.spread is not None else []
    about += _change(cell.change)
    if not table.differences:
        about += _sign(cell)
    about += _marked(cell.note, footnotes)
    if not table.differences and cell.difference_note != cell.note:  # there is no other place to say it
        about += _marked(cell.difference_note, footnotes)
    value = MISSING if cell.value is None else f"{cell.value:{form}}"
    return CellText(value, tuple(about), _interval(cell.interval, form), best)


def _published(table: Layout, cell: Cell, best: bool) -> CellText:
    if cell.published is None:
        return CellText(MISSING)
    return CellText(f"{cell.published:.{table.digits}f}", tuple(_change(cell.published_change)), best=best)


def _difference(table: Layout, label: str, cell: Cell, footnotes: list[str]) -> CellText:
    if label == table.reference:
        return CellText("reference")
    form = f"+z.{table.digits}f"
    value = MISSING if cell.difference is None else f"{cell.difference:{form}}"
    about = (*_sign(cell), *_marked(cell.difference_note, footnotes))
    return CellText(value, about, _interval(cell.difference_interval, form))


def _change(change: float | None) -> list[str]:
    return [] if change is None else [f"({change:+.2%})"]


def _sign(cell: Cell) -> list[str]:
    return [_SIGNS[cell.verdict] * (2 if cell.general else 1)] if cell.verdict else []


def _interval(interval: tuple[float, float] | None, form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""


def _marked(note: str, footnotes: list[str]) -> list[str]:
    if not note:
        return []
    if note not in footnotes:
        footnotes.append(note)
    return [f"({footnotes.index(note) + 1})"]
