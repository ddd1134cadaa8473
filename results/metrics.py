"""What a metric's stored numerator and denominator mean: the one place that turns them into the printed value."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from results.errors import UnknownName, UserError
from results.layout import Cell, Column

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


LOST_BYTES = "lost_bytes"
"""Metric of records that say how many bytes of an example its tokens do not spell, and how many there are."""


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over examples, sum(numerator) / sum(denominator), times a constant `scale`.

    A score (`bounds` given) is first made one number an example, from 0 to 1, and every example counts alike. With `k`
    that number is the unbiased estimate of pass@k from numerator passing samples of denominator (Chen et al. 2021).
    """

    name: str
    label: str  # with its unit
    higher_is_better: bool
    scale: float
    digits: int
    unit: str  # what one example is called
    stored: str = "points / points"  # units of the stored numerator and denominator
    bounds: tuple[float, float] | None = None  # of the printed value
    k: int | None = None

    def examples(self, numerator: "np.ndarray", denominator: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
        """What is summed over examples, from what is stored of them; all of one shape.

        Raises UserError for a score outside 0 to 1, and for fewer than k samples.
        """
        import numpy as np

        if self.bounds is None:
            return numerator, denominator
        if ((numerator < 0) | (numerator > denominator)).any():
            raise UserError(f"{self.name} has a score outside 0 to 1 for one {self.unit}; evaluate it again")
        if self.k is None:
            return numerator / denominator, np.ones_like(denominator)
        if (denominator < self.k).any():
            raise UserError(
                f"{self.label} needs {self.k} samples per {self.unit}, but one has {denominator.min():g}; draw more "
                "samples or ask for a smaller k"
            )
        return pass_at_k(denominator, numerator, self.k), np.ones_like(denominator)

    def value(self, numerator: "np.ndarray", denominator: "np.ndarray") -> "np.ndarray":
        """The metric's values from sums of numerators and denominators of one shape."""
        return numerator / denominator * self.scale

    def at(self, k: int) -> "Metric":
        """The same metric at another k; itself where it has none."""
        return self if self.k is None else replace(self, label=self.label.replace(f"@{self.k}", f"@{k}"), k=k)


def pass_at_k(samples: "np.ndarray", passing: "np.ndarray", k: int) -> "np.ndarray":
    """The unbiased estimate of the chance that one of k samples passes, elementwise.

    samples, passing: of a problem, of one shape; none of `samples` is below k. (Chen et al. 2021, arXiv 2107.03374,
    equation 1: 1 - C(n - c, k) / C(n, k).)
    """
    from scipy.special import comb

    estimate: np.ndarray = 1 - comb(samples - passing, k) / comb(samples, k)
    return estimate


def _score(name: str, label: str, unit: str = "example", k: int | None = None) -> Metric:
    stored = "points / points" if k is None else "passing samples / samples"
    return Metric(name, label, True, 100.0, 2, unit, stored, (0.0, 100.0), k)


# Nats over bytes, so nats per byte / ln 2. The two differ in how much text before a token the model sees: as lm-eval's
# rolling likelihood has it, or strided (at least half a window); they are never pooled, so each has its own name.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("bits_per_byte", "bits per byte", False, 1 / math.log(2), 4, "document", "nats / bytes"),
        Metric(
            "bits_per_byte_strided", "bits per byte (strided)", False, 1 / math.log(2), 4, "document", "nats / bytes"
        ),
        Metric(
            LOST_BYTES, "bytes of text that tokens do not spell, percent", False, 100.0, 2, "document", "bytes / bytes"
        ),
        _score("acc", "accuracy, percent"),
        _score("acc_norm", "accuracy by length-normalised likelihood, percent"),
        _score("exact_match", "exact match, percent"),
        _score("em", "exact match, percent"),
        _score("f1", "F1, percent"),
        _score("passed", "pass@1, percent", "problem", k=1),
        _score("passed_exit", "pass@1 by exit status, percent", "problem", k=1),
    )
}


def metric_of(name: str) -> Metric:
    """The metric called `name`; raises UserError naming the nearest spelling and what is registered."""
    if name not in METRICS:
        raise UnknownName("metric", name, METRICS)
    return METRICS[name]


def measure(name: str) -> Metric:
    """The metric that records call `name`.

    `NAME@K` is a registered metric at another k. `NAME:higher` and `NAME:lower` are means of arbitrary numbers of which
    higher or lower ones are better. Any other name that is not registered is a score from 0 to 1.
    """
    base, _, k = name.partition("@")
    if k.isdecimal() and base in METRICS:
        return METRICS[base].at(int(k))
    base, _, direction = name.partition(",")[0].partition(":")
    if direction in ("higher", "lower"):
        label = name.replace(f":{direction}", "", 1)
        return Metric(name, f"{label}, {direction} is better", direction == "higher", 1.0, 4, "example", "value / 1")
    return METRICS.get(name) or _score(name, f"{name}, percent")


def comparable(metrics: Mapping[str, str]) -> list[dict[str, str]]:
    """The metric of each task, in groups that one table can show: one direction, one scale, one kind of number."""
    groups: dict[tuple[bool, float, bool], dict[str, str]] = {}
    for task, name in metrics.items():
        metric = measure(name)
        groups.setdefault((metric.higher_is_better, metric.scale, metric.bounds is None), {})[task] = name
    return list(groups.values())


def values_of(metrics: Sequence[Metric]) -> str:
    """What the values of a table are, with their unit."""
    labels = (metric.label.removesuffix(", higher is better").removesuffix(", lower is better") for metric in metrics)
    return " or ".join(dict.fromkeys(labels))


def mark_lost_text(
    cells: "dict[tuple[str, int], Cell]", columns: Sequence[Column], records: "pd.DataFrame", reference: str | None
) -> None:
    """Marks the cells (by method and column) of methods whose tokens do not spell the text that they were measured on.

    Text that is lost costs nothing, so that such a value has no interval, and it is compared only where the reference
    has lost the same bytes of the same examples.
    """
    lost: dict[tuple[str, str, str], dict[str, tuple[float, float]]] = {}
    names = ["method", "suite", "task", "example", "numerator", "denominator"]
    rows = records.loc[records["metric"] == LOST_BYTES, names]
    for method, suite, task, example, n_lost, n_bytes in rows.itertuples(index=False):
        lost.setdefault((method, suite, task), {})[example] = n_lost, n_bytes

    def of(method: str | None, column: Column) -> dict[tuple[str, str], tuple[float, float]]:
        examples = {part.task: lost.get((str(method), part.suite, part.task), {}) for part in column.parts}
        return {(task, name): counts for task, some in examples.items() for name, counts in some.items()}

    for (method, j), cell in cells.items() if lost else ():
        own = of(method, columns[j])
        if own and cell.value is not None:
            n_lost, n_bytes = (sum(counts) for counts in zip(*own.values(), strict=True))
            note = (
                f"the tokens of {method} do not spell the text of {len(own):,} of {cell.n:,} "
                f"{measure(columns[j].parts[0].metric).unit}s ({n_lost:,.0f} of their {n_bytes:,.0f} bytes), so that "
                "this is no measure of it"
            )
            cell = replace(cell, interval=None, note=note, lossy=True)
        if cell.difference is not None and own != of(reference, columns[j]):
            why = "not compared: one of the two does not spell all of the text"
            cell = replace(
                cell, difference=None, difference_interval=None, difference_seeds=(), difference_note=why, p=None
            )
        cells[method, j] = cell
