"""Differences to the reference: by how much each method differs from it in every task of a table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from results.errors import UnknownName
from results.figures import style
from results.layout import Cell
from results.paper_numbers import AVERAGE
from results.table import Table

_ACROSS = 4  # panels beside each other


def differences_figure(
    table: Table, path: Path | str, methods: Sequence[str] | None = None, *, title: str = ""
) -> tuple[Path, ...]:
    """Draw by how much methods differ from the table's reference in every task: sorted bars, one panel a method.

    methods: by default all with a difference in at least two tasks; without any nothing is drawn. Averages are left
    out. Intervals are not corrected for the number of tasks. Raises UserError for a method that is not in the table.
    """
    names = [column.label for column in table.columns] if table.best_along == "row" else list(table.rows)
    for method in methods or ():
        if method not in names:
            raise UnknownName("method", method, names)
    panels = {method: _differences(table, names.index(method)) for method in methods or names}
    panels = {method: panel for method, panel in panels.items() if len(panel) > 1}
    if not panels:
        return ()
    longest = max(map(len, panels.values()))
    across = min(len(panels), _ACROSS)
    down = -(-len(panels) // across)
    unit = ", ".join(part for part in (table.values, table.precision) if part)
    with style.style():
        figure = style.new((2.2 + 3.6 * across, 0.8 + (1 + 0.24 * longest) * down))
        for i, (method, panel) in enumerate(panels.items()):
            axes = figure.add_subplot(down, across, i + 1)
            for height, (_, cell) in enumerate(panel):
                assert cell.difference is not None
                low, high = cell.difference_interval or (cell.difference, cell.difference)
                axes.barh(height, cell.difference, 0.7, **_verdict_style(cell))
                axes.plot([low, high], [height, height], color="black", linewidth=1)
            axes.set_yticks(range(len(panel)), [task for task, _ in panel], fontsize=8)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel(f"{method} − {table.reference}" + (f" ({unit})" if unit else ""), fontsize=8)
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
        side = "right is better" if table.higher_is_better else "left is better"
        corrected = any(cell.verdict for panel in panels.values() for _, cell in panel)
        filled = "; dark: better, hatched: worse, corrected for their number" if corrected else ""
        figure.supxlabel(f"{side}; lines: 95% intervals{filled}", fontsize=8)
        style.entitle(figure, title or table.title, table.banner)
        return style.save(figure, Path(path))


def _verdict_style(cell: Cell) -> dict[str, Any]:
    style = {"better": ("0.5", ""), "worse": ("#E69F00", "//"), None: ("0.9", "")}[cell.verdict]
    return {"color": style[0], "hatch": style[1], "edgecolor": "black", "linewidth": 0.5}


def _differences(table: Table, index: int) -> list[tuple[str, Cell]]:
    """The tasks and cells of the method with this index, sorted by difference."""
    across = table.best_along == "row"
    cells = [row[index] for row in table.cells] if across else list(table.cells[index])
    tasks = table.rows if across else [column.label for column in table.columns]
    differing = [
        (task, cell)
        for task, cell in zip(tasks, cells, strict=True)
        if cell.difference is not None and not task.startswith(AVERAGE)
    ]
    return sorted(differing, key=lambda one: (one[1].difference or 0.0, one[0]))
