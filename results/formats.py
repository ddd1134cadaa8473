"""Tables as text: Markdown, CSV, JSON, LaTeX and HTML with the same bytes every time, and Rich for the terminal.

Imports no pandas and no SciPy, so that commands which only list things start fast.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING

from results.errors import UnknownName
from results.layout import CellText, Layout, grid

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def render(table: Layout, form: str) -> str:
    """The table as text; `form` is one of FORMATS, another raises UserError.

    md, latex and html are for people (rounded, the best in bold, reasons for what is missing below); csv has one line a
    cell and json the whole table, both at full precision.
    """
    return render_all([table], form)


def render_all(tables: Sequence[Layout], form: str) -> str:
    """Several tables, one after another; json gives a list of them where there are not exactly one."""
    if form not in FORMATS:
        raise UnknownName("table format", form, FORMATS)
    if form == "json" and len(tables) != 1:
        return _json([_whole(table) for table in tables])
    return "\n".join(FORMATS[form](table) for table in tables)


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
    raise UnknownName("list format", form, ("md", "csv", "json"))


def plain_rich(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> "RenderableType":
    """Any list of things for the terminal; numbers stand right."""
    body = [[_empty_nan(value) for _, value in zip(columns, row, strict=True)] for row in rows]
    numeric = [all(isinstance(row[j], int | float | None) for row in body) for j in range(len(columns))]
    return _rich(columns, [[(_shown(value), "") for value in row] for row in body], numeric, title)


def to_rich(table: Layout) -> "Group":
    """The table for the terminal: banner above, the best in bold, intervals on a second line, notes below."""
    from rich.console import Group
    from rich.text import Text

    shown = grid(table)
    body = [[(cell.text("\n"), "bold" if cell.best else "") for cell in row] for row in shown.rows]
    parts: list[RenderableType] = [Text(table.banner.upper(), style="bold reverse")] if table.banner else []
    parts.append(_rich(shown.header, body, [False] + [True] * (len(shown.header) - 1), table.title))
    parts += [Text(note, style="dim") for note in shown.notes]
    return Group(*parts)


def _as_markdown(table: Layout) -> str:
    shown = grid(table)

    def text(cell: CellText) -> str:
        whole = _escaped(cell.text())
        value = _escaped(cell.value)
        return f"**{value}**{whole.removeprefix(value)}" if cell.best else whole

    lines = [f"**{_escaped(table.banner.upper())}**\n"] if table.banner else []
    body = [[text(cell) for cell in row] for row in shown.rows]
    lines += [f"**{_escaped(table.title)}**\n", _markdown(shown.header, body, escape=False)]
    lines += [f"{_escaped(note)}  " for note in shown.notes]
    return "\n".join(lines).rstrip() + "\n"


def _as_csv(table: Layout) -> str:
    best = table.best()
    head = [table.corner, "column", "value", "low", "high", "n", "seeds", "spread", "best", "note"]
    head += ["reference", "difference", "difference_low", "difference_high", "difference_seeds", "difference_note"]
    head += ["p", "p_corrected", "verdict", "change", "published", "published_change", "evaluations"]
    lines: list[list[object]] = [list(head)]
    for i, row in enumerate(table.rows):
        for j, column in enumerate(table.columns):
            cell = table.cells[i][j]
            seeds, others = (" ".join(map(str, one)) for one in (cell.seeds, cell.difference_seeds))
            line: list[object] = [row, column.label, cell.value, *(cell.interval or (None, None)), cell.n, seeds]
            line += [cell.spread, int((i, j) in best), cell.note]
            line += [table.reference, cell.difference, *(cell.difference_interval or (None, None)), others]
            line += [cell.difference_note, cell.p, cell.p_corrected, cell.verdict]
            line += [cell.change, cell.published, cell.published_change, " ".join(cell.evaluations)]
            lines.append(line)
    return _csv(lines)


def _as_json(table: Layout) -> str:
    return _json(_whole(table))


def _whole(table: Layout) -> dict[str, object]:
    best = table.best()
    whole = asdict(table)
    for i, row in enumerate(whole["cells"]):
        for j, cell in enumerate(row):
            cell["best"] = (i, j) in best
    return whole


def _caption(table: Layout) -> str:
    """The title, with unit, direction and precision where the table knows its unit."""
    return f"{table.title} ({table.measured_in})" if table.values else table.title


def _as_latex(table: Layout) -> str:
    """Needs the packages booktabs and amssymb."""
    shown = grid(table)

    def text(cell: CellText) -> str:
        value = rf"\textbf{{{_tex(cell.value)}}}" if cell.best else _tex(cell.value)
        return " ".join(
            [value, *map(_tex, cell.about), *([rf"{{\scriptsize {_tex(cell.interval)}}}"] * bool(cell.interval))]
        )

    lines = [r"\begin{table}", r"\centering"]
    caption = ": ".join(part for part in (table.banner.upper(), _caption(table)) if part)
    lines.append(rf"\caption{{{_tex(caption)}}}")
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(shown.header) - 1)}}}", r"\toprule"]
    lines += [" & ".join(map(_tex, shown.header)) + r" \\", r"\midrule"]
    lines += [" & ".join(map(text, row)) + r" \\" for row in shown.rows]
    lines += [r"\bottomrule", r"\end{tabular}", ""]
    lines += [rf"{{\footnotesize {_tex(note)}\par}}" for note in shown.notes]
    return "\n".join([*lines, r"\end{table}", ""])


# What LaTeX reads as a command, and the signs that a table uses beyond ASCII.
_TEX: dict[str, str | int | None] = {
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
    "±": r"$\pm$", "−": "$-$", "—": "---", "–": "--", "▲": r"$\blacktriangle$", "▼": r"$\blacktriangledown$",
    "\n": " ",
}  # fmt: skip


def _tex(text: str) -> str:
    return text.translate(str.maketrans(_TEX))


def _as_html(table: Layout) -> str:
    """A fragment, to be put into a page."""
    shown = grid(table)

    def text(cell: CellText) -> str:
        value = f"<strong>{escape(cell.value)}</strong>" if cell.best else escape(cell.value)
        interval = f" <small>{escape(cell.interval)}</small>" if cell.interval else ""
        return " ".join([value, *map(escape, cell.about)]) + interval

    lines = ['<figure class="fusellm-table">', "<figcaption>"]
    lines += [f"<strong>{escape(table.banner.upper())}</strong><br>"] if table.banner else []
    lines += [escape(_caption(table)), "</figcaption>", "<table>", "<thead>"]
    lines.append("<tr>" + "".join(f'<th scope="col">{escape(head)}</th>' for head in shown.header) + "</tr>")
    lines += ["</thead>", "<tbody>"]
    for label, *row in shown.rows:
        lines.append(
            f'<tr><th scope="row">{text(label)}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>"
        )
    lines += ["</tbody>", "</table>", *(f"<p><small>{escape(note)}</small></p>" for note in shown.notes), "</figure>"]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Layout], str]] = {
    "md": _as_markdown,
    "csv": _as_csv,
    "json": _as_json,
    "latex": _as_latex,
    "html": _as_html,
}
ENDINGS = {**{form: form for form in FORMATS}, "latex": "tex"}  # of files


def _empty_nan(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# What Markdown would take for an escape, a cell's end, code, emphasis, a tag, an entity or a link.
_MARKDOWN = re.compile(r"[\\|`*]|(?<!\w)_|_(?!\w)|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\](?=[(\[])|~(?=~)")
# What a spreadsheet takes for a formula, unless it is a number.
_FORMULA = re.compile(r"[=@\t\r]|[+-](?![\d.\s]*%?$)")


def _escaped(text: str) -> str:
    return _MARKDOWN.sub(r"\\\g<0>", text.replace("\n", " "))


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    head = [_escaped(column) for column in columns]
    body = [[_escaped(text) for text in row] if escape else list(row) for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(lines: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    # Floats by repr: they read back equal.
    csv.writer(out, lineterminator="\n").writerows([_no_formula(value) for value in line] for line in lines)
    return out.getvalue()


def _no_formula(value: object) -> object:
    """The value of a cell; a text that a spreadsheet would execute has an apostrophe before it."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


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
