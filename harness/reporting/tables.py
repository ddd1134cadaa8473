"""The tables of finished runs: every table that the harness prints or writes is built here, from records alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UnknownName, UserError
from harness.config.shipped import ALL
from harness.reporting.runs import PUBLISHED, Run, experiments, no_runs, open_run, profiles, resolve_run

if TYPE_CHECKING:
    import pandas as pd

    from results.table import Table

HELD_OUT = "perplexity"
"""The suite that measures held-out text."""
MAIN = "table"
"""The stem of the files of a run's main table."""
_MANY = 12  # tasks that do not fit side by side


@dataclass(frozen=True)
class Tables:
    """Tables by name (NAME-SUITE for the further ones of a run), the run by the name of its main table, and a sentence
    for each table that was asked for and is not there.
    """

    by_name: "dict[str, Table]"
    runs: dict[str, Run]
    absent: tuple[str, ...]


def tables(
    root: Path, names: Sequence[str], profile: str | None, *, reference: str | None = None, with_paper: bool = False
) -> Tables:
    """The tables of `names`: experiments (their newest runs), folders of runs, `paper/NAME` for a published table, or
    `all` there are.

    Under `all` a table that was not run is left to `absent`, or is the published one under with_paper; a run that is
    damaged is left to `absent`, too. Raises UserError for a name that is not there, and where there is nothing at all.
    """
    from results.errors import UserError as RecordsError
    from results.paper_numbers import NAMES, paper_table

    everything = ALL in names or not names
    asked = names
    if (reference or with_paper) and names and all(name.startswith(PUBLISHED) for name in names):
        raise UserError(f"{names[0]} is the published table as it is: leave --reference and --with-paper out.")
    if everything:
        asked = [*NAMES, *(name for name in experiments(root) if profile in (None, *profiles(name)))]
    by_name: dict[str, Table] = {}
    runs: dict[str, Run] = {}
    absent: list[str] = []
    damaged: list[str] = []
    for name in dict.fromkeys(asked):
        if name.startswith(PUBLISHED):
            by_name[name] = paper_table(name.removeprefix(PUBLISHED))
            continue
        try:
            folder = resolve_run(root, name, profile)
        except UserError as error:
            if not everything:
                if isinstance(error, UnknownName) and error.name == name:
                    raise UnknownName("table", name, [ALL, *dict.fromkeys([*NAMES, *experiments(root)])]) from None
                raise
            absent.append(str(error))
            if with_paper and name in NAMES:
                by_name[PUBLISHED + name] = paper_table(name)
            continue
        try:
            run = open_run(folder)
            beside = with_paper and (run.experiment in NAMES or not everything)
            of_run = printed_tables(run, reference=reference, with_paper=beside)
        except (UserError, RecordsError) as error:
            if not everything:
                raise
            damaged.append(f"{name} is left out: {error}")
            continue
        # Several runs of one experiment, given by their folders, are told apart by what their folders are called.
        label = name if folder != Path(name) else "/".join(folder.resolve().parts[-3:])
        by_name |= {f"{label}{stem.removeprefix(MAIN)}": table for stem, table in of_run.items()}
        runs[label] = run
    if not by_name:
        raise UserError(damaged[0]) if damaged else no_runs(root)
    return Tables(by_name, runs, (*absent, *damaged))


def run_table(run: Run, *, reference: str | None = None, with_paper: bool = False) -> "Table":
    """The main table of a run; in the paper's layout where the run measured what the paper did.

    Else it is the table of held-out text, or of the first suite of a run that measured no held-out text. reference: the
    row that the others are compared with. Default: the configuration's. with_paper: the published values beside ours.
    Raises UserError for an unknown reference, and where the paper has no such table.
    """
    from results.paper_layouts import LAYOUTS, comparison, measured_for

    name, reference = run.experiment, reference or _reference(run)
    if measured_for(name, run.records) or (with_paper and name in LAYOUTS):
        table = comparison(
            name,
            run.records,
            list(run.methods),
            run.roles,
            profile=run.profile,
            reference=reference,
            with_paper=with_paper,
            banner=run.banner,
            command=f"fusellm experiment run {name} --profile {run.profile}",
            reasons=run.reasons,
        )
        notes = (*table.notes, *run.suite_notes(*run.suites), *run.notes)
        return replace(table, notes=notes, precision=run.precision(*run.suites))
    if with_paper:
        raise UserError(f"The paper has no table {name!r}: those it has are {', '.join(LAYOUTS)}.")
    if run.suites and HELD_OUT not in run.suites:
        table = next(iter(suite_tables(run, reference).values()))
    else:
        table = held_out_table(run, reference)
    return replace(table, notes=(*table.notes, *run.notes))


def held_out_table(run: Run, reference: str | None = None) -> "Table":
    """Held-out text by domain: a row a method. reference: as for `run_table`."""
    from results.metrics import LOST_BYTES
    from results.tables import main_table, untested_rows

    records, reference = run.records, reference or _reference(run)
    text = records[(records["suite"] == HELD_OUT) & records["tokens"].isna() & (records["metric"] != LOST_BYTES)]
    table = main_table(
        records,
        list(run.methods),
        reference,
        metric=str(text["metric"].iloc[0]) if len(text) else "bits_per_byte",
        title=run.title,
        banner=run.banner,
        untested=untested_rows(list(run.methods), run.roles.values(), reference),
    )
    return replace(table, notes=(*table.notes, *run.suite_notes(HELD_OUT)), precision=run.precision(HELD_OUT))


def _reference(run: Run) -> str:
    if run.reference is None:
        raise UserError(f"{run.folder} holds the evaluation of one model, which has no table of methods.")
    return run.reference


def all_tables(run: Run, *, reference: str | None = None, with_paper: bool = False) -> "dict[str, Table]":
    """Every table of a run by the stem of its files' names: `table`, the main one, and `table-SUITE` for every suite.

    reference, with_paper: as for `run_table`. The evaluation of one model has no main table.
    """
    tables = {f"{MAIN}-{name}": table for name, table in suite_tables(run, reference).items()}
    if run.reference is None and reference is None and not with_paper:
        return tables
    return {MAIN: run_table(run, reference=reference, with_paper=with_paper), **tables}


def printed_tables(run: Run, *, reference: str | None = None, with_paper: bool = False) -> "dict[str, Table]":
    """The tables that a run is summed up by, of `all_tables`: the main one, and those of suites that it does not show.

    The same are printed by `experiment run` and by `tables`.
    """
    return summary(run, all_tables(run, reference=reference, with_paper=with_paper))


def summary(run: Run, tables: "Mapping[str, Table]") -> "dict[str, Table]":
    """Those of all tables of a run that it is summed up by (see `printed_tables`)."""
    from results.paper_layouts import LAYOUTS

    main = tables.get(MAIN)
    if main is None:
        return dict(tables)
    if run.experiment in LAYOUTS:  # the paper's tables show their suites themselves
        return {MAIN: main}
    # Without held-out text the main table is that of a suite.
    return {name: table for name, table in tables.items() if table is main or table.title != main.title}


def number_differences(
    one: Run, other: Run
) -> "Iterator[tuple[str, str, str, float | None, float | None, float | None]]":
    """Table, row, column, the value in each run and their difference, of every cell in which two runs' tables differ.

    A value is None where a run has no such cell. Values are at full precision, in the unit of their table.
    """
    tables = [printed_tables(run) for run in (one, other)]
    for name in dict.fromkeys([*tables[0], *tables[1]]):
        values = [_cell_values(by_name[name]) if name in by_name else {} for by_name in tables]
        for row, column in dict.fromkeys([*values[0], *values[1]]):
            first, second = (cells.get((row, column)) for cells in values)
            if first != second:
                difference = second - first if first is not None and second is not None else None
                yield name, row, column, first, second, difference


def _cell_values(table: "Table") -> dict[tuple[str, str], float | None]:
    columns = [column.label for column in table.columns]
    return {
        (row, column): cell.value
        for row, cells in zip(table.rows, table.cells, strict=True)
        for column, cell in zip(columns, cells, strict=True)
    }


def suite_tables(run: Run, reference: str | None = None) -> "dict[str, Table]":
    """The table of every suite that the run measured: a row a method, a column a task, and their average.

    Where there are many tasks they are the rows. Averages are compared with those of the reference row. A suite
    whose metrics have no common average, since they differ in direction or scale, has a table for each kind, of which
    those after the first are called SUITE-2, SUITE-3 and so on. Held-out text is left out where the run has methods:
    their main table shows it (see `held_out_table`).
    """
    records = run.records
    final = records[records["tokens"].isna() & records["method"].isin(list(run.methods))]
    reference = reference or run.reference
    of_suite = {name: final[final["suite"] == name] for name in run.suites}
    in_main_table = {HELD_OUT} if run.reference is not None else set()
    return {
        name if number == 1 else f"{name}-{number}": table
        for name, noted in run.suites.items()
        if name not in in_main_table
        for number, table in enumerate(_tables_of_suite(run, name, noted, of_suite[name], reference), 1)
    }


def _tables_of_suite(
    run: Run, suite: str, noted: Mapping[str, Any], records: "pd.DataFrame", reference: str | None
) -> "Iterator[Table]":
    from results.metrics import comparable, measure
    from results.table import Table, transposed
    from results.tables import suite_table, untested_rows

    rows = list(run.methods)
    untested = untested_rows(rows, run.roles.values(), reference)
    metrics: dict[str, str] = noted["metrics"]
    if noted["k"] != 1:
        at_k = {"passed": f"passed@{noted['k']}"}
        metrics = {task: at_k.get(metric, metric) for task, metric in metrics.items()}
        records = records.assign(metric=records["metric"].replace(at_k))
    there = set(zip(records["task"], records["metric"], strict=True))
    shown = {task: metric for task, metric in metrics.items() if (task, metric) in there}
    notes = list(noted["notes"])
    for task in metrics:
        if task not in shown:
            why = sorted({reasons[task] for reasons in noted["missing"].values() if task in reasons}) or ["not run"]
            notes.append(f"Left out, also of the average: {task}: {'; '.join(why)}.")
    if not shown:
        title = f"{run.title}: {suite}"
        yield Table(title, tuple(rows), (), ((),) * len(rows), True, 2, banner=run.banner, notes=tuple(notes))
    reasons = {key: reason for key, reason in run.reasons.items() if key[1] == suite}
    for group in comparable(shown):
        labels = dict.fromkeys(measure(metric).label for metric in group.values())
        title = f"{run.title}: {suite} ({'; '.join(labels)})"
        table = suite_table(
            records,
            rows,
            group,
            reference,
            suite=suite,
            title=title,
            banner=run.banner,
            reasons=reasons,
            untested=untested,
        )
        table = replace(table, notes=(*table.notes, *notes), precision=run.precision(suite))
        yield transposed(table) if len(group) > _MANY else table
