"""The table that everything here hands out: a layout that becomes a data frame and shows itself in a notebook."""

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from results.errors import UnknownName
from results.formats import render
from results.layout import Cell, Column, Layout

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Table(Layout):
    """Cells in rows and columns, with everything that is known of them (see `results.layout.Layout` for its fields)."""

    def to_frame(self, field: str = "value") -> "pd.DataFrame":
        """One field of every cell as a data frame, at full precision; rows and columns are called as in the table.

        field: of `results.layout.Cell`, such as `value`, `difference`, `p_corrected` or `interval`. What is missing is
        None, which pandas makes NaN in a column of numbers. Raises UnknownName for another field.
        """
        import pandas as pd

        known = [one.name for one in fields(Cell)]
        if field not in known:
            raise UnknownName("field of a cell", field, known)
        columns = [column.label for column in self.columns]
        values = {j: [getattr(row[j], field) for row in self.cells] for j in range(len(columns))}
        frame = pd.DataFrame(values, index=pd.Index(self.rows, name=self.corner))
        return frame.set_axis(columns, axis="columns")

    def _repr_html_(self) -> str:
        return render(self, "html")

    def _repr_markdown_(self) -> str:
        return render(self, "md")

    def __repr__(self) -> str:
        return f"<Table {self.title!r}: {len(self.rows)} rows, {len(self.columns)} columns>"


def transposed(table: Table) -> Table:
    """The table with the methods across; a note says what was a column, how many seeds they have."""
    seeds = {
        label: {seed for cell in cells for seed in cell.seeds if seed >= 0}
        for label, cells in zip(table.rows, table.cells, strict=True)
    }
    counts = ", ".join(f"{label} {len(own_seeds)}" for label, own_seeds in seeds.items() if own_seeds)
    return replace(
        table,
        rows=tuple(column.label for column in table.columns),
        columns=tuple(Column(label) for label in table.rows),
        cells=tuple(zip(*table.cells, strict=True)),
        corner="task",
        best_along="row",
        differences=False,
        notes=(*table.notes, *([f"Seeds: {counts}."] if counts else [])),
    )
