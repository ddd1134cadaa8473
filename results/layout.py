"""What a table is, before it has a format: rows, columns, cells, and the sentences needed to read them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One column of values; `tasks` are the domains behind it, `n` the examples in them, the same for every row."""

    label: str
    tasks: tuple[str, ...] = ()
    n: int | None = None
    compared: bool = False  # its difference to the baseline has a printed column of its own


@dataclass(frozen=True)
class Cell:
    """One number and what is known about it; value None: it is missing, and `note` says why.

    difference is this row minus the table's baseline. seeds are those behind the value, -1 alone for a method without.
    spread is the standard deviation over seeds. An interval is None below 20 examples in any task behind the cell.
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


@dataclass(frozen=True)
class Table:
    """Cells in rows and columns, `cells[row][column]`.

    best_along "column" marks the best value of each column, "row" that of each row. digits are those printed for
    people; CSV and JSON carry full precision. notes are sentences printed below.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    higher_is_better: bool
    digits: int
    corner: str = "method"  # heads the row labels
    best_along: str = "column"
    baseline: str | None = None
    banner: str = ""
    notes: tuple[str, ...] = ()

    def best(self) -> frozenset[tuple[int, int]]:
        """The (row, column) of every best value; equal values are all best."""
        lines: dict[int, list[tuple[float, tuple[int, int]]]] = {}
        for i, row in enumerate(self.cells):
            for j, cell in enumerate(row):
                if cell.value is not None:
                    lines.setdefault(j if self.best_along == "column" else i, []).append((cell.value, (i, j)))
        top = max if self.higher_is_better else min
        marked: set[tuple[int, int]] = set()
        for line in lines.values():
            best = top(value for value, _ in line)
            marked.update(at for value, at in line if value == best)
        return frozenset(marked)
