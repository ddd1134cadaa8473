"""The report: one HTML page for any number of runs, which needs no network and no other file.

What is shown is put together by the caller; here it becomes a page. Tables are whole without a script; with it they
sort and switch between value, difference and rank, every number opens what is behind it, and examples can be read.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from pathlib import Path
from typing import Any

from results.layout import MISSING, Cell
from results.paper_numbers import AVERAGE
from results.table import Table
from results.tables import WITH_INTERVAL

MODES = ("value", "difference", "rank")


@dataclass(frozen=True)
class Figure:
    """One figure: what it shows, in words, and its SVG."""

    caption: str
    svg: bytes

    @property
    def broad(self) -> bool:
        """Whether it is too wide to stand beside another."""
        view_box = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', self.svg)
        return view_box is not None and float(view_box[1]) > 2 * float(view_box[2])

    @property
    def address(self) -> str:
        """The figure as an address that holds it."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode("ascii")


@dataclass(frozen=True)
class Answer:
    """What one method said to one example, and its score from 0 to 1."""

    text: str
    score: float


@dataclass(frozen=True)
class ReportedExample:
    """One example: what was asked, what is right, and the answers by method."""

    example: str
    prompt: str
    target: str
    answers: Mapping[str, Answer]


@dataclass(frozen=True)
class Task:
    """The examples of one task that the page holds, of `total` that there are."""

    name: str
    metric: str
    total: int
    examples: Sequence[ReportedExample]


@dataclass(frozen=True)
class Provenance:
    """Something that is known by its fingerprint: facts about it, and the fingerprints of what it was made from."""

    fingerprint: str
    title: str
    facts: Sequence[tuple[str, str]]
    sources: Sequence[str] = ()


@dataclass(frozen=True)
class Cost:
    """What one stage took; None where it was not measured."""

    stage: str
    of: str
    tokens: int | None
    seconds: float
    peak_memory: int
    size: int


@dataclass(frozen=True)
class RunPage:
    """Everything that the page says about one run."""

    name: str
    title: str
    banner: str
    facts: Sequence[tuple[str, str]]
    findings: Sequence[str]
    tables: Sequence[Table]
    figures: Sequence[Figure] = ()
    tasks: Sequence[Task] = ()
    costs: Sequence[Cost] = ()
    configuration: str = ""
    evaluations: Sequence[Provenance] = ()
    artifacts: Sequence[Provenance] = ()
    notes: Sequence[str] = field(default_factory=tuple)


def page(runs: Sequence[RunPage], title: str) -> str:
    """The page as HTML; the same bytes for the same runs."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"minutes": _minutes, "gigabytes": _gigabytes, "thousands": lambda n: f"{n:,}"}
    environment.globals |= {"page_cells": page_cells, "examples": _examples}
    return environment.get_template("report.html").render(runs=runs, title=title, modes=MODES)


@dataclass(frozen=True)
class PageCell:
    """One cell of the page: by mode its text and the number that it sorts by, its marks, and what is behind it."""

    texts: Mapping[str, str]
    keys: Mapping[str, float | None]
    intervals: Mapping[str, str]
    marks: str
    best: bool
    about: str
    """JSON: pairs of a name and a text, and the fingerprints of the evaluations."""


def page_cells(table: Table) -> list[list[PageCell]]:
    """The cells of a table for the page."""
    best, ranks = table.best(), _ranks(table)
    reference = [table.reference in (row, column.label) for row in table.rows for column in table.columns]
    width = len(table.columns)
    return [
        [
            _page_cell(table, cell, (i, j) in best, ranks.get((i, j)), reference[i * width + j])
            for j, cell in enumerate(row)
        ]
        for i, row in enumerate(table.cells)
    ]


def _page_cell(table: Table, cell: Cell, best: bool, rank: int | None, is_reference: bool) -> PageCell:
    form = f"z.{table.digits}f"
    difference = "reference" if is_reference else MISSING
    if cell.difference is not None:
        difference = f"{cell.difference:+{form}}"
    intervals = {"value": (cell.interval, form), "difference": (cell.difference_interval, f"+{form}")}
    return PageCell(
        texts={
            "value": MISSING if cell.value is None else f"{cell.value:{form}}",
            "difference": difference,
            "rank": MISSING if rank is None else str(rank),
        },
        keys={
            "value": cell.value,
            "difference": 0.0 if is_reference else cell.difference,
            "rank": None if rank is None else float(rank),
        },
        intervals={mode: f"[{both[0]:{f}}, {both[1]:{f}}]" for mode, (both, f) in intervals.items() if both},
        marks={"better": "▲", "worse": "▼", None: ""}[cell.verdict] * (2 if cell.general else 1),
        best=best,
        about=json.dumps({"facts": _about(table, cell), "evaluations": cell.evaluations}, ensure_ascii=False),
    )


def findings(table: Table) -> list[str]:
    """What the table says of each method against its reference, a sentence each, over the averages that it compares."""
    cells = [
        (label, column.label, cell)
        for label, row in zip(table.rows, table.cells, strict=True)
        for column, cell in zip(table.columns, row, strict=True)
    ]
    if table.best_along == "row":
        cells = [(method, task, cell) for task, method, cell in cells]
    names = dict.fromkeys(name for _, name, _ in cells)
    # Where not every task has enough examples to say anything of the whole, the average over those that have.
    whole = [name for name in names if name == AVERAGE or name.endswith(WITH_INTERVAL)][-1:]
    averages = whole or [column.label for column in table.columns if column.compared]
    lines = []
    for method, name, cell in cells:
        if name not in averages or cell.difference is None:
            continue
        form = f"z.{table.digits}f"
        interval = "no interval"
        if cell.difference_interval:
            interval = "95% interval {:+{f}} to {:+{f}}".format(*cell.difference_interval, f=form)
        untested = "no difference shown" if cell.difference_interval else "too little to say more"
        verdict = f"{cell.verdict} than {table.reference}" if cell.verdict else untested
        about = "" if cell.general or not cell.verdict else ", about these checkpoints only"
        lines.append(
            f"{method}, {name}: {cell.value:{form}}, which is {cell.difference:+{form}} against {table.reference} "
            f"({interval}): {verdict}{about}."
        )
    return lines


def _about(table: Table, cell: Cell) -> list[tuple[str, str]]:
    """All that is known of a cell, at full precision; what is not known is left out."""
    seeds = [seed for seed in cell.seeds if seed >= 0]
    facts: list[tuple[str, Any]] = [
        ("value", cell.value),
        ("95% interval", cell.interval and "{} to {}".format(*cell.interval)),
        ("examples", cell.n),
        ("seeds", ", ".join(map(str, seeds)) if seeds else ("none" if cell.seeds else None)),
        ("spread over seeds", cell.spread),
        ("relative to the target", cell.change if cell.change is None else f"{cell.change:+.2%}"),
        ("published", cell.published),
        (f"minus {table.reference}", cell.difference),
        ("its 95% interval", cell.difference_interval and "{} to {}".format(*cell.difference_interval)),
        ("p of the paired test", cell.p),
        ("p, corrected over the table", cell.p_corrected),
        ("verdict", cell.verdict),
        ("note", cell.note),
        ("note on the difference", cell.difference_note if cell.difference_note != cell.note else ""),
    ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _ranks(table: Table) -> dict[tuple[int, int], int]:
    """By (row, column): 1 for the best of its column (or row, where methods are columns); equals share a rank."""
    lines: dict[int, list[tuple[float, tuple[int, int]]]] = {}
    for i, row in enumerate(table.cells):
        for j, cell in enumerate(row):
            if cell.value is not None and not cell.lossy:
                value = -cell.value if table.higher_is_better else cell.value
                lines.setdefault(j if table.best_along == "column" else i, []).append((value, (i, j)))
    return {
        at: 1 + sum(other < value and not isclose(other, value, rel_tol=1e-12) for other, _ in line)
        for line in lines.values()
        for value, at in line
    }


def _examples(run: RunPage) -> str:
    """The run's examples as JSON that can stand in a script element."""
    found = [
        {
            "name": task.name,
            "metric": task.metric,
            "total": task.total,
            "methods": list(dict.fromkeys(method for one in task.examples for method in one.answers)),
            "examples": [
                {
                    "id": one.example,
                    "prompt": one.prompt,
                    "target": one.target,
                    "answers": {method: [answer.text, answer.score] for method, answer in one.answers.items()},
                }
                for one in task.examples
            ],
        }
        for task in run.tasks
    ]
    # Nothing in it may end the element or begin a comment.
    return json.dumps(found, ensure_ascii=False).replace("<", "\\u003c").replace("&", "\\u0026")


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"


def _gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3f}"
