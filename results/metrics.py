"""What a metric's stored numerator and denominator mean: the one place that turns them into the printed value."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from results.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Metric:
    """A ratio of sums over examples, sum(numerator) / sum(denominator), times a constant `scale`."""

    name: str
    label: str
    higher_is_better: bool
    scale: float
    digits: int
    unit: str  # what one example is called

    def value(self, numerator: "np.ndarray", denominator: "np.ndarray") -> "np.ndarray":
        """The metric's values from sums of numerators and denominators of one shape."""
        return numerator / denominator * self.scale


# Nats over bytes, so nats per byte / ln 2. The two differ in how much text before a token the model sees: as lm-eval's
# rolling likelihood has it, or strided (at least half a window); they are never pooled, so each has its own name.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("bits_per_byte", "bits per byte", False, 1 / math.log(2), 4, "document"),
        Metric("bits_per_byte_strided", "bits per byte (strided)", False, 1 / math.log(2), 4, "document"),
    )
}


def metric_of(name: str) -> Metric:
    """The metric called `name`; raises UserError naming the nearest spelling and what is registered."""
    if name not in METRICS:
        raise UserError(unknown("metric", name, METRICS))
    return METRICS[name]


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a wrong `name`: the nearest spelling and what there is (`known`: an iterable of names)."""
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]!r}? " if nearest else ""
    return f"unknown {kind} {name!r}; {hint}there are: {', '.join(names) or 'none'}"
