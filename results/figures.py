"""Figures from records and measures: PNG and SVG with the same bytes every time.

Readable in black and white and by colour-blind eyes: every series has its own marker, line style or hatch besides a
colour of the Okabe-Ito set.
"""

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from results import statistics
from results.errors import UserError
from results.metrics import Metric, metric_of, unknown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
_HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


@dataclass(frozen=True)
class Curve:
    """One method's held-out metric (unweighted mean over domains, mean over seeds) by training tokens seen."""

    method: str
    tokens: np.ndarray  # int64[T], rising
    values: np.ndarray  # float64[T]


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
    baseline: str = "CLM",
    suite: str = "perplexity",
    metric: str = "bits_per_byte",
    title: str = "",
    banner: str = "",
) -> LearningCurves:
    """Draw `path`.png and `path`.svg: the held-out metric of `methods` against training tokens (the paper's figure 3).

    records: of one experiment and profile; only those with training tokens count. Each other method is set against
    `baseline`: the tokens it needs for the baseline's final quality, and the other way round. Raises UserError where a
    method has no curve and where steps were not measured on the same documents.
    """
    if baseline not in methods:
        raise UserError(unknown("baseline", baseline, methods))
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
        if method != baseline:
            equal.append(equal_quality(by_method[method], by_method[baseline], measured.higher_is_better))
            equal.append(equal_quality(by_method[baseline], by_method[method], measured.higher_is_better))
    with _style():
        figure = _draw_curves(measured, curves, equal, baseline, title, banner)
        files = _save(figure, Path(path))
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
    at_step = {step: statistics.group(records[records["tokens"] == step], intervals=False) for step in steps}
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
        values = [statistics.estimate(units).value for units in whole.values()]
        yield Curve(method, np.array(list(whole), dtype=np.int64), np.array(values))


def _draw_curves(
    metric: Metric,
    curves: Sequence[Curve],
    equal: Sequence[EqualQuality],
    baseline: str,
    title: str,
    banner: str,
) -> "Figure":
    figure = _new((7.0, 4.6 + 0.22 * len(equal)))
    axes = figure.add_subplot()
    for i, curve in enumerate(curves):
        axes.plot(
            curve.tokens,
            curve.values,
            label=curve.method,
            color=_COLOURS[i % 7],
            marker=_MARKERS[i % 7],
            linestyle=_LINES[(i + i // 7) % 7],
            markersize=5,
            linewidth=1.6,
        )
        if curve.method == baseline:
            axes.axhline(curve.values[-1], color="0.6", linewidth=0.8, zorder=0)
    for one in equal:
        if one.other == baseline and one.tokens is not None:
            axes.plot([one.tokens], [one.quality], marker="|", markersize=16, color="0.3", zorder=5)
    axes.set_xlabel("training tokens")
    axes.set_ylabel(f"held-out {metric.label} ({'higher' if metric.higher_is_better else 'lower'} is better)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend()
    _entitle(figure, title, banner)
    figure.supxlabel("\n".join(one.sentence(metric.digits) for one in equal), fontsize=8, x=0.02, ha="left")
    return figure


# The audit's measures of one source in one domain; probabilities and shares lie in [0, 1], log-likelihoods are in nats.
_BY_SOURCE = {
    "nats_per_byte": "nats per byte, as it is",
    "paired": "share of positions paired",
    "chosen": "share of pieces it is chosen for",
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
    needed = ["source", "domain", *_BY_SOURCE, *(name for names in _BY_STAGE.values() for name in names)]
    absent = [name for name in needed if name not in measures.columns]
    if absent:
        raise UserError(f"the audit's measures lack the columns {', '.join(absent)}; make the audit again")
    if measures.empty:
        raise UserError("the audit has no measures to draw; run it with at least one source and domain")
    if measures.duplicated(["source", "domain"]).any():
        raise UserError("the audit measures one source twice in one domain; make the audit again")
    sources, domains = list(dict.fromkeys(measures["source"])), list(dict.fromkeys(measures["domain"]))
    at = measures.set_index(["source", "domain"])

    def column(source: str, name: str) -> list[float]:
        return [float(at[name].get((source, domain), np.nan)) for domain in domains]

    with _style():
        figure = _new((4.0 + 1.3 * max(len(domains), 5), 3.0 * (1 + len(sources))))
        grid = figure.add_gridspec(1 + len(sources), 6)
        for i, (name, label) in enumerate(_BY_SOURCE.items()):
            axes = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
            _bars(axes, domains, {source: column(source, name) for source in sources}, label, first_style=0)
            if i == 1:
                axes.legend(
                    loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(sources), fontsize=8, frameon=False
                )
        shared: dict[str, Axes] = {}
        for row, source in enumerate(sources, 1):
            for i, (label, names) in enumerate(_BY_STAGE.items()):
                axes = figure.add_subplot(grid[row, 3 * i : 3 * i + 3], sharey=shared.get(label))
                shared.setdefault(label, axes)
                series = {stage: column(source, name) for stage, name in zip(_STAGES, names, strict=True)}
                _bars(axes, domains, series, label, first_style=3)
                axes.set_title(f"{source}, at its paired positions", fontsize=9)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(_STAGES), fontsize=8)
        _entitle(figure, title, banner)
        return _save(figure, Path(path))


def _bars(axes: "Axes", groups: Sequence[str], series: dict[str, list[float]], label: str, first_style: int) -> None:
    width = 0.8 / len(series)
    for k, (name, values) in enumerate(series.items()):
        x = np.arange(len(groups)) + (k - (len(series) - 1) / 2) * width
        style = (first_style + k) % 7
        axes.bar(
            x,
            values,
            width,
            label=name,
            color=_COLOURS[style] if style else "0.45",
            hatch=_HATCHES[style],
            edgecolor="white",
            linewidth=0.5,
        )
        for place, value in zip(x, values, strict=True):
            if np.isnan(value):
                axes.text(place, 0.01, "n/a", transform=axes.get_xaxis_transform(), ha="center", fontsize=6)
    axes.set_xticks(np.arange(len(groups)), groups, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _entitle(figure: "Figure", title: str, banner: str) -> None:
    text = ": ".join(part for part in (banner.upper(), title) if part)
    if text:
        # About 11 characters an inch at this size.
        figure.suptitle(textwrap.fill(text, int(11 * figure.get_figwidth())), fontsize=11)


def _new(size: tuple[float, float]) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no window, no global list of figures.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's settings, and nothing in a file that changes from run to run."""
    import matplotlib.style

    with matplotlib.style.context(["default", {"svg.hashsalt": "fusellm", "font.family": "DejaVu Sans"}]):
        yield


def _save(figure: "Figure", path: Path) -> tuple[Path, ...]:
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(path.name + ending) for ending in (".png", ".svg"))
    _save_one(figure, png, dpi=150, metadata={"Software": None})
    _save_one(figure, svg, metadata={"Date": None, "Creator": None})
    return png, svg


def _save_one(figure: "Figure", path: Path, **options: Any) -> None:
    """Writes beside `path` and renames, so that there is never a part of a picture."""
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format=path.suffix[1:], **options)
    beside.replace(path)
