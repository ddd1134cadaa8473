"""Units of resampling made of records or arrays, and estimates from them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from results import statistics
from results.layout import Part
from results.metrics import METRICS
from results.records import COLUMNS, Record
from results.statistics import Estimate, Units


def text(task: str) -> Part:
    return Part("perplexity", task, "bits_per_byte")


def value(found: dict[tuple[str, Part], Units], method: str, *tasks: str) -> Estimate:
    """The estimate of one method over domains of text."""
    resampled = statistics.resample(found)
    return statistics.estimate([resampled[method, text(task)] for task in tasks])


def compared(found: dict[tuple[str, Part], Units], a: str, b: str, *tasks: str) -> Estimate:
    """The estimate of method a minus method b over domains of text."""
    apart = {task: statistics.contrast(found[a, text(task)], found[b, text(task)]) for task in tasks}
    return statistics.estimate(list(statistics.resample(apart).values()))


def frame(records: Sequence[Record]) -> pd.DataFrame:
    rows = [[getattr(one, name) for name in COLUMNS] for one in records]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"tokens": "Int64"})


def units(nats: np.ndarray, size: np.ndarray, task: str = "code", method: str = "CLM") -> Units:
    nats = np.atleast_2d(nats)
    seeds = tuple(range(len(nats)))
    ids = tuple(f"{i:04}" for i in range(len(size)))
    made = Units(method, text(task), METRICS["bits_per_byte"], ids, seeds, nats, size, np.ones(len(size)))
    return statistics.resample({0: made})[0]
