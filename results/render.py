"""Tables as text: Markdown, CSV and JSON with the same bytes every time, and Rich for the terminal.

Imports no pandas and no SciPy, so that commands which only list things start fast.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from results.errors import UserError
from results.layout import Cell, Table
from results.metrics import unknown

if TYPE_CHECKING:
    from rich.console import Group, RenderableType

MISSING = "—"


def render(table: Table, form: str) -> str:
    """The table as text; `form` is one of FORMATS, another raises UserError.

    md is for people (rounded, the best in bold, reasons for what is missing below); csv has one line a cell and json
    the whole table, both at full precision.
    """
    if form not in FORMATS:
        raise UserError(unknown("table format", form, FORMATS))
    return FORMATS[form](table)


def plain_table(columns: Sequence[str], rows: Iterable[Sequence[object]], form: str) -> str:
    """Any list as a table; `form` is md, csv or json (a list of objects); None and NaN are empty (json: null).

    Raises UserError for another format, ValueError for a row that is not as long as `columns`.
    """
    body = [[_empty_nan(value) for _, value in zip(columns, row, strict=True)] for row in rows]
    if form == "md":
        return _markdown(columns, [[_shown(value) for value in row] for row in body])
    if form == "csv":
        return _csv([list(columns), *body])
    if form == "json":
        return _json([dict(zip(columns, row, strict=True)) for row in body])
    raise UserError(unknown("table format", form, FORMATS))


def plain_rich(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> "RenderableType":
    """Any list of things for the terminal; numbers stand right."""
    body = [[_empty_nan(value) for _, value in zip(columns, row, strict=True)] for row in rows]
    numeric = [all(isinstance(row[j], int | float | None) for row in body) for j in range(len(columns))]
    return _rich(columns, [[(_shown(value), "") for value in row] for row in body], numeric, title)


def to_rich(table: Table) -> "Group":
    """The table for the terminal: banner above, the best in bold, intervals on a second line, notes below."""
    from rich.console import Group
    from rich.text import Text

    footnotes: list[str] = []
    best = table.best()
    header = _header(table)
    body: list[list[tuple[str, str]]] = []
    for i, row in enumerate(table.rows):
        texts = _row(table, i, footnotes, "\n")
        marks = {1 + _has_seeds(table) + j for k, j in best if k == i}
        body.append([(text, "bold" if at in marks else "") for at, text in enumerate([row, *texts])])
    parts: list[RenderableType] = [Text(table.banner.upper(), style="bold reverse")] if table.banner else []
    parts.append(_rich(header, body, [False] + [True] * (len(header) - 1), table.title))
    parts += [Text(note, style="dim") for note in [*_numbered(footnotes), *table.notes]]
    return Group(*parts)


def _as_markdown(table: Table) -> str:
    footnotes: list[str] = []
    best = table.best()
    first = 1 + _has_seeds(table)
    body = []
    for i, label in enumerate(table.rows):
        row = [_escaped(text) for text in [label, *_row(table, i, footnotes, " ")]]
        for j in range(len(table.columns)):
            if (i, j) in best:
                value, _, rest = row[first + j].partition(" ")
                row[first + j] = f"**{value}** {rest}".rstrip()
        body.append(row)
    lines = [f"**{table.banner.upper()}**\n"] if table.banner else []
    lines += [f"**{table.title}**\n", _markdown(_header(table), body, escape=False)]
    lines += [f"{_escaped(note)}  " for note in [*_numbered(footnotes), *table.notes]]
    return "\n".join(lines).rstrip() + "\n"


def _as_csv(table: Table) -> str:
    best = table.best()
    head = [table.corner, "column", "value", "low", "high", "n", "seeds", "spread", "best", "note"]
    head += ["baseline", "difference", "difference_low", "difference_high", "difference_seeds", "difference_note"]
    lines: list[list[object]] = [list(head)]
    for i, row in enumerate(table.rows):
        for j, column in enumerate(table.columns):
            cell = table.cells[i][j]
            low, high = cell.interval or (None, None)
            seeds, other = (" ".join(map(str, one)) for one in (cell.seeds, cell.difference_seeds))
            line = [
                row,
                column.label,
                cell.value,
                low,
                high,
                cell.n,
                seeds,
                cell.spread,
                int((i, j) in best),
                cell.note,
            ]
            low, high = cell.difference_interval or (None, None)
            lines.append([*line, table.baseline, cell.difference, low, high, other, cell.difference_note])
    return _csv(lines)


def _as_json(table: Table) -> str:
    best = table.best()
    whole = asdict(table)
    for i, row in enumerate(whole["cells"]):
        for j, cell in enumerate(row):
            cell["best"] = (i, j) in best
    return _json(whole)


FORMATS: dict[str, Callable[[Table], str]] = {"md": _as_markdown, "csv": _as_csv, "json": _as_json}


def _has_seeds(table: Table) -> bool:
    return any(cell.seeds for row in table.cells for cell in row)


def _header(table: Table) -> list[str]:
    columns = [f"{one.label} (n={one.n})" if one.n is not None else one.label for one in table.columns]
    differences = [f"{one.label} − {table.baseline}" for one in table.columns if one.compared and table.baseline]
    return [table.corner, *(["seeds"] if _has_seeds(table) else []), *columns, *differences]


def _row(table: Table, at: int, footnotes: list[str], between: str) -> list[str]:
    """The texts of one row after its label; reasons for missing numbers join `footnotes`."""
    texts = []
    if _has_seeds(table):
        counts = sorted({sum(seed >= 0 for seed in cell.seeds) for cell in table.cells[at] if cell.seeds})
        texts.append("–".join(str(count) if count else "none" for count in dict.fromkeys([*counts[:1], *counts[-1:]])))
    for cell in table.cells[at]:
        texts.append(_value(table, cell, footnotes, between))
    for cell, column in zip(table.cells[at], table.columns, strict=True):
        if column.compared and table.baseline:
            texts.append(_difference(table, at, cell, footnotes, between))
    return texts


def _value(table: Table, cell: Cell, footnotes: list[str], between: str) -> str:
    text = MISSING if cell.value is None else f"{cell.value:.{table.digits}f}"
    if cell.spread is not None:
        text += f" ±{cell.spread:.{table.digits}f}"
    text += _marked(cell.note, footnotes)
    return text + (between + _interval(cell.interval, f".{table.digits}f") if cell.interval else "")


def _difference(table: Table, at: int, cell: Cell, footnotes: list[str], between: str) -> str:
    if table.rows[at] == table.baseline:
        return "baseline"
    text = MISSING if cell.difference is None else f"{cell.difference:+.{table.digits}f}"
    text += _marked(cell.difference_note, footnotes)
    form = f"+.{table.digits}f"
    return text + (between + _interval(cell.difference_interval, form) if cell.difference_interval else "")


def _interval(interval: tuple[float, float], form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _marked(note: str, footnotes: list[str]) -> str:
    if not note:
        return ""
    if note not in footnotes:
        footnotes.append(note)
    return f" ({footnotes.index(note) + 1})"


def _numbered(footnotes: Sequence[str]) -> list[str]:
    return [f"({i}) {note}." for i, note in enumerate(footnotes, 1)]


def _empty_nan(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    head = [_escaped(column) for column in columns]
    body = [[_escaped(text) for text in row] if escape else list(row) for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)  # floats by repr: they read back equal
    return out.getvalue()


def _json(value: object) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _rich(
    columns: Sequence[str], rows: Sequence[Sequence[tuple[str, str]]], right: Sequence[bool], title: str
) -> "RenderableType":
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD)
    for column, numeric in zip(columns, right, strict=True):
        drawn.add_column(Text(column), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(text, style=style) for text, style in row))
    return drawn
