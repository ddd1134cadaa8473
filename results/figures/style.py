"""What all figures share: colours that colour-blind eyes tell apart, hatches and lines for black and white, files.

PNG and SVG have the same bytes every time.
"""

import textwrap
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The set of Okabe and Ito; every series has its own marker, line style or hatch besides.
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")


def bar_style(number: int) -> dict[str, Any]:
    """Colour and hatch of the series with this number."""
    number %= len(COLOURS)
    return {
        "color": COLOURS[number] if number else "0.45",
        "hatch": HATCHES[number],
        "edgecolor": "white",
        "linewidth": 0.5,
    }


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and line of the series with this number."""
    n = len(COLOURS)
    style = {
        "color": COLOURS[number % n],
        "marker": MARKERS[number % n],
        "linestyle": LINES[(number + number // n) % n],
    }
    return {**style, "markersize": 5, "linewidth": 1.6}


def bars(axes: "Axes", groups: Sequence[str], series: Mapping[str, Sequence[float]], label: str, first: int) -> None:
    """Grouped bars, in the styles from number `first`; missing values (NaN) are marked n/a."""
    width = 0.8 / len(series)
    for k, (name, values) in enumerate(series.items()):
        x = np.arange(len(groups)) + (k - (len(series) - 1) / 2) * width
        axes.bar(x, values, width, label=name, **bar_style(first + k))
        for place, value in zip(x, values, strict=True):
            if np.isnan(value):
                axes.text(place, 0.01, "n/a", transform=axes.get_xaxis_transform(), ha="center", fontsize=6)
    name_groups(axes, groups, label)


def stacked(axes: "Axes", groups: Sequence[str], series: Mapping[str, Sequence[float]], label: str) -> None:
    """One bar a group, its series on top of one another; missing values (NaN) count nothing."""
    bottom = np.zeros(len(groups))
    for k, (name, values) in enumerate(series.items()):
        height = np.nan_to_num(np.asarray(values, dtype=float))
        axes.bar(np.arange(len(groups)), height, 0.7, bottom=bottom, label=name, **bar_style(k))
        bottom = bottom + height
    name_groups(axes, groups, label)


def name_groups(axes: "Axes", groups: Sequence[str], label: str) -> None:
    """Writes the names of groups of bars below them and `label` beside the vertical axis."""
    axes.set_xticks(np.arange(len(groups)), groups, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def entitle(figure: "Figure", title: str, banner: str) -> None:
    """Writes the banner and the title above the figure, in lines that fit its width."""
    text = ": ".join(part for part in (banner.upper(), title) if part)
    if text:
        # About 11 characters an inch at this size.
        figure.suptitle(textwrap.fill(text, int(11 * figure.get_figwidth())), fontsize=11)


def new(size: tuple[float, float]) -> "Figure":
    """An empty figure of `size` inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no window, no global list of figures.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


@contextmanager
def style() -> Iterator[None]:
    """matplotlib's own defaults, whatever the user's settings, and nothing in a file that changes from run to run."""
    import matplotlib.style

    with matplotlib.style.context(["default", {"svg.hashsalt": "fusellm", "font.family": "DejaVu Sans"}]):
        yield


def save(figure: "Figure", path: Path) -> tuple[Path, ...]:
    """`path`.png and `path`.svg, each complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (path.with_name(path.name + ending) for ending in (".png", ".svg"))
    _write(figure, png, dpi=150, metadata={"Software": None})
    _write(figure, svg, metadata={"Date": None, "Creator": None})
    return png, svg


def _write(figure: "Figure", path: Path, **options: Any) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    figure.savefig(temporary, format=path.suffix[1:], **options)
    temporary.replace(path)
