"""The comparison table, from records alone: rows are methods, columns domains and their average.

What is missing stays missing and says why; nothing is filled in. The same records give the same table.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd

from results import statistics
from results.errors import UserError
from results.layout import Cell, Column, Part, Table, Verdict
from results.metrics import Metric, metric_of, unknown
from results.published import AVERAGE, paper_table
from results.records import NO_SEED
from results.render import FORMATS, plain_rich, plain_table, render, to_rich
from results.resampling import RESAMPLES
from results.statistics import CONFIDENCE, MIN_SEEDS, MIN_UNITS, Units

__all__ = [
    "BANNERS", "FORMATS", "Cell", "Column", "Table",
    "main_table", "measured", "paper_table", "plain_rich", "plain_table", "render", "sentences", "to_rich",
]  # fmt: skip

# Profiles whose numbers only show that everything runs.
BANNERS = {"micro": "plumbing, not a result", "tiny": "plumbing, not a result"}
WITH_INTERVAL = " with an interval"


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
    final = records[records["tokens"].isna() & records["method"].isin(list(order))]
    shown = final[(final["suite"] == suite) & (final["metric"] == metric)]
    if baseline in order and shown.empty:
        raise UserError(
            f"there are no final {metric} records of the suite {suite} for any of {', '.join(order)}; run the "
            "experiment with `fusellm experiment run`"
        )
    parts = [Part(suite, task, metric) for task in tasks or sorted(shown["task"].unique())]
    wanted = [Column(part.task, (part,)) for part in parts]
    wanted.append(Column(AVERAGE, tuple(parts), compared=True))
    found = measured(shown, order, wanted, baseline, unit="domains")
    experiment, profile = str(shown["experiment"].iloc[0]), str(shown["profile"].iloc[0])
    kind = metric_of(metric)
    better = "higher" if kind.higher_is_better else "lower"
    difference = (
        f"− {baseline}: the method minus {baseline}, paired over the same {kind.unit}s; "
        f"{'positive' if kind.higher_is_better else 'negative'} is better than {baseline}."
    )
    return Table(
        title=title or f"{experiment}, profile {profile}: {kind.label}, {better} is better",
        rows=tuple(order),
        columns=found.columns,
        cells=found.cells,
        higher_is_better=kind.higher_is_better,
        digits=kind.digits,
        baseline=baseline,
        banner=BANNERS.get(profile, "") if banner is None else banner,
        notes=tuple(sentences(kind, baseline, found, "domain", difference)),
    )


@dataclass(frozen=True)
class Measured:
    """The columns with their numbers of examples, the cells of all methods in them, and how many were to be tested."""

    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    comparisons: int


def measured(
    records: pd.DataFrame, methods: Sequence[str], wanted: Sequence[Column], baseline: str, *, unit: str = "tasks"
) -> Measured:
    """What `methods` reach in the `wanted` columns, compared with `baseline` and tested.

    records: final ones of one experiment and profile. A column of several parts of which some have fewer than 20
    examples, or none, is followed by one over those that have ("... of `unit` with an interval"). Raises UserError
    for an unknown baseline and for methods not measured on the same data.
    """
    if baseline not in methods:
        raise UserError(unknown("baseline", baseline, methods))
    measures = _Measures.of(records, methods, [part for column in wanted for part in column.parts], baseline)
    columns = [column for one in wanted for column in measures.columns(one, unit)]
    cells = {(method, j): measures.cell(method, column) for method in methods for j, column in enumerate(columns)}
    # What is missing counts as a comparison that shows nothing, lest a lost file make another method better.
    family = [at for at in cells if at[0] != baseline and measures.testable(columns[at[1]])]
    values = [cells[at].p for at in family]
    for at, p in zip(family, statistics.holm([1.0 if p is None else p for p in values]), strict=True):
        cells[at] = _judged(cells[at], p, columns[at[1]])
    rows = tuple(tuple(cells[method, j] for j in range(len(columns))) for method in methods)
    return Measured(tuple(columns), rows, len(family))


def _judged(cell: Cell, p: float, column: Column) -> Cell:
    if cell.p is None or cell.difference is None:
        return cell
    better = (cell.difference > 0) == metric_of(column.parts[0].metric).higher_is_better
    verdict: Verdict = "better" if better else "worse"
    return replace(cell, p_corrected=p, verdict=verdict if p <= 1 - CONFIDENCE and cell.difference else None)


@dataclass
class _Measures:
    """What the records say of every method and part, and of every method against the baseline."""

    baseline: str
    units: dict[tuple[str, Part], Units]
    contrasts: dict[tuple[str, Part], Units]
    evaluations: dict[tuple[str, Part], tuple[str, ...]]
    refusals: dict[tuple[str, Part], str] = field(default_factory=dict)  # why there is no contrast

    @classmethod
    def of(cls, records: pd.DataFrame, methods: Sequence[str], parts: Sequence[Part], baseline: str) -> "_Measures":
        grouped = statistics.group(records)
        units = {
            (method, part): grouped[method, part] for part in parts for method in methods if (method, part) in grouped
        }
        for part in parts:
            present = [units[method, part] for method in methods if (method, part) in units]
            for other in present[1:]:
                statistics.check_same_examples(present[0], other)
        self = cls(baseline, {}, {}, _evaluations(records))
        for (method, part), one in units.items():
            if method != baseline and (baseline, part) in units:
                try:
                    self.contrasts[method, part] = statistics.contrast(one, units[baseline, part])
                except UserError as error:  # no seed in common
                    self.refusals[method, part] = str(error)
        both = {("own", *key): one for key, one in units.items()}
        both |= {("against", *key): one for key, one in self.contrasts.items()}
        for (kind, method, part), one in statistics.resample(both).items():
            (self.units if kind == "own" else self.contrasts)[method, part] = one
        return self

    def columns(self, column: Column, unit: str) -> list[Column]:
        """The column with its number of examples, and the one after it over the parts that have enough of them."""
        counts = {part: len(one.examples) for (_, part), one in self.units.items() if part in column.parts}
        whole = len(counts) == len(column.parts) and bool(counts)
        found = [replace(column, n=sum(counts.values()) if whole else None)]
        enough = tuple(part for part in column.parts if counts.get(part, 0) >= MIN_UNITS)
        if len(column.parts) > 1 and enough and len(enough) < len(column.parts):
            n = sum(counts[part] for part in enough)
            found.append(replace(column, label=f"{column.label} of {unit}{WITH_INTERVAL}", parts=enough, n=n))
        return found

    def testable(self, column: Column) -> bool:
        """Whether its differences are to be tested, if none is missing."""
        counts = {part: len(one.examples) for (_, part), one in self.units.items() if part in column.parts}
        return column.compared and bool(column.parts) and all(n >= MIN_UNITS for n in counts.values())

    def cell(self, method: str, column: Column) -> Cell:
        """The method's value, and its difference to the baseline's; p is not yet corrected."""
        parts, against = column.parts, method != self.baseline
        missing = self.missing(method, parts)
        if missing:
            return Cell(None, note=missing, difference_note=missing if against else "")
        try:
            value = statistics.estimate([self.units[method, part] for part in parts])
        except UserError as error:  # other seeds in one task than in another: the tasks' own cells still stand
            return Cell(None, note=str(error), difference_note=str(error) if against else "")
        evaluations = sorted({one for part in parts for one in self.evaluations.get((method, part), ())})
        cell = Cell(value.value, value.interval, value.n, value.seeds, value.spread, evaluations=tuple(evaluations))
        if not against:
            return cell
        refused = [self.refusals[method, part] for part in parts if (method, part) in self.refusals]
        gap = self.missing(self.baseline, parts) or (refused[0] if refused else "")
        if gap:
            return replace(cell, difference_note=gap)
        try:
            difference = statistics.estimate([self.contrasts[method, part] for part in parts])
        except UserError as error:
            return replace(cell, difference_note=str(error))
        note = ""
        if NO_SEED not in cell.seeds and difference.seeds != cell.seeds:
            note = f"compared over the seeds in common with {self.baseline}: {', '.join(map(str, difference.seeds))}"
        return replace(
            cell,
            difference=difference.value,
            difference_interval=difference.interval,
            difference_seeds=difference.seeds,
            difference_note=note,
            p=difference.p,
            general=difference.general,
        )

    def missing(self, method: str, parts: Sequence[Part]) -> str:
        """Why there is no number; '' where there is."""
        if not parts:
            return "no suite of this harness measures it"
        gone = [part for part in parts if (method, part) not in self.units]
        if not gone:
            return ""
        if not any(name == method for name, _ in self.units):
            return f"no records of {method}: not run, or its records were removed"
        suite = gone[0].suite
        if not any(name == method and part.suite == suite for name, part in self.units):
            return f"no {suite} records of {method}: not evaluated, or its records were removed"
        tasks = ", ".join(part.task for part in gone)
        return f"no records of {method} on {tasks}: not evaluated, or its records were removed"


def _evaluations(records: pd.DataFrame) -> dict[tuple[str, Part], tuple[str, ...]]:
    names = ["method", "suite", "task", "metric", "evaluation"]
    found: dict[tuple[str, Part], tuple[str, ...]] = {}
    for method, suite, task, metric, evaluation in records[names].drop_duplicates().itertuples(index=False):
        if evaluation:
            key = method, Part(suite, task, metric)
            found[key] = (*found.get(key, ()), evaluation)
    return found


def sentences(metric: Metric, baseline: str, found: Measured, task: str, *more: str) -> list[str]:
    """What a reader must know to read the numbers; `task` is what one is called, `more` comes after the intervals."""
    everything = [cell for row in found.cells for cell in row]
    notes = [
        f"The average is the unweighted mean over {task}s; n counts {metric.unit}s.",
        f"[low, high]: {CONFIDENCE:.0%} interval over {metric.unit}s within {task}s ({_how(metric)}), about these "
        f"checkpoints only; none where a {task} has fewer than {MIN_UNITS} {metric.unit}s.",
        *more,
    ]
    if found.comparisons:
        about = "about these checkpoints only"
        if any(cell.general for cell in everything):
            about += f"; doubled where {MIN_SEEDS} seeds or more let it be said of the method"
        notes.append(
            f"▲ better, ▼ worse than {baseline}: {_test(metric)}, corrected for the {found.comparisons} comparisons of "
            f"this table (Holm, {1 - CONFIDENCE:.0%}), {about}."
        )
    notes.append("Bold: the best value, whether or not chance would do as well.")
    if any(cell.spread is not None for cell in everything):
        notes.append("±: standard deviation over seeds.")
    notes += [
        f"The {one.label} covers {', '.join(one.tasks)}." for one in found.columns if one.label.endswith(WITH_INTERVAL)
    ]
    return notes


def _how(metric: Metric) -> str:
    bootstrap = f"studentised bootstrap, {RESAMPLES:,} resamples"
    return bootstrap if metric.bounds is None else f"Wilson's for one task and seed, else {bootstrap}"


def _test(metric: Metric) -> str:
    if metric.bounds is None:
        return "by a paired bootstrap test"
    return "by McNemar's test for one task and seed, else by a paired bootstrap test"
