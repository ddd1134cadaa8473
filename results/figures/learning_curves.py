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
    tokens: np.ndarray  # int64[T], rising
    values: np.ndarray  # float64[T]
    intervals: np.ndarray | None = None  # float64[T, 2]; None where a domain has fewer than 20 documents
    resampled: np.ndarray | None = None  # float64[T, R], values in resamples of the documents, the same for all curves


@dataclass(frozen=True)
class EqualQuality:
    """How many training tokens `method` needs to be as good as `other` is at its end, by linear interpolation.

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

    def sentence(self, digits: int) -> str:
        """The finding in words."""
        goal = f"{self.other}'s final {self.quality:.{digits}f} (at {self.other_tokens:,} tokens)"
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
    (tokens,) = _first_reached(curve.tokens, curve.values[:, None], other.values[-1:], higher_is_better)
    interval = None
    if curve.resampled is not None and other.resampled is not None:
        found = _first_reached(curve.tokens, curve.resampled, other.resampled[-1], higher_is_better)
        outside = (1 - statistics.CONFIDENCE) / 2
        low, high = np.quantile(found, [outside, 1 - outside], method="inverted_cdf")
        interval = float(low), float(high)
    at = None if np.isinf(tokens) else float(tokens)
    return EqualQuality(curve.method, other.method, float(other.values[-1]), at, int(other.tokens[-1]), interval)


def _first_reached(tokens: np.ndarray, values: np.ndarray, goals: np.ndarray, higher_is_better: bool) -> np.ndarray:
    """Where each of R curves, values[T, R], first is as good as goals[R]; infinity where it never is: float64[R]."""
    behind = goals - values if higher_is_better else values - goals
    first = np.argmax(behind <= 0, axis=0)
    before, curves = np.maximum(first - 1, 0), np.arange(len(goals))
    gap = behind[before, curves] - behind[first, curves]
    share = np.divide(behind[before, curves], gap, out=np.zeros(len(goals)), where=first > 0)
    at = tokens[before] + share * (tokens[first] - tokens[before])
    return np.where((behind <= 0).any(axis=0), at, np.inf)


def _curves(records: pd.DataFrame, methods: Sequence[str]) -> Iterator[Curve]:
    steps = sorted(records["tokens"].unique())
    at_step = {step: statistics.resample(statistics.group(records[records["tokens"] == step])) for step in steps}
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
        estimates = [statistics.estimate(units) for units in complete.values()]
        intervals = [one.interval for one in estimates if one.interval is not None]
        resampled = [
            values for units in complete.values() if (values := statistics.resampled_values(units)) is not None
        ]
        yield Curve(
            method,
            np.array(list(complete), dtype=np.int64),
            np.array([one.value for one in estimates]),
            np.array(intervals) if len(intervals) == len(estimates) else None,
            np.array(resampled) if len(resampled) == len(estimates) else None,
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
