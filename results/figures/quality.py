"""Quality against a setting, such as lambda, k or the number of sources."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from results.errors import UnknownName, UserError
from results.figures import style
from results.paper_numbers import AVERAGE
from results.table import Table


def quality_figure(
    table: Table,
    series: Mapping[str, Mapping[str, float]],
    path: Path | str,
    *,
    along: str,
    column: str = AVERAGE,
    title: str = "",
) -> tuple[Path, ...]:
    """Draw quality against a setting, such as lambda, k or the number of sources.

    series: of each line the table's rows with their value of the setting, which is called `along`. What is drawn is
    the difference to the table's reference in `column`, with its paired interval. Raises UserError for a row or column
    that is not in the table, and for a line without any difference.
    """
    labels = [one.label for one in table.columns]
    if column not in labels:
        raise UnknownName("column", column, labels)
    with style.style():
        figure = style.new((6.4, 4.4))
        axes = figure.add_subplot()
        ticks: set[float] = set()
        for i, (name, rows) in enumerate(series.items()):
            points = []
            for row, x in sorted(rows.items(), key=lambda one: (one[1], one[0])):
                if row not in table.rows:
                    raise UnknownName("row", row, table.rows)
                cell = table.cells[table.rows.index(row)][labels.index(column)]
                if cell.difference is not None:
                    points.append((x, cell.difference, cell.difference_interval))
            if not points:
                raise UserError(f"no row of {name} has a difference to {table.reference} in {column}; evaluate both")
            settings = sorted({x for x, _, _ in points})
            ticks |= set(settings)
            # Several rows may have one value; the line goes through their mean, and each has its own place beside it.
            means = [float(np.mean([y for other, y, _ in points if other == x])) for x in settings]
            line = style.line_style(i)
            axes.plot(settings, means, **{**line, "marker": ""})
            apart = 0.012 * (max(settings) - min(settings))
            for x in settings:
                points_at = [(y, interval) for other, y, interval in points if other == x]
                for k, (y, interval) in enumerate(points_at):
                    shifted = x + apart * (2 * k - len(points_at) + 1)
                    axes.plot([shifted], [y], label=name if (x, k) == (settings[0], 0) else None, **line)
                    if interval:
                        axes.plot([shifted] * 2, interval, color=line["color"], linewidth=1, marker="_", markersize=6)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(sorted(ticks))
        axes.set_xlabel(along)
        axes.set_ylabel(f"{column} − {table.reference} ({table.measured_in})")
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend()
        style.entitle(figure, title or table.title, table.banner)
        return style.save(figure, Path(path))
