"""The comparison table, from records alone: rows are methods, columns domains and their average.

What is missing stays missing and says why; nothing is filled in. The same records give the same table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd

from results import statistics
from results.errors import UserError
from results.layout import Cell, Column, Table
from results.metrics import Metric, metric_of, unknown
from results.published import paper_table
from results.records import NO_SEED
from results.render import FORMATS, plain_rich, plain_table, render, to_rich
from results.statistics import CONFIDENCE, MIN_UNITS, RESAMPLES, Units

__all__ = [
    "BANNERS", "FORMATS", "Cell", "Column", "Table",
    "main_table", "paper_table", "plain_rich", "plain_table", "render", "to_rich",
]  # fmt: skip

# Profiles whose numbers only show that everything runs.
BANNERS = {"micro": "plumbing, not a result", "tiny": "plumbing, not a result"}
AVERAGE = "average"
AVERAGE_WITH_INTERVAL = "average of domains with an interval"


def main_table(
    records: pd.DataFrame,
    order: Sequence[str],
    baseline: str = "CLM",
    *,
    suite: str = "perplexity",
    metric: str = "bits_per_byte",
    tasks: Sequence[str] | None = None,
    title: str | None = None,
    banner: str | None = None,
) -> Table:
    """The final evaluation of the methods in `order` (the row labels), each compared with `baseline`, paired.

    records: of one experiment and profile. tasks: the columns, by default every domain that any row has, by name. The
    average is the unweighted mean over all of them, with an interval only where each domain has 20 documents; where
    some have not, a second average over those that have is given beside it. banner: by default what the profile calls
    for. Raises UserError for wrong names, no records at all, and rows not measured on the same data.
    """
    if len(set(order)) < len(order):
        raise UserError(f"a row is asked for twice in {', '.join(order)}; name each method once")
    if baseline not in order:
        raise UserError(unknown("baseline", baseline, order))
    shown = records[
        (records["suite"] == suite)
        & (records["metric"] == metric)
        & records["tokens"].isna()
        & records["method"].isin(list(order))
    ]
    if shown.empty:
        raise UserError(
            f"there are no final {metric} records of the suite {suite} for any of {', '.join(order)}; run the "
            "experiment with `fusellm experiment run`"
        )
    units = statistics.group(shown)
    domains = tuple(tasks) if tasks is not None else tuple(sorted({task for _, task in units}))
    counts = _counts(units, order, domains)
    columns = _columns(domains, counts)
    cells = tuple(tuple(_cell(units, method, baseline, one.tasks) for one in columns) for method in order)
    experiment, profile = str(shown["experiment"].iloc[0]), str(shown["profile"].iloc[0])
    measured = metric_of(metric)
    better = "higher" if measured.higher_is_better else "lower"
    return Table(
        title=title or f"{experiment}, profile {profile}: {measured.label}, {better} is better",
        rows=tuple(order),
        columns=columns,
        cells=cells,
        higher_is_better=measured.higher_is_better,
        digits=measured.digits,
        baseline=baseline,
        banner=BANNERS.get(profile, "") if banner is None else banner,
        notes=_notes(measured, baseline, columns, cells),
    )


def _counts(units: Mapping[tuple[str, str], Units], order: Sequence[str], domains: Sequence[str]) -> dict[str, int]:
    """How many examples each domain has; raises UserError where two rows were not measured on the same."""
    counts = {}
    for task in domains:
        present = [units[method, task] for method in order if (method, task) in units]
        for other in present[1:]:
            statistics.check_same_examples(present[0], other)
        if present:
            counts[task] = len(present[0].examples)
    return counts


def _columns(domains: tuple[str, ...], counts: Mapping[str, int]) -> tuple[Column, ...]:
    columns = [Column(task, (task,), counts.get(task)) for task in domains]
    total = sum(counts.values()) if len(counts) == len(domains) else None
    columns.append(Column(AVERAGE, domains, total, compared=True))
    enough = tuple(task for task in domains if counts.get(task, 0) >= MIN_UNITS)
    if enough and any(n < MIN_UNITS for n in counts.values()):
        columns.append(Column(AVERAGE_WITH_INTERVAL, enough, sum(counts[task] for task in enough), compared=True))
    return tuple(columns)


def _cell(units: Mapping[tuple[str, str], Units], method: str, baseline: str, tasks: Sequence[str]) -> Cell:
    missing = _missing(units, method, tasks)
    if missing:
        return Cell(None, note=missing, difference_note="" if method == baseline else missing)
    own = [units[method, task] for task in tasks]
    try:
        value = statistics.estimate(own)
    except UserError as error:  # other seeds in one domain than in another: the domains' own cells still stand
        return Cell(None, note=str(error), difference_note="" if method == baseline else str(error))
    cell = Cell(value.value, value.interval, value.n, value.seeds, value.spread)
    if method == baseline:
        return cell
    gap = _missing(units, baseline, tasks)
    if gap:
        return replace(cell, difference_note=gap)
    try:
        difference = statistics.difference(own, [units[baseline, task] for task in tasks])
    except UserError as error:  # no seed in common
        return replace(cell, difference_note=str(error))
    note = ""
    if NO_SEED not in cell.seeds and difference.seeds != cell.seeds:
        note = f"compared over the seeds in common with {baseline}: {', '.join(map(str, difference.seeds))}"
    return replace(
        cell,
        difference=difference.value,
        difference_interval=difference.interval,
        difference_seeds=difference.seeds,
        difference_note=note,
    )


def _missing(units: Mapping[tuple[str, str], Units], method: str, tasks: Sequence[str]) -> str:
    if not any(method == name for name, _ in units):
        return f"no records of {method}: not run, or its records were removed"
    gone = [task for task in tasks if (method, task) not in units]
    return f"no records of {method} on {', '.join(gone)}: not evaluated, or its records were removed" if gone else ""


def _notes(
    metric: Metric, baseline: str, columns: Sequence[Column], cells: Sequence[Sequence[Cell]]
) -> tuple[str, ...]:
    notes = [
        f"The average is the unweighted mean over domains; n counts {metric.unit}s.",
        f"[low, high]: {CONFIDENCE:.0%} bootstrap interval over {metric.unit}s within domains ({RESAMPLES:,} "
        f"resamples), about these checkpoints only; none where a domain has fewer than {MIN_UNITS} {metric.unit}s.",
        f"− {baseline}: the method minus {baseline}, paired over the same {metric.unit}s; "
        f"{'positive' if metric.higher_is_better else 'negative'} is better than {baseline}.",
        "Bold: the best value of a column, whether or not chance would do as well.",
    ]
    if any(cell.spread is not None for row in cells for cell in row):
        notes.append("±: standard deviation over seeds.")
    for column in columns:
        if column.label == AVERAGE_WITH_INTERVAL:
            notes.append(f"The {AVERAGE_WITH_INTERVAL} covers {', '.join(column.tasks)}.")
    return tuple(notes)
