"""Our records in the layout of the paper's tables, with the published numbers beside them.

A layout is data: which methods in which order, and which tasks under which metric. A method that the layout does not
know follows after those that it does, so that a new reference needs no change here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from results.errors import UnknownName, UserError
from results.layout import Cell, Column, Part
from results.metrics import measure, values_of
from results.paper_numbers import AVERAGE, Published, load
from results.table import Table, transposed
from results.tables import Comparison, Reason, compare, sentences, untested_rows

TARGET, SOURCE, TEACHER = "{target}", "{source}", "{teacher}"


@dataclass(frozen=True)
class Line:
    """One method of a layout: the row label in our runs and the paper's.

    `{source}` in both stands for each source of the run in turn; `{target}` and `{teacher}` for the models as they are.
    """

    label: str
    published: str
    shown: str | None = None  # what the table calls it, where that is not the row label


@dataclass(frozen=True)
class PaperLayout:
    """One table of the paper: its methods, and what is measured of them.

    A column averages its parts, and one without parts is measured by no suite here. No columns: the domains of held-out
    text that the records have, and their average.
    """

    lines: tuple[Line, ...]
    columns: tuple[Column, ...] = ()
    methods_across: bool = False


_OURS = {"py": "python", "lambada": "lambada_openai"}  # tasks that our suites call otherwise than the paper's tables


def _parts(table: str, suite: str, metric: str, others: Mapping[str, str] | None = None) -> dict[str, Part]:
    """The tasks of a published table by its names for them; those in `others` have another metric."""
    rows = [row for row in load(table).rows if row != AVERAGE]
    return {row: Part(suite, _OURS.get(row, row), (others or {}).get(row, metric)) for row in rows}


def _by_task(parts: Mapping[str, Part]) -> tuple[Column, ...]:
    columns = [Column(label, (part,), compared=True) for label, part in parts.items()]
    return (*columns, Column(AVERAGE, tuple(parts.values()), compared=True))


STRICT, BY_EXIT_STATUS = "passed", "passed_exit"
BBH = _parts("table1", "bbh", "exact_match")
COMMONSENSE = _parts("table2", "commonsense", "acc_norm", {"boolq": "acc"})
MULTIPL_E = _parts("table3", "multipl_e", STRICT)

_MAIN = (Line(SOURCE, SOURCE), Line(TARGET, "Llama-2"), Line("CLM", "Llama-2 CLM"), Line("FuseLLM", "FuseLLM"))
_AVERAGES = (
    Column("bbh", tuple(BBH.values()), compared=True),
    Column("commonsense", tuple(COMMONSENSE.values()), compared=True),
    Column("multipl_e", tuple(MULTIPL_E.values()), compared=True),
)
_MEASURED = ("triviaqa", "drop", "lambada")
_GENERATIVE = tuple(
    Column(label, (part,) if label in _MEASURED else (), compared=True)
    for label, part in _parts("table8", "generative", "exact_match", {"drop": "em", "lambada": "acc"}).items()
)
LAYOUTS = {
    "table1": PaperLayout(_MAIN, _by_task(BBH), methods_across=True),
    "table2": PaperLayout(_MAIN, _by_task(COMMONSENSE), methods_across=True),
    "table3": PaperLayout(_MAIN, _by_task(MULTIPL_E), methods_across=True),
    "table4": PaperLayout((*_MAIN[:3], Line(f"FuseLLM from {SOURCE}", f"Llama-2 + {SOURCE}"), _MAIN[3]), _AVERAGES),
    "table5": PaperLayout(
        (
            Line("FuseLLM em", "EM", "EM"),
            Line("FuseLLM mined", "MinED", "MinED"),
            Line("FuseLLM avgce", "AvgCE", "AvgCE"),
            Line("FuseLLM", "MinCE", "MinCE"),
        ),
        _AVERAGES,
    ),
    "table6": PaperLayout((Line(TEACHER, "Llama-2 13B"), *_MAIN[:3], Line("KD", "Llama-2 KD"), _MAIN[3]), _AVERAGES),
    "table7": PaperLayout(
        (
            Line(TARGET, "Pythia"),
            Line(SOURCE, SOURCE),
            Line("Ensemble", "Ensemble"),
            Line("Weight Merging", "Weight Merging"),
            _MAIN[3],
        )
    ),
    "table8": PaperLayout(_MAIN, _GENERATIVE, methods_across=True),
    "table10": PaperLayout(
        (
            Line(SOURCE, SOURCE),
            Line(TARGET, "Llama-2 Evol-Instruct"),
            Line("CLM", "Llama-2 Evol-Instruct CLM"),
            _MAIN[3],
        ),
        (Column("vicuna_benchmark"),),
    ),
}


def measured_for(name: str, records: pd.DataFrame) -> bool:
    """Whether the paper has a table called `name` and the records have something of what it measures."""
    if name not in LAYOUTS:
        return False
    suites = {part.suite for column in LAYOUTS[name].columns for part in column.parts}
    return not suites or not suites.isdisjoint(records["suite"])


@dataclass(frozen=True)
class _Row:
    """A line for the methods of one run."""

    label: str
    shown: str
    published: str | None  # None where the paper has nothing like it


def comparison(
    name: str,
    records: pd.DataFrame,
    methods: Sequence[str],
    roles: Mapping[str, str],
    *,
    profile: str,
    reference: str = "CLM",
    with_paper: bool = False,
    banner: str = "",
    command: str = "",
    reasons: Mapping[Reason, str] | None = None,
) -> Table:
    """The table of the paper called `name` from our records; every method is compared with `reference`, paired.

    Models as they are (`roles`) are not tested, unless there is nothing else.

    records: of one experiment and profile. methods: the run's row labels in order. roles: the row labels of the models
    as they are, by role: target, teacher, and each source. with_paper: the published values stand beside ours where
    both exist. command: what would run what is missing; reasons: why it is, where that is known. Raises UserError for
    an unknown table or reference, and for methods not measured on the same data.
    """
    if name not in LAYOUTS:
        raise UnknownName("table", name, LAYOUTS)
    layout, published = LAYOUTS[name], load(name)
    rows = _rows(layout, published, methods, roles)
    labels = list(dict.fromkeys(row.label for row in rows))
    final = records[records["tokens"].isna() & records["method"].isin(labels)]
    untested = untested_rows(methods, roles.values(), reference)
    columns = _columns(layout, final, with_paper)
    compared = compare(final, labels, columns, reference, reasons=reasons, untested=untested)
    own = dict(zip(labels, compared.cells, strict=True))
    target = own[roles["target"]] if roles.get("target") in own else (Cell(None),) * len(compared.columns)
    comparable = [with_paper and _same_tasks(column, published, layout) for column in compared.columns]

    def cell(row: _Row, j: int) -> Cell:
        result, reference, column = own[row.label][j], target[j].value, compared.columns[j].label
        if result.value is not None and reference and row.label not in roles.values():
            result = replace(result, change=result.value / reference - 1)
        if not row.published or not comparable[j]:
            return result
        value, change = published.value(row.published, column), published.change(row.published, column)
        return replace(result, published=None if value is None else float(value), published_change=change)

    table = Table(
        title=f"{name}, profile {profile}: {published.title}",
        rows=tuple(row.shown for row in rows),
        columns=compared.columns,
        cells=tuple(tuple(cell(row, j) for j in range(len(compared.columns))) for row in rows),
        higher_is_better=published.higher_is_better,
        digits=published.digits,
        reference=reference,
        differences=False,
        banner=banner,
        notes=tuple(_notes(published, rows, compared, reference, roles, with_paper, command)),
        values=values_of([measure(part.metric) for column in compared.columns for part in column.parts]),
    )
    if layout.methods_across:
        return _headed(transposed(table), [row.published or "" for row in rows])
    return _headed(table, [column.label for column in compared.columns])


def _headed(table: Table, names: Sequence[str]) -> Table:
    """The table with a head for the published values beside each column that has some; `names` are the paper's."""
    has_some = [any(cell.published is not None for cell in column) for column in zip(*table.cells, strict=True)]
    heads = tuple(f"{name}, paper" if some else "" for name, some in zip(names, has_some, strict=True))
    return replace(table, published=heads if any(heads) else ())


def _rows(layout: PaperLayout, published: Published, methods: Sequence[str], roles: Mapping[str, str]) -> list[_Row]:
    sources = [label for role, label in roles.items() if role not in ("target", "teacher")]
    rows = []
    for line in layout.lines:
        if SOURCE in line.label:
            for source in sources:
                theirs = next((one for one in published.as_is[1:] if _alike(one, source)), None)
                label = line.label.replace(SOURCE, source)
                rows.append(_Row(label, label, line.published.replace(SOURCE, theirs) if theirs else None))
        else:
            label = {TARGET: roles.get("target", "target"), TEACHER: roles.get("teacher", "teacher")}.get(
                line.label, line.label
            )
            rows.append(_Row(label, line.shown or label, line.published))
    known = {row.label for row in rows}
    return [*rows, *(_Row(method, method, None) for method in methods if method not in known)]


def _alike(published: str, label: str) -> bool:
    """Whether a source of ours is the paper's, by the beginning of its name (OpenLLaMA, OpenLLaMA-7B-v2)."""
    beginning, name = ("".join(filter(str.isalnum, text.lower())) for text in (published, label))
    return name.startswith(beginning)


def _columns(layout: PaperLayout, records: pd.DataFrame, with_paper: bool) -> list[Column]:
    if not layout.columns:
        text = records.loc[records["suite"] == "perplexity", ["task", "metric"]].drop_duplicates()
        if text.empty:
            raise UserError("there are no final perplexity records, whose domains are the columns; run the experiment")
        domains = sorted(text.itertuples(index=False, name=None))
        return list(_by_task({task: Part("perplexity", task, metric) for task, metric in domains}))
    if not with_paper:
        return list(layout.columns)

    def as_published(part: Part) -> Part:
        return part._replace(metric=BY_EXIT_STATUS) if part.metric == STRICT else part

    return [replace(one, parts=tuple(map(as_published, one.parts))) for one in layout.columns]


def _same_tasks(column: Column, published: Published, layout: PaperLayout) -> bool:
    """Whether a published value of the column's name is over the same tasks as ours."""
    if layout.columns or column.label != AVERAGE:
        return True
    return set(column.tasks) == {one for one in published.columns if one != AVERAGE}


def _notes(
    published: Published,
    rows: Sequence[_Row],
    compared: Comparison,
    reference: str,
    roles: Mapping[str, str],
    with_paper: bool,
    command: str,
) -> list[str]:
    metrics = [measure(part.metric) for column in compared.columns for part in column.parts]
    notes = sentences(metrics, reference, compared, "task") if metrics else []
    notes.append(f"In brackets: relative to {roles.get('target', 'the target')}.")
    if command and any(cell.value is None for row in compared.cells for cell in row):
        notes.append(f"What is missing is made by `{command}`, as far as this harness can.")
    if with_paper:
        pairs = [f"{row.published} ({row.shown})" for row in rows if row.published and row.published != row.shown]
        by_role = f" by role: {', '.join(pairs)}" if pairs else ""
        notes.append(
            f"Published values (arXiv 2401.10491) stand beside ours{by_role}; other models and data give other "
            "absolute numbers."
        )
        notes += published.notes
    return notes
