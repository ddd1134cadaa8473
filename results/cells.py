"""A table as texts, before it has a format: what every format for people shows, and in which words.

Imports no pandas and no SciPy, so that commands which only list things start fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from results.layout import Cell, Table

MISSING = "—"
_SIGNS = {"better": "▲", "worse": "▼"}


@dataclass(frozen=True)
class Entry:
    """One text of a grid: the number, and what is known about it; `best` is for bold."""

    value: str
    about: tuple[str, ...] = ()  # on the same line
    interval: str = ""  # on a second line where there is room
    best: bool = False

    def text(self, between: str = " ") -> str:
        line = " ".join([self.value, *self.about])
        return line + between + self.interval if self.interval else line


@dataclass(frozen=True)
class Grid:
    """The header, the rows (each begins with its label), and the sentences below."""

    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[str, ...]


def grid(table: Table) -> Grid:
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
        entries = [Entry(_row_label(table, i, label))]
        if seeds:
            entries.append(Entry(_seeds(table.cells[i])))
        for j, cell in enumerate(table.cells[i]):
            entries.append(_value(table, cell, (i, j) in best, footnotes))
            if table.published and table.published[j]:
                entries.append(_published(table, cell, (i, j) in best_published))
        entries += [_difference(table, label, table.cells[i][j], footnotes) for j in compared]
        rows.append(tuple(entries))
    numbered = [f"({i}) {note}." for i, note in enumerate(footnotes, 1)]
    return Grid(tuple(header), tuple(rows), (*numbered, *table.notes))


def _row_label(table: Table, at: int, label: str) -> str:
    counts = {cell.n for cell in table.cells[at] if cell.n is not None}
    # Where rows are tasks each has its own number of examples, the same for every method.
    return f"{label} (n={counts.pop()})" if table.best_along == "row" and len(counts) == 1 else label


def _seeds(cells: Sequence[Cell]) -> str:
    counts = sorted({sum(seed >= 0 for seed in cell.seeds) for cell in cells if cell.seeds})
    return "–".join(str(count) if count else "none" for count in dict.fromkeys([*counts[:1], *counts[-1:]]))


def _value(table: Table, cell: Cell, best: bool, footnotes: list[str]) -> Entry:
    form = f".{table.digits}f"
    about = [f"±{cell.spread:{form}}"] if cell.spread is not None else []
    about += _change(cell.change)
    if not table.differences:
        about += _sign(cell)
    about += _marked(cell.note, footnotes)
    if not table.differences and cell.difference_note != cell.note:  # there is no other place to say it
        about += _marked(cell.difference_note, footnotes)
    value = MISSING if cell.value is None else f"{cell.value:{form}}"
    return Entry(value, tuple(about), _interval(cell.interval, form), best)


def _published(table: Table, cell: Cell, best: bool) -> Entry:
    if cell.published is None:
        return Entry(MISSING)
    return Entry(f"{cell.published:.{table.digits}f}", tuple(_change(cell.published_change)), best=best)


def _difference(table: Table, label: str, cell: Cell, footnotes: list[str]) -> Entry:
    if label == table.reference:
        return Entry("reference")
    form = f"+.{table.digits}f"
    value = MISSING if cell.difference is None else f"{cell.difference:{form}}"
    about = (*_sign(cell), *_marked(cell.difference_note, footnotes))
    return Entry(value, about, _interval(cell.difference_interval, form))


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
