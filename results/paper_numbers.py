"""The published numbers of arXiv 2401.10491, as data, in the layout of every other table.

Values are percent except where a table says otherwise; averages are unweighted means of the printed entries.
"""

import csv
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Literal

from results.errors import UnknownName, UserError
from results.layout import Cell, Column
from results.table import Table

AVERAGE = "average"
_EVALUATORS = (
    "Published with open-instruct's BBH, lm-eval 0.3, the BigCode harness and OpenCompass; other evaluators give other "
    "absolute numbers."
)
_MULTIPL_E = "MultiPL-E: pass@1 by exit status."
_UNCHECKED = "Not compared digit by digit with the printed table."


@dataclass(frozen=True)
class Published:
    """One table as printed: `values[row][column]` keep their printed digits."""

    name: str
    title: str  # what it is about, and the unit
    higher_is_better: bool
    best_along: Literal["column", "row"]  # "row" where methods are columns
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[Decimal, ...], ...]
    notes: tuple[str, ...]
    as_is: tuple[str, ...]  # the methods that are models as they are; the first is the target

    @property
    def digits(self) -> int:
        """Those printed after the point."""
        return max(-int(value.as_tuple().exponent) for row in self.values for value in row)

    def value(self, method: str, column: str) -> Decimal | None:
        """What is printed for a method in a task or suite, however the table is turned; None where nothing is."""
        row, across = (column, method) if self.best_along == "row" else (method, column)
        if row not in self.rows or across not in self.columns:
            return None
        return self.values[self.rows.index(row)][self.columns.index(across)]

    def change(self, method: str, column: str) -> float | None:
        """How much better or worse than the target, relative to it, a method is that is not a model as it is."""
        own, target = self.value(method, column), self.value(self.as_is[0], column)
        if own is None or not target or method in self.as_is:
            return None
        return float(own / target - 1)


@dataclass(frozen=True)
class _Source:
    file: str
    title: str
    notes: tuple[str, ...] = (_EVALUATORS,)
    unit: str = "percent"
    higher_is_better: bool = True
    best_along: Literal["column", "row"] = "column"
    as_is: tuple[str, ...] = ("Llama-2", "OpenLLaMA", "MPT", "Llama-2 13B")


_SOURCES = {
    "table1": _Source("table1_bbh.csv", "BBH by task", best_along="row"),
    "table2": _Source("table2_commonsense.csv", "commonsense", best_along="row"),
    "table3": _Source("table3_multipl_e.csv", "MultiPL-E by language", (_EVALUATORS, _MULTIPL_E), best_along="row"),
    "table4": _Source("table4_number_of_sources.csv", "number of sources", (_EVALUATORS, _MULTIPL_E, _UNCHECKED)),
    "table5": _Source(
        "table5_alignment_and_fusion.csv", "alignment criterion; fusion function", (_EVALUATORS, _MULTIPL_E, _UNCHECKED)
    ),
    "table6": _Source("table6_distillation.csv", "knowledge distillation", (_EVALUATORS, _MULTIPL_E)),
    "table7": _Source(
        "table7_ensemble_and_merging.csv",
        "ensemble and weight merging",
        (),
        "bits per byte",
        higher_is_better=False,
        as_is=("Pythia", "Phil", "NIH", "USPTO"),
    ),
    "table8": _Source("table8_generative.csv", "generative tasks", best_along="row"),
    "table10": _Source(
        "table10_instruction.csv",
        "instruction tuning",
        (),
        "Vicuna benchmark score",
        as_is=("Llama-2 Evol-Instruct", "OpenLLaMA ShareGPT", "MPT Open-Platypus"),
    ),
}
NAMES = tuple(_SOURCES)


def load(name: str) -> Published:
    """The published table called `name`, one of NAMES; raises UserError for another."""
    if name not in _SOURCES:
        raise UnknownName("published table", name, NAMES)
    source = _SOURCES[name]
    text = (Path(__file__).parent / "paper" / source.file).read_text(encoding="utf-8")
    head, *body = csv.reader(text.splitlines())
    return Published(
        name,
        f"{source.title}, {source.unit}",
        source.higher_is_better,
        source.best_along,
        head[0],
        tuple(row[0] for row in body),
        tuple(head[1:]),
        tuple(tuple(map(Decimal, row[1:])) for row in body),
        source.notes,
        source.as_is,
    )


def averages(table: Published) -> dict[str, tuple[Decimal, Decimal]]:
    """The printed average and the exact mean of the printed entries for each method; empty where none is printed.

    Raises UserError where no rounding of the entries could give the printed average: then a number is wrong.
    """
    if AVERAGE in table.rows:
        index = table.rows.index(AVERAGE)
        lines = {
            method: ([row[j] for i, row in enumerate(table.values) if i != index], table.values[index][j])
            for j, method in enumerate(table.columns)
        }
    elif AVERAGE in table.columns:
        index = table.columns.index(AVERAGE)
        lines = {
            method: ([*row[:index], *row[index + 1 :]], row[index])
            for method, row in zip(table.rows, table.values, strict=True)
        }
    else:
        return {}
    result = {}
    for method, (entries, printed) in lines.items():
        mean = sum(entries, Decimal(0)) / len(entries)
        # Half a unit in the last digit from the average itself, and another half from the entries behind it.
        if abs(mean - printed) > _step(printed):
            raise UserError(
                f"{table.name}: the average {printed} of {method} is not the mean of its entries, {mean:.6f}"
            )
        result[method] = (printed, mean)
    return result


def rounded(mean: Decimal, printed: Decimal) -> Decimal:
    """`mean` with the digits of `printed`, halves away from zero as people print them."""
    return mean.quantize(_step(printed), ROUND_HALF_UP)


def paper_table(name: str) -> Table:
    """A published table for the renderer; every average is computed again on the way, and a difference is noted."""
    table = load(name)
    notes = [*table.notes, f"In brackets: relative to {table.as_is[0]}."]
    for method, (printed, mean) in averages(table).items():
        if rounded(mean, printed) != printed:
            notes.append(
                f"{method}: the printed entries average {rounded(mean, printed)}, the printed average is {printed}; "
                "unrounded entries can give it."
            )

    def cell(row: str, column: str) -> Cell:
        method, task = (column, row) if table.best_along == "row" else (row, column)
        value = table.value(method, task)
        return Cell(None if value is None else float(value), change=table.change(method, task))

    return Table(
        title=f"{name} as published: {table.title}",
        rows=table.rows,
        columns=tuple(Column(label) for label in table.columns),
        cells=tuple(tuple(cell(row, column) for column in table.columns) for row in table.rows),
        higher_is_better=table.higher_is_better,
        digits=table.digits,
        corner=table.corner,
        best_along=table.best_along,
        notes=tuple(notes),
    )


def _step(value: Decimal) -> Decimal:
    """One unit in the last printed digit."""
    return Decimal(1).scaleb(int(value.as_tuple().exponent))
