"""Figures of an audit: what there is to learn from each source, which source is chosen where, and coverage."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from results.errors import UserError
from results.figures import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


FUSED = "fused"  # the audit's row of the fused distribution that the target is trained on


def selection_figure(
    measures: pd.DataFrame, path: Path | str, *, title: str = "", banner: str = ""
) -> tuple[Path, ...]:
    """Draw which source was selected where: by domain, the share of passages each is chosen for, adding up to one.

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
    indexed = measures.set_index(["source", "domain"])
    by_measure = {
        name: {source: [float(indexed[name].get((source, domain), np.nan)) for domain in domains] for source in sources}
        for name in names
    }
    return domains, by_measure
