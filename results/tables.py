"""The comparison table, from records alone: rows are methods, columns domains and their average.

What is missing stays missing and says why; nothing is filled in. The same records give the same table.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import pandas as pd

from results import statistics
from results.bootstrap import RESAMPLES, SharedRatios, strata
from results.errors import UnknownName, UserError
from results.layout import Cell, Column, Part, Verdict
from results.metrics import LOST_BYTES, Metric, mark_lost_text, measure, metric_of, values_of
from results.paper_numbers import AVERAGE
from results.records import NO_SEED
from results.statistics import CONFIDENCE, MIN_SEEDS, MIN_UNITS, MIN_UNLIKE, Units
from results.table import Table

# Profiles whose numbers only show that everything runs.
BANNERS = {"micro": "plumbing, not a result", "tiny": "plumbing, not a result"}
WITH_INTERVAL = " with an interval"
Reason = tuple[str, str, str]  # method, suite, task
Family = Literal["average", "task"]


def main_table(
    records: pd.DataFrame,
    order: Sequence[str],
    reference: str = "CLM",
    *,
    suite: str = "perplexity",
    metric: str = "bits_per_byte",
    tasks: Sequence[str] | None = None,
    title: str | None = None,
    banner: str | None = None,
    untested: Collection[str] = (),
) -> Table:
    """The final evaluation of the methods in `order` (the row labels), each compared with `reference`, paired.

    records: of one experiment and profile. tasks: the columns, by default every domain that any row has, by name.
    banner: by default what the profile calls for. Otherwise as `suite_table`.
    """
    final = records[records["tokens"].isna() & records["method"].isin(list(order))]
    shown = final[(final["suite"] == suite) & final["metric"].isin([metric, LOST_BYTES])]
    if shown.empty and reference in order:
        raise UserError(
            f"there are no final {metric} records of the suite {suite} for any of {', '.join(order)}; run the "
            "experiment with `fusellm experiment run`"
        )
    experiment, profile = (str(shown[name].iloc[0]) if len(shown) else "" for name in ("experiment", "profile"))
    kind = metric_of(metric)
    better = "higher" if kind.higher_is_better else "lower"
    return suite_table(
        shown,
        order,
        dict.fromkeys(tasks or sorted(shown["task"].unique()), metric),
        reference,
        suite=suite,
        task="domain",
        title=title or f"{experiment}, profile {profile}: {kind.label}, {better} is better",
        banner=BANNERS.get(profile, "") if banner is None else banner,
        untested=untested,
    )


def suite_table(
    records: pd.DataFrame,
    order: Sequence[str],
    metrics: Mapping[str, str],
    reference: str | None,
    *,
    suite: str,
    title: str,
    task: str = "task",
    banner: str = "",
    reasons: Mapping[Reason, str] | None = None,
    untested: Collection[str] = (),
) -> Table:
    """One suite: rows are the methods in `order`, columns the tasks of `metrics` (the metric of each) and the average.

    records: of one experiment and profile. The average is the unweighted mean, with an interval only where each task
    has 20 clusters; where some have not, a second average over those that have is given beside it. Averages are
    compared with `reference`, paired; nothing is where that is None. task: what one is called. reasons: why something
    is missing, where that is known. untested: rows whose differences are shown and not tested. Raises UserError for
    wrong names and for rows not measured on the same data.
    """
    if len(set(order)) < len(order):
        raise UserError(f"a row is asked for twice in {', '.join(order)}; name each method once")
    parts = [Part(suite, name, metric) for name, metric in metrics.items()]
    several = len(set(metrics.values())) > 1
    wanted = [Column(f"{part.task} ({part.metric})" if several else part.task, (part,)) for part in parts]
    wanted.append(Column(AVERAGE, tuple(parts), compared=True))
    final = records[records["tokens"].isna() & records["method"].isin(list(order))]
    compared = compare(final, order, wanted, reference, unit=f"{task}s", reasons=reasons, untested=untested)
    measures = [measure(part.metric) for part in parts]
    kind = measures[0]
    difference = (
        f"− {reference}: the method minus {reference}, paired over the same {kind.unit}s; "
        f"{'positive' if kind.higher_is_better else 'negative'} is better than {reference}."
    )
    return Table(
        title=title,
        rows=tuple(order),
        columns=compared.columns,
        cells=compared.cells,
        higher_is_better=kind.higher_is_better,
        digits=kind.digits,
        reference=reference,
        banner=banner,
        notes=tuple(sentences(measures, reference, compared, task, *([difference] if reference else []))),
        values=values_of(measures),
    )


@dataclass(frozen=True)
class Comparison:
    """The columns with their numbers of examples, the cells of all methods in them, and what was to be tested."""

    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    families: Mapping[Family, int]  # the number of comparisons that are corrected together
    untested: tuple[str, ...] = ()  # rows that are compared, but not tested
    clusters: Mapping[Part, tuple[int, int]] = field(default_factory=dict)  # examples and clusters, where these differ
    sharing: tuple[str, ...] = ()  # tasks that have clusters in common with other tasks


def compare(
    records: pd.DataFrame,
    methods: Sequence[str],
    wanted: Sequence[Column],
    reference: str | None,
    *,
    unit: str = "tasks",
    reasons: Mapping[Reason, str] | None = None,
    untested: Collection[str] = (),
) -> Comparison:
    """What `methods` reach in the `wanted` columns, compared with `reference` and tested (see `suite_table`).

    records: final ones of one experiment and profile. A column of several parts of which some have fewer than 20
    clusters, or none, is followed by one over those that have ("... of `unit` with an interval"). Averages are one
    family, single tasks another; each is corrected for its own number of comparisons (Holm). `untested` are rows that
    are in neither, such as models as they are. Raises UserError for an unknown reference and for methods not measured
    on the same data.
    """
    if reference is not None and reference not in methods:
        raise UnknownName("reference row", reference, methods)
    parts = list(dict.fromkeys(part for column in wanted for part in column.parts))
    measures = _Measures.of(records, methods, parts, reference, reasons or {})
    columns = [column for needed in wanted for column in measures.columns(needed, unit)]
    cells = {(method, j): measures.cell(method, column) for method in methods for j, column in enumerate(columns)}
    mark_lost_text(cells, columns, records, reference)
    tested = [method for method in methods if reference not in (None, method) and method not in untested]
    cells |= {at: replace(cell, p=None, general=False) for at, cell in cells.items() if at[0] not in tested}
    families: dict[Family, list[tuple[str, int]]] = {"average": [], "task": []}
    for j, column in enumerate(columns):
        if measures.testable(column):
            families["average" if len(column.parts) > 1 else "task"] += [(method, j) for method in tested]
    for family in families.values():
        # What is missing counts as a comparison that shows nothing, lest a lost file make another method better.
        values = [1.0 if (p := cells[at].p) is None else p for at in family]
        for at, p in zip(family, statistics.holm(values), strict=True):
            cells[at] = _judged(cells[at], p, columns[at[1]])
    return Comparison(
        tuple(columns),
        tuple(tuple(cells[method, j] for j in range(len(columns))) for method in methods),
        {family: len(members) for family, members in families.items() if members},
        tuple(method for method in methods if method in untested and method != reference),
        *measures.clusters(),
    )


def untested_rows(methods: Sequence[str], as_they_are: Collection[str], reference: str | None) -> tuple[str, ...]:
    """Those of `methods` that are models as they are: shown beside the rows that an experiment makes, not tested.

    Where no other rows are to be compared with the reference the models are what is asked about, and are tested.
    """
    compared = [method for method in methods if method != reference]
    models = tuple(method for method in compared if method in as_they_are)
    return models if len(models) < len(compared) else ()


def _judged(cell: Cell, p: float, column: Column) -> Cell:
    if cell.p is None or cell.difference is None:
        return cell
    better = (cell.difference > 0) == measure(column.parts[0].metric).higher_is_better
    verdict: Verdict = "better" if better else "worse"
    return replace(cell, p_corrected=p, verdict=verdict if p <= 1 - CONFIDENCE and cell.difference else None)


@dataclass
class _Measures:
    """What the records say of every method and part, and of every method against the reference."""

    reference: str | None
    reasons: Mapping[Reason, str]
    units: dict[tuple[str, Part], Units] = field(default_factory=dict)
    contrasts: dict[tuple[str, Part], Units] = field(default_factory=dict)
    refusals: dict[tuple[str, Part], str] = field(default_factory=dict)  # why there is no contrast
    evaluations: dict[tuple[str, Part], tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        records: pd.DataFrame,
        methods: Sequence[str],
        parts: Sequence[Part],
        reference: str | None,
        reasons: Mapping[Reason, str],
    ) -> "_Measures":
        of_suites = pd.Series(False, index=records.index)
        for suite, metric in dict.fromkeys((part.suite, part.metric) for part in parts):
            of_suites |= (records["suite"] == suite) & (records["metric"] == metric)
        records = records[of_suites]
        grouped = statistics.group(records)
        both: dict[tuple[bool, str, Part], Units] = {}
        self = cls(reference, reasons, evaluations=_evaluations(records))
        for part in parts:
            present = {method: grouped[method, part] for method in methods if (method, part) in grouped}
            for other in list(present.values())[1:]:
                statistics.check_same_examples(next(iter(present.values())), other)
            for method, units in present.items():
                both[False, method, part] = units
                if method != reference and reference in present:
                    try:
                        both[True, method, part] = statistics.contrast(units, present[reference])
                    except UserError as error:  # no seed in common
                        self.refusals[method, part] = str(error)
        for (contrast, method, part), units in statistics.resample(both).items():
            (self.contrasts if contrast else self.units)[method, part] = units
        return self

    def columns(self, column: Column, unit: str) -> list[Column]:
        """The column with its number of examples, and the one after it over the parts that have enough of them."""
        units = {part: one for (_, part), one in self.units.items() if part in column.parts}
        whole = len(units) == len(column.parts) and bool(units)
        columns = [replace(column, n=sum(len(one.examples) for one in units.values()) if whole else None)]
        enough = tuple(part for part in column.parts if part in units and units[part].n_clusters >= MIN_UNITS)
        if len(column.parts) > 1 and enough and len(enough) < len(column.parts):
            n = sum(len(units[part].examples) for part in enough)
            columns.append(replace(column, label=f"{column.label} of {unit}{WITH_INTERVAL}", parts=enough, n=n))
        return columns

    def testable(self, column: Column) -> bool:
        """Whether its differences are to be tested, if none is missing."""
        enough = (one.n_clusters >= MIN_UNITS for (_, part), one in self.units.items() if part in column.parts)
        return column.compared and bool(column.parts) and all(enough)

    def clusters(self) -> tuple[dict[Part, tuple[int, int]], tuple[str, ...]]:
        """Examples and clusters of the parts where these differ, and the tasks that share clusters with others."""
        by_part = {part: one for (_, part), one in self.units.items()}
        several = {part: (len(one.examples), one.n_clusters) for part, one in by_part.items()}
        together = [one for one in strata([one.ratio for one in by_part.values()]) if isinstance(one, SharedRatios)]
        sharing = dict.fromkeys(ratio.task for one in together for ratio in one.ratios)
        return {part: counts for part, counts in several.items() if counts[0] > counts[1]}, tuple(sharing)

    def cell(self, method: str, column: Column) -> Cell:
        """The method's value, and its difference to the reference's; p is not yet corrected."""
        parts, against = column.parts, self.reference not in (None, method)
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
        gap = self.missing(str(self.reference), parts) or (refused[0] if refused else "")
        if gap:
            return replace(cell, difference_note=gap)
        try:
            difference = statistics.estimate([self.contrasts[method, part] for part in parts])
        except UserError as error:
            return replace(cell, difference_note=str(error))
        note = ""
        if NO_SEED not in cell.seeds and difference.seeds != cell.seeds:
            note = f"compared over the seeds in common with {self.reference}: {', '.join(map(str, difference.seeds))}"
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
        known = [f"{one.task}: {why}" for one in gone if (why := self.reasons.get((method, one.suite, one.task)))]
        if known:
            return f"{method} was not run on {'; '.join(known)}"
        if not any(name == method for name, _ in self.units):
            return f"no records of {method}: not run, or its records were removed"
        suite = gone[0].suite
        if not any(name == method and part.suite == suite for name, part in self.units):
            return f"no {suite} records of {method}: not evaluated, or its records were removed"
        tasks = ", ".join(part.task for part in gone)
        return f"no records of {method} on {tasks}: not evaluated, or its records were removed"


def _evaluations(records: pd.DataFrame) -> dict[tuple[str, Part], tuple[str, ...]]:
    names = ["method", "suite", "task", "metric", "evaluation"]
    evaluations: dict[tuple[str, Part], tuple[str, ...]] = {}
    for method, suite, task, metric, evaluation in records[names].drop_duplicates().itertuples(index=False):
        if evaluation:
            key = method, Part(suite, task, metric)
            evaluations[key] = (*evaluations.get(key, ()), evaluation)
    return evaluations


def sentences(
    metrics: Sequence[Metric], reference: str | None, compared: Comparison, task: str, *more: str
) -> list[str]:
    """What a reader must know to read the numbers; `task` is what one is called, `more` comes after the intervals.

    metrics: those of the table, of one direction; the first one tells how intervals are made.
    """
    metric = metrics[0]
    better = "higher" if metric.higher_is_better else "lower"
    cells = [cell for row in compared.cells for cell in row]
    alike = f", or fewer than {MIN_UNLIKE} in all score unlike the rest" if metric.bounds else ""
    notes = [
        f"Values: {values_of(metrics)}; {better} is better.",
        f"The average is the unweighted mean over {task}s; n counts {metric.unit}s.",
        f"[low, high]: {CONFIDENCE:.0%} interval over {metric.unit}s within {task}s ({_how(metric)}), about these "
        f"checkpoints only; none where a {task} has fewer than {MIN_UNITS} independent {metric.unit}s{alike}.",
        *_about_clusters(metric, compared),
        *more,
    ]
    if compared.families:
        about = "about these checkpoints only"
        if any(cell.general for cell in cells):
            about += f"; doubled where {MIN_SEEDS} seeds or more let it be said of the method"
        counts = [
            f"{n} comparison{'s' if n > 1 else ''} of {'averages' if kind == 'average' else f'single {task}s'}"
            for kind, n in compared.families.items()
        ]
        apart = ", each number by itself" if len(counts) > 1 else ""
        notes.append(
            f"▲ better, ▼ worse than {reference}: {_test(metric)}, corrected for {' and '.join(counts)} (Holm, "
            f"{1 - CONFIDENCE:.0%}{apart}), {about}."
        )
        if compared.untested:
            notes.append(f"Shown and not tested, being models as they are: {', '.join(compared.untested)}.")
    notes.append("Bold: the best value, whether or not chance would do as well.")
    if any(cell.spread is not None for cell in cells):
        notes.append("±: standard deviation over seeds.")
    notes += [
        f"The {one.label} covers {', '.join(one.tasks)}."
        for one in compared.columns
        if one.label.endswith(WITH_INTERVAL)
    ]
    return notes


def _about_clusters(metric: Metric, compared: Comparison) -> list[str]:
    notes = []
    if compared.clusters:
        listed = ", ".join(f"{part.task} {n:,} in {m:,}" for part, (n, m) in compared.clusters.items())
        notes.append(f"Of {metric.unit}s about the same text only the texts count as independent: {listed}.")
    if compared.sharing:
        notes.append(
            f"{', '.join(compared.sharing)} have {metric.unit}s in common, which count once in the interval and test "
            "of an average."
        )
    return notes


def _how(metric: Metric) -> str:
    bootstrap = f"studentised bootstrap, {RESAMPLES:,} resamples"
    if metric.bounds is None:
        return bootstrap
    return f"Wilson's for one task, one seed and independent {metric.unit}s, else {bootstrap}"


def _test(metric: Metric) -> str:
    if metric.bounds is None:
        return "by a paired bootstrap test"
    return f"by McNemar's test for one task, one seed and independent {metric.unit}s, else by a paired bootstrap test"
