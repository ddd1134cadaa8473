"""Figures from records, tables and measures: PNG and SVG with the same bytes every time.

Readable in black and white and by colour-blind eyes (see `results.figures.style`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from results import statistics
from results.errors import UnknownName, UserError
from results.figures import style
from results.layout import Cell, Table
from results.metrics import Metric, metric_of
from results.paper_numbers import AVERAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 4  # panels beside each other


@dataclass(frozen=True)
class Curve:
    """One method's held-out metric (unweighted mean over domains, mean over seeds) by training tokens seen."""

    method: str
    tokens: np.ndarray  # int64[T], rising
    values: np.ndarray  # float64[T]
    intervals: np.ndarray | None = None  # float64[T, 2]; None where a domain has fewer than 20 documents


@dataclass(frozen=True)
class EqualQuality:
    """How many training tokens `method` needs to be as good as `other` is at its end, by linear interpolation.

    tokens is None where it never is ('not reached'); other_tokens are what `other` was trained on for that.
    """

    method: str
    other: str
    quality: float
    tokens: float | None
    other_tokens: int

    def sentence(self, digits: int) -> str:
        """The finding in words."""
        goal = f"{self.other}'s final {self.quality:.{digits}f} (at {self.other_tokens:,} tokens)"
        if self.tokens is None:
            return f"{self.method}: {goal} not reached"
        return f"{self.method}: {goal} reached at {self.tokens:,.0f} tokens"


@dataclass(frozen=True)
class LearningCurves:
    """What the figure shows, as data."""

    metric: Metric
    curves: tuple[Curve, ...]
    equal_quality: tuple[EqualQuality, ...]
    files: tuple[Path, ...]


def learning_curves(
    records: pd.DataFrame,
    methods: Sequence[str],
    path: Path | str,
    *,
    reference: str = "CLM",
    suite: str = "perplexity",
    metric: str = "bits_per_byte",
    title: str = "",
    banner: str = "",
) -> LearningCurves:
    """Draw `path`.png and `path`.svg: the held-out metric of `methods` against training tokens (the paper's figure 3).

    records: of one experiment and profile; only those with training tokens count. Each other method is set against
    `reference`: the tokens it needs for the reference's final quality, and the other way round. Raises UserError where
    a method has no curve and where steps were not measured on the same documents. Of more methods than can be told
    apart the reference and the first ones are drawn; what is returned is about all of them.
    """
    if reference not in methods:
        raise UnknownName("reference row", reference, methods)
    measured = metric_of(metric)
    along = records[
        (records["suite"] == suite)
        & (records["metric"] == metric)
        & records["tokens"].notna()
        & records["method"].isin(list(methods))
    ]
    curves = tuple(_curves(along, methods))
    by_method = {curve.method: curve for curve in curves}
    equal = []
    for method in methods:
        if method != reference:
            equal.append(equal_quality(by_method[method], by_method[reference], measured.higher_is_better))
            equal.append(equal_quality(by_method[reference], by_method[method], measured.higher_is_better))
    drawn = {reference, *[method for method in methods if method != reference][: len(style.COLOURS) - 1]}
    if len(drawn) < len(methods):
        title += f" ({len(drawn)} of {len(methods)} rows)"
    shown = [curve for curve in curves if curve.method in drawn]
    compared = [one for one in equal if {one.method, one.other} <= drawn]
    with style.style():
        figure = _draw_curves(measured, shown, compared, reference, title, banner)
        files = style.save(figure, Path(path))
    return LearningCurves(measured, curves, tuple(equal), files)


def equal_quality(curve: Curve, other: Curve, higher_is_better: bool) -> EqualQuality:
    """The training tokens at which `curve` first is as good as `other` is at its last step."""
    goal = float(other.values[-1])
    behind = (goal - curve.values) if higher_is_better else (curve.values - goal)
    there = np.flatnonzero(behind <= 0)
    tokens: float | None = None
    if there.size:
        at = int(there[0])
        tokens = float(curve.tokens[at])
        if at > 0:
            share = behind[at - 1] / (behind[at - 1] - behind[at])
            tokens = float(curve.tokens[at - 1] + share * (curve.tokens[at] - curve.tokens[at - 1]))
    return EqualQuality(curve.method, other.method, goal, tokens, int(other.tokens[-1]))


def _curves(records: pd.DataFrame, methods: Sequence[str]) -> Iterator[Curve]:
    steps = sorted(records["tokens"].unique())
    at_step = {step: statistics.resample(statistics.group(records[records["tokens"] == step])) for step in steps}
    first: dict[str, statistics.Units] = {}
    for method in methods:
        found = {step: [one for (name, _), one in units.items() if name == method] for step, units in at_step.items()}
        found = {step: units for step, units in found.items() if units}
        if not found:
            raise UserError(
                f"there are no records of {method} along its training; evaluate it during training, or leave it out"
            )
        domains = sorted({one.task for units in found.values() for one in units})
        # A step that not every seed and domain has come to would bend the mean; it is not drawn.
        seeds = {seed for units in found.values() for one in units for seed in one.seeds}
        whole = {
            step: units
            for step, units in found.items()
            if [one.task for one in units] == domains and all(set(one.seeds) == seeds for one in units)
        }
        if not whole:
            raise UserError(f"no training step of {method} has records of all its domains and seeds; run it to the end")
        first = first or {one.task: one for one in next(iter(whole.values()))}
        if domains != sorted(first):
            raise UserError(
                f"the curves of {method} and {methods[0]} are over other domains; evaluate both on the same"
            )
        for one in (one for units in whole.values() for one in units):
            statistics.check_same_examples(first[one.task], one)
        found_at = [statistics.estimate(units) for units in whole.values()]
        intervals = [one.interval for one in found_at if one.interval is not None]
        yield Curve(
            method,
            np.array(list(whole), dtype=np.int64),
            np.array([one.value for one in found_at]),
            np.array(intervals) if len(intervals) == len(found_at) else None,
        )


def _draw_curves(
    metric: Metric,
    curves: Sequence[Curve],
    equal: Sequence[EqualQuality],
    reference: str,
    title: str,
    banner: str,
) -> "Figure":
    figure = style.new((7.0, 4.6 + 0.22 * len(equal)))
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        axes.plot(curve.tokens, curve.values, label=curve.method, **style.line_style(i))
        if curve.intervals is not None:
            low, high = curve.intervals.T
            axes.fill_between(curve.tokens, low, high, color=style.COLOURS[i % 7], alpha=0.1, linewidth=0)
        if curve.method == reference:
            axes.axhline(curve.values[-1], color="0.6", linewidth=0.8, zorder=0)
    for one in equal:
        if one.other == reference and one.tokens is not None:
            axes.plot([one.tokens], [one.quality], marker="|", markersize=16, color="0.3", zorder=5)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(f"held-out {metric.label} ({'higher' if metric.higher_is_better else 'lower'} is better)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    style.entitle(figure, title, banner)
    figure.supxlabel("\n".join(one.sentence(metric.digits) for one in equal), fontsize=8, x=0.02, ha="left")
    return figure


# The audit's measures of one source in one domain; probabilities and shares lie in [0, 1], log-likelihoods are in nats.
_BY_SOURCE = {
    "nats_per_byte": "nats per byte, as it is",
    "paired": "share of positions paired",
    "chosen": "share of passages it is chosen for",
}
_BY_STAGE = {
    "probability of the true next token": ("p_next_native", "p_next_mapped", "p_next_target"),
    "bucket log-likelihood, nats": ("bucket_ll_native", "bucket_ll_mapped", "bucket_ll_target"),
}
_STAGES = ("source, native", "source, after the map", "target itself")


def audit_figure(measures: pd.DataFrame, path: Path | str, *, title: str = "", banner: str = "") -> tuple[Path, ...]:
    """Draw `path`.png and `path`.svg: what there is to learn from each source, as grouped bars by domain.

    measures has one row a (source, domain) and the columns source, domain, nats_per_byte, paired, p_next_native,
    p_next_mapped, p_next_target, bucket_ll_native, bucket_ll_mapped, bucket_ll_target, chosen. Missing values (NaN) are
    marked n/a. Raises UserError for a missing column, an empty frame, and a source that has a domain twice.
    """
    domains, by_source = _by_source(measures, [*_BY_SOURCE, *(one for names in _BY_STAGE.values() for one in names)])
    sources = list(by_source["chosen"])
    with style.style():
        figure = style.new((4.0 + 1.3 * max(len(domains), 5), 3.0 * (1 + len(sources))))
        grid = figure.add_gridspec(1 + len(sources), 6)
        for i, (name, label) in enumerate(_BY_SOURCE.items()):
            axes = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
            style.bars(axes, domains, by_source[name], label, first=0)
        # Not within the axes: a legend wider than one of them would leave it no room.
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower left", ncols=len(sources), fontsize=8)
        shared: dict[str, Axes] = {}
        for row, source in enumerate(sources, 1):
            for i, (label, names) in enumerate(_BY_STAGE.items()):
                axes = figure.add_subplot(grid[row, 3 * i : 3 * i + 3], sharey=shared.get(label))
                shared.setdefault(label, axes)
                series = {stage: by_source[name][source] for stage, name in zip(_STAGES, names, strict=True)}
                style.bars(axes, domains, series, label, first=3)
                axes.set_title(f"{source}, at its paired positions", fontsize=9)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower right", ncols=len(_STAGES), fontsize=8)
        style.entitle(figure, title, banner)
        return style.save(figure, Path(path))


FUSED = "fused"  # the audit's row of what the target is taught, whoever it is from


def choice_figure(measures: pd.DataFrame, path: Path | str, *, title: str = "", banner: str = "") -> tuple[Path, ...]:
    """Draw which source was chosen where: by domain, the share of passages each is chosen for, adding up to one.

    measures: the columns source, domain and chosen of the audit's (see `audit_figure`, also for what is raised).
    """
    domains, by_source = _by_source(measures[measures["source"] != FUSED], ["chosen"])
    with style.style():
        figure, axes = _domain_axes(len(domains))
        style.stacked(axes, domains, by_source["chosen"], _BY_SOURCE["chosen"])
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        style.entitle(figure, title, banner)
        return style.save(figure, Path(path))


def coverage_figure(measures: pd.DataFrame, path: Path | str, *, title: str = "", banner: str = "") -> tuple[Path, ...]:
    """Draw how much of the target's text each source's alignment covers: the share of positions paired, by domain.

    measures: the columns source, domain and paired of the audit's (see `audit_figure`, also for what is raised).
    """
    domains, by_source = _by_source(measures[measures["source"] != FUSED], ["paired"])
    with style.style():
        figure, axes = _domain_axes(len(domains))
        style.bars(axes, domains, by_source["paired"], _BY_SOURCE["paired"], first=0)
        axes.set_ylim(0, 1)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        style.entitle(figure, title, banner)
        return style.save(figure, Path(path))


def _domain_axes(domains: int) -> "tuple[Figure, Axes]":
    figure = style.new((2.5 + 0.9 * max(domains, 4), 3.8))
    return figure, figure.add_subplot()


def _by_source(measures: pd.DataFrame, names: Sequence[str]) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    """The domains, and of each measure in `names` by source one value a domain, in the order of the rows."""
    absent = [name for name in ["source", "domain", *names] if name not in measures.columns]
    if absent:
        raise UserError(f"the audit's measures lack the columns {', '.join(absent)}; make the audit again")
    if measures.empty:
        raise UserError("the audit has no measures to draw; run it with at least one source and domain")
    if measures.duplicated(["source", "domain"]).any():
        raise UserError("the audit measures one source twice in one domain; make the audit again")
    sources, domains = list(dict.fromkeys(measures["source"])), list(dict.fromkeys(measures["domain"]))
    at = measures.set_index(["source", "domain"])
    found = {
        name: {source: [float(at[name].get((source, domain), np.nan)) for domain in domains] for source in sources}
        for name in names
    }
    return domains, found


def differences_figure(
    table: Table, path: Path | str, methods: Sequence[str] | None = None, *, title: str = ""
) -> tuple[Path, ...]:
    """Draw by how much methods differ from the table's reference in every task: sorted bars, one panel a method.

    methods: by default all with a difference in at least two tasks; without any nothing is drawn. Averages are left
    out. Intervals are not corrected for the number of tasks. Raises UserError for a method that is not in the table.
    """
    names = [column.label for column in table.columns] if table.best_along == "row" else list(table.rows)
    for method in methods or ():
        if method not in names:
            raise UnknownName("method", method, names)
    panels = {method: _differences(table, names.index(method)) for method in methods or names}
    panels = {method: panel for method, panel in panels.items() if len(panel) > 1}
    if not panels:
        return ()
    longest = max(map(len, panels.values()))
    across = min(len(panels), _ACROSS)
    down = -(-len(panels) // across)
    with style.style():
        figure = style.new((2.2 + 3.6 * across, 0.8 + (1 + 0.24 * longest) * down))
        for i, (method, panel) in enumerate(panels.items()):
            axes = figure.add_subplot(down, across, i + 1)
            for at, (_, cell) in enumerate(panel):
                assert cell.difference is not None
                low, high = cell.difference_interval or (cell.difference, cell.difference)
                axes.barh(at, cell.difference, 0.7, **_verdict_style(cell))
                axes.plot([low, high], [at, at], color="black", linewidth=1)
            axes.set_yticks(range(len(panel)), [task for task, _ in panel], fontsize=8)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_xlabel(f"{method} − {table.reference}", fontsize=8)
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
        side = "right is better" if table.higher_is_better else "left is better"
        corrected = any(cell.verdict for panel in panels.values() for _, cell in panel)
        filled = "; dark: better, hatched: worse, corrected for all comparisons of the table" if corrected else ""
        figure.supxlabel(f"{side}; lines: 95% intervals{filled}", fontsize=8)
        style.entitle(figure, title or table.title, table.banner)
        return style.save(figure, Path(path))


def _verdict_style(cell: Cell) -> dict[str, Any]:
    style = {"better": ("0.5", ""), "worse": ("#E69F00", "//"), None: ("0.9", "")}[cell.verdict]
    return {"color": style[0], "hatch": style[1], "edgecolor": "black", "linewidth": 0.5}


def _differences(table: Table, at: int) -> list[tuple[str, Cell]]:
    """The tasks with the cells of the method number `at`, by difference."""
    across = table.best_along == "row"
    cells = [row[at] for row in table.cells] if across else list(table.cells[at])
    tasks = table.rows if across else [column.label for column in table.columns]
    found = [
        (task, cell)
        for task, cell in zip(tasks, cells, strict=True)
        if cell.difference is not None and not task.startswith(AVERAGE)
    ]
    return sorted(found, key=lambda one: (one[1].difference or 0.0, one[0]))


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
    better = "higher" if table.higher_is_better else "lower"
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
            at = sorted({x for x, _, _ in points})
            ticks |= set(at)
            # Several rows may have one value; the line goes through their mean, and each has its own place beside it.
            means = [float(np.mean([y for other, y, _ in points if other == x])) for x in at]
            line = style.line_style(i)
            axes.plot(at, means, **{**line, "marker": ""})
            apart = 0.012 * (max(at) - min(at))
            for x in at:
                beside = [(y, interval) for other, y, interval in points if other == x]
                for k, (y, interval) in enumerate(beside):
                    place = x + apart * (2 * k - len(beside) + 1)
                    axes.plot([place], [y], label=name if (x, k) == (at[0], 0) else None, **line)
                    if interval:
                        axes.plot([place] * 2, interval, color=line["color"], linewidth=1, marker="_", markersize=6)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(sorted(ticks))
        axes.set_xlabel(along)
        axes.set_ylabel(f"{column} − {table.reference} ({better} is better)")
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend()
        style.entitle(figure, title or table.title, table.banner)
        return style.save(figure, Path(path))
