"""Figures of an audit: what sources know more than the target and every step leaves of it, which source is selected
where, and coverage.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd

from results.errors import UserError
from results.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

_MODELS = ("target", "source")  # kinds of rows that stand for a model
_STAGES = {
    "native": "ahead of the target, natively",
    "aligned": "without a partner",
    "projected": "map and projection",
    "kept": "top k and tail",
    "selected": "selection",
    "in_loss": "between partners",
}
_LEFT = "left: what reaches the loss"
_AHEAD = "bits per byte ahead of the target"
_BETTER = "higher is better"
_SHARES = {"chosen": "share of passages it is chosen for", "paired": "share of positions paired"}


def audit_figure(measures: pd.DataFrame, path: Path | str, *, title: str = "", banner: str = "") -> tuple[Path, ...]:
    """Draw `path`.png and `path`.svg: waterfalls by domain, in bits per byte of the domain's text.

    The first panel is of the best model of each passage, the following ones are of one source each. The first bar of a
    domain is what is known more than the target knows, each further one goes from what was left before a step to what
    is left after it, and the last is what reaches the loss. The last panel has by how much each row of the experiment
    is ahead of the target on the suite's text.

    measures has one row a model and domain and the columns source, kind (target, source, fused; row for a row of the
    experiment), domain; native, aligned, projected, kept, selected and in_loss, the bits per byte that are left; chosen
    and paired, shares; ahead_of_target; and, where it is known, precision, what the model computes in. Missing values
    (NaN) are marked n/a. Raises UserError for a missing column, an empty frame, and a model that has a domain twice.
    """
    domains, by_source = _by_source(measures, [*_STAGES, *_SHARES, "ahead_of_target"])
    kinds = dict(zip(measures["source"], measures["kind"], strict=True))
    panels = {source: f"{source}: the best model of each passage" for source in kinds if kinds[source] == "fused"}
    panels |= {source: source for source in kinds if kinds[source] == "source"}
    rows = [source for source in kinds if kinds[source] == "row"]
    n_panels = len(panels) + bool(rows)
    with style.style():
        figure = style.new((4.0 + 1.6 * max(len(domains), 4), 0.8 + 2.8 * n_panels))
        grid = figure.add_gridspec(n_panels, 1)
        for number, (source, caption) in enumerate(panels.items()):
            axes = figure.add_subplot(grid[number])
            label = _label(_AHEAD, measures[measures["source"] == source], _BETTER)
            _steps(axes, domains, {stage: by_source[stage][source] for stage in _STAGES}, label)
            axes.set_title(caption, fontsize=9)
            if number == 0:
                figure.legend(loc="outside lower center", ncols=4, fontsize=8)
        if rows:
            axes = figure.add_subplot(grid[len(panels)])
            learnt = {row: by_source["ahead_of_target"][row] for row in rows}
            style.bars(axes, domains, learnt, _label(_AHEAD, measures[measures["kind"] == "row"], _BETTER), first=0)
            axes.set_title("learnt by the rows, on the suite's text", fontsize=9)
            axes.legend(fontsize=8)
            _number(axes)
        style.entitle(figure, title, banner)
        return style.save(figure, Path(path))


def _label(what: str, measures: pd.DataFrame, *about: str) -> str:
    """What an axis shows, with what is said about it and the precision that it was computed in."""
    precisions = sorted(set(measures["precision"])) if "precision" in measures.columns else []
    about = (*about, " and ".join(precisions)) if precisions else about
    return f"{what} ({', '.join(about)})" if about else what


def _steps(axes: "Axes", domains: Sequence[str], left: dict[str, list[float]], ylabel: str) -> None:
    """Bars that add up: each begins where the one before it ends, the first and the last at zero."""
    values = np.array([left[stage] for stage in _STAGES])
    known = ~np.isnan(values[0])  # rows of the experiment have domains of other text
    values, domains = values[:, known], [domain for domain, shown in zip(domains, known, strict=True) if shown]
    bottoms = np.vstack([np.zeros(len(domains)), values[:-1], np.zeros(len(domains))])
    tops = np.vstack([values, values[-1]])
    width = 0.9 / len(tops)
    for k, label in enumerate([*_STAGES.values(), _LEFT]):
        x = np.arange(len(domains)) + (k - (len(tops) - 1) / 2) * width
        axes.bar(x, tops[k] - bottoms[k], width, bottom=bottoms[k], label=label, **style.bar_style(k))
        for place, height in zip(x, tops[k] - bottoms[k], strict=True):
            if np.isnan(height):
                axes.text(place, 0.01, "n/a", transform=axes.get_xaxis_transform(), ha="center", fontsize=6)
    style.name_groups(axes, domains, ylabel)
    _number(axes)


def _number(axes: "Axes") -> None:
    """Writes the heights of bars that can be seen at their ends, upright so that they stand clear of one another."""
    for bars in cast("list[BarContainer]", axes.containers):
        axes.bar_label(
            bars, fmt=lambda height: f"{height:+.3f}" if abs(height) >= 5e-4 else "", fontsize=6, padding=2, rotation=90
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.use_sticky_edges = False
    axes.margins(y=0.3)


def selection_figure(
    measures: pd.DataFrame, path: Path | str, *, title: str = "", banner: str = ""
) -> tuple[Path, ...]:
    """Draw which source was selected where: by domain, the share of passages each is chosen for, adding up to one.

    measures: the columns source, kind, domain and chosen of the audit's (see `audit_figure`, also for what is raised).
    """
    domains, by_source = _by_source(_models(measures), ["chosen"])
    with style.style():
        figure, axes = _domain_axes(len(domains))
        style.stacked(axes, domains, by_source["chosen"], _label(_SHARES["chosen"], _models(measures)))
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        style.entitle(figure, title, banner)
        return style.save(figure, Path(path))


def coverage_figure(measures: pd.DataFrame, path: Path | str, *, title: str = "", banner: str = "") -> tuple[Path, ...]:
    """Draw how much of the target's text each source's alignment covers: the share of positions paired, by domain.

    measures: the columns source, kind, domain and paired of the audit's (see `audit_figure`, also for what is raised).
    """
    domains, by_source = _by_source(_models(measures), ["paired"])
    with style.style():
        figure, axes = _domain_axes(len(domains))
        style.bars(axes, domains, by_source["paired"], _SHARES["paired"], first=0)
        axes.set_ylim(0, 1)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        style.entitle(figure, title, banner)
        return style.save(figure, Path(path))


def _models(measures: pd.DataFrame) -> pd.DataFrame:
    """The rows of the target and the sources."""
    return measures[measures["kind"].isin(_MODELS)] if "kind" in measures.columns else measures


def _domain_axes(domains: int) -> "tuple[Figure, Axes]":
    figure = style.new((2.5 + 0.9 * max(domains, 4), 3.8))
    return figure, figure.add_subplot()


def _by_source(measures: pd.DataFrame, names: Sequence[str]) -> tuple[list[str], dict[str, dict[str, list[float]]]]:
    """The domains, and of each measure in `names` by source one value a domain, in the order of the rows."""
    absent = [name for name in ["source", "kind", "domain", *names] if name not in measures.columns]
    if absent:
        raise UserError(f"the audit's measures lack the columns {', '.join(absent)}; make the audit again")
    if measures.empty:
        raise UserError("the audit has no measures to draw; run it with at least one source and domain")
    if measures.duplicated(["source", "domain"]).any():
        raise UserError("the audit measures one source twice in one domain; make the audit again")
    sources, domains = list(dict.fromkeys(measures["source"])), list(dict.fromkeys(measures["domain"]))
    indexed = measures.set_index(["source", "domain"])[list(names)].astype(float)
    by_measure = {
        name: {source: [float(indexed[name].get((source, domain), np.nan)) for domain in domains] for source in sources}
        for name in names
    }
    return domains, by_measure
