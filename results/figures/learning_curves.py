"""Learning curves: the held-out metric of every method against its training tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from results import statistics
from results.errors import UnknownName, UserError
from results.figures import style
from results.metrics import Metric, metric_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """One method's held-out metric (unweighted mean over domains, mean over seeds) by training tokens seen."""

    method: str
    tokens: np.ndarray  # int64[T], rising; mean over seeds
    values: np.ndarray  # float64[T]
    intervals: np.ndarray | None = None  # float64[T, 2]; None where a domain has fewer than 20 documents
    resampled: np.ndarray | None = None  # float64[T, R], values in resamples of the documents, the same for all curves
    checkpoint: "Checkpoint | None" = None  # None: the last

    @property
    def row(self) -> "Checkpoint":
        """The checkpoint that is the method's row in tables."""
        last = None if self.resampled is None else self.resampled[-1]
        return self.checkpoint or Checkpoint((int(self.tokens[-1]),), float(self.values[-1]), last)


@dataclass(frozen=True)
class Checkpoint:
    """The point of a curve at which a row's checkpoint was taken."""

    at: tuple[int, ...]  # training tokens under each seed
    value: float  # mean over seeds, each at its own point
    resampled: np.ndarray | None = None  # float64[R]

    @property
    def tokens(self) -> int:
        """Mean over seeds."""
        return round(sum(self.at) / len(self.at))


@dataclass(frozen=True)
class Selection:
    """By which validation text a checkpoint of one method and seed was chosen, and which."""

    method: str
    seed: int
    tokens: int  # of the checkpoint
    points: tuple[tuple[int, float], ...]  # training tokens, bits per byte of validation text


@dataclass(frozen=True)
class EqualQuality:
    """How many training tokens `method` needs to be as good as the row of `other`, by linear interpolation.

    tokens is None where it never is ('not reached'); other_tokens are what `other` was trained on for that. interval
    has 95 % of what resamples of the documents give, infinite where they never reach it; it is about these two
    trainings, and None where a domain has fewer than 20 documents.
    """

    method: str
    other: str
    quality: float
    tokens: float | None
    other_tokens: int
    interval: tuple[float, float] | None = None
    best: bool = False  # whether validation text chose the checkpoint of `other`; else it is the last

    def sentence(self, metric: Metric) -> str:
        """The finding in words."""
        which = "best" if self.best else "final"
        goal = (
            f"{self.other}'s {which} {self.quality:.{metric.digits}f} {metric.label} (at {self.other_tokens:,} tokens)"
        )
        reached = "not reached" if self.tokens is None else f"reached at {self.tokens:,.0f} tokens"
        if self.interval is None:
            return (
                f"{self.method}: {goal} {reached} (no interval: fewer than {statistics.MIN_UNITS} documents a domain)"
            )
        low, high = ("never" if np.isinf(at) else f"{at:,.0f}" for at in self.interval)
        return f"{self.method}: {goal} {reached} [{low}, {high}]"


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
    precision: str = "",
    selections: Sequence[Selection] = (),
) -> LearningCurves:
    """Draw `path`.png and `path`.svg: the held-out metric of `methods` against training tokens (the paper's figure 3).

    records: of one experiment and profile; only those with training tokens count. Each other method is set against
    `reference`: the tokens it needs for the quality of the reference's row, and the other way round. `selections` say
    which checkpoints these are, where validation text has chosen them: they are marked, and the curves of that text are
    dotted. `precision` is what the metric was computed in. Raises UserError where a method has no curve and where steps
    were not measured on the same documents. Of more methods than can be told
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
    curves = tuple(_curves(along, methods, selections))
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
        figure = _draw_curves(measured, shown, compared, reference, title, banner, precision, selections)
        files = style.save(figure, Path(path))
    return LearningCurves(measured, curves, tuple(equal), files)


def equal_quality(curve: Curve, other: Curve, higher_is_better: bool) -> EqualQuality:
    """The training tokens at which `curve` first is as good as the row of `other`."""
    goal = other.row
    (tokens,) = _first_reached(curve.tokens, curve.values[:, None], np.array([goal.value]), higher_is_better)
    interval = None
    if curve.resampled is not None and goal.resampled is not None:
        found = _first_reached(curve.tokens, curve.resampled, goal.resampled, higher_is_better)
        outside = (1 - statistics.CONFIDENCE) / 2
        low, high = np.quantile(found, [outside, 1 - outside], method="inverted_cdf")
        interval = float(low), float(high)
    at = None if np.isinf(tokens) else float(tokens)
    best = other.checkpoint is not None
    return EqualQuality(curve.method, other.method, goal.value, at, goal.tokens, interval, best)


def _first_reached(tokens: np.ndarray, values: np.ndarray, goals: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Where each of R curves, values[T, R], first is as good as goals[R]; infinity where it never is: float64[R]."""
    behind = goals - values if higher_is_better else values - goals
    first = np.argmax(behind <= 0, axis=0)
    before, curves = np.maximum(first - 1, 0), np.arange(len(goals))
    gap = behind[before, curves] - behind[first, curves]
    share = np.divide(behind[before, curves], gap, out=np.zeros(len(goals)), where=first > 0)
    at = tokens[before] + share * (tokens[first] - tokens[before])
    return np.where((behind <= 0).any(axis=0), at, np.inf)


def _curves(records: pd.DataFrame, methods: Sequence[str], selections: Sequence[Selection] = ()) -> Iterator[Curve]:
    # Seeds pack other sequences into a step: what they have in common is which measurement it is, not its tokens.
    number = records.groupby(["method", "seed"])["tokens"].rank("dense")
    at_step = {
        step: statistics.resample(statistics.group(records[number == step].assign(tokens=None)))
        for step in sorted(number.unique())
    }
    first: dict[str, statistics.Units] = {}
    for method in methods:
        by_step = {step: [one for (name, _), one in units.items() if name == method] for step, units in at_step.items()}
        by_step = {step: units for step, units in by_step.items() if units}
        if not by_step:
            raise UserError(
                f"there are no records of {method} along its training; evaluate it during training, or leave it out"
            )
        domains = sorted({one.task for units in by_step.values() for one in units})
        # A step that not every seed and domain has come to would bend the mean; it is not drawn.
        seeds = {seed for units in by_step.values() for one in units for seed in one.seeds}
        complete = {
            step: units
            for step, units in by_step.items()
            if [one.task for one in units] == domains and all(set(one.seeds) == seeds for one in units)
        }
        if not complete:
            raise UserError(f"no training step of {method} has records of all its domains and seeds; run it to the end")
        first = first or {one.task: one for one in next(iter(complete.values()))}
        if domains != sorted(first):
            raise UserError(
                f"the curves of {method} and {methods[0]} are over other domains; evaluate both on the same"
            )
        for one in (one for units in complete.values() for one in units):
            statistics.check_same_examples(first[one.task], one)
        own = records["method"] == method
        estimates = [statistics.estimate(units) for units in complete.values()]
        intervals = [one.interval for one in estimates if one.interval is not None]
        resampled = [
            values for units in complete.values() if (values := statistics.resampled_values(units)) is not None
        ]
        yield Curve(
            method,
            np.array([round(records["tokens"][(number == step) & own].mean()) for step in complete], dtype=np.int64),
            np.array([one.value for one in estimates]),
            np.array(intervals) if len(intervals) == len(estimates) else None,
            np.array(resampled) if len(resampled) == len(estimates) else None,
            _checkpoint(records, method, seeds, domains, selections),
        )


def _checkpoint(
    records: pd.DataFrame, method: str, seeds: set[int], domains: Sequence[str], selections: Sequence[Selection]
) -> Checkpoint | None:
    """The point that was chosen of a method's curve, under each seed its own; None where none was, or it is unknown."""
    chosen = {one.seed: one.tokens for one in selections if one.method == method}
    if not chosen or chosen.keys() != seeds:
        return None
    own = records[records["method"] == method]
    own = own[own["tokens"] == own["seed"].map(chosen)].assign(tokens=None)  # one step, though at other tokens
    units = list(statistics.resample(statistics.group(own)).values())
    if [one.task for one in units] != list(domains) or any(set(one.seeds) != seeds for one in units):
        return None  # the curve was measured at other points
    at = tuple(chosen[seed] for seed in sorted(seeds))
    return Checkpoint(at, statistics.estimate(units).value, statistics.resampled_values(units))


def _draw_curves(
    metric: Metric,
    curves: Sequence[Curve],
    equal: Sequence[EqualQuality],
    reference: str,
    title: str,
    banner: str,
    precision: str,
    selections: Sequence[Selection],
) -> "Figure":
    figure = style.new((7.0, 4.6 + 0.22 * len(equal)))
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        axes.plot(curve.tokens, curve.values, label=curve.method, **style.line_style(i))
        if curve.intervals is not None:
            low, high = curve.intervals.T
            axes.fill_between(curve.tokens, low, high, color=style.COLOURS[i % 7], alpha=0.1, linewidth=0)
        if curve.checkpoint is not None:
            on_curve = np.interp(curve.checkpoint.at, curve.tokens, curve.values)
            axes.plot(curve.checkpoint.at, on_curve, "*", color=style.COLOURS[i % 7], markersize=13, zorder=6)
        for selection in selections:
            if selection.method == curve.method:
                axes.plot(*np.array(selection.points).T, ":", color=style.COLOURS[i % 7], linewidth=0.8)
        if curve.method == reference:
            axes.axhline(curve.row.value, color="0.6", linewidth=0.8, zorder=0)
    for one in equal:
        if one.other == reference and one.tokens is not None:
            axes.plot([one.tokens], [one.quality], marker="|", markersize=16, color="0.3", zorder=5)
    axes.set_xlabel("training tokens")
    better = f"{'higher' if metric.higher_is_better else 'lower'} is better"
    axes.set_ylabel(f"held-out {metric.label} ({', '.join(filter(None, (better, precision)))})")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    if any(curve.checkpoint is not None for curve in curves):
        axes.plot([], [], "*", color="0.3", markersize=10, linestyle="none", label="checkpoint that was taken")
    if selections:
        axes.plot([], [], ":", color="0.3", linewidth=0.8, label="validation text, by which it was chosen")
    axes.legend()
    style.entitle(figure, title, banner)
    figure.supxlabel("\n".join(one.sentence(metric) for one in equal), fontsize=8, x=0.02, ha="left")
    return figure
