"""The bootstrap over examples within tasks, studentised: what intervals and tests of ratios and averages rest on.

A resample draws the N examples of a task N times with replacement. What is looked at is not how far its value lies
from the sample's but how far in its own standard errors; quantiles of that give intervals that keep their promise for
skewed documents too, where plain percentiles are too narrow (Efron and Tibshirani 1993, chapter 12; symmetric: Hall
1988, On symmetric bootstrap confidence intervals).

scipy.stats.bootstrap has neither this interval nor resamples that are shared by all cells of a task, without which
a table of a hundred thousand records takes a minute.
"""

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np

RESAMPLES = 4_000
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Ratio:
    """sum(top) / sum(bottom) over N examples of one task: its value and squared standard error, unscaled."""

    task: str
    top: np.ndarray  # float64[N]
    bottom: np.ndarray  # float64[N]

    @cached_property
    def value(self) -> float:
        return float(self.top.sum() / self.bottom.sum())

    @cached_property
    def residuals(self) -> np.ndarray:
        """What each example adds to the deviation of the sum, float64[N]."""
        return self.top - self.value * self.bottom

    @cached_property
    def unlike(self) -> int:
        """Examples that deviate otherwise than most."""
        return len(self.top) - int(np.unique(self.residuals, return_counts=True)[1].max())

    @cached_property
    def variance(self) -> float:
        """The squared standard error, by linearisation."""
        n = len(self.top)
        return float(n / (n - 1) * (self.residuals**2).sum() / self.bottom.sum() ** 2)


@dataclass(frozen=True)
class Resamples:
    """What RESAMPLES resamples give for one `Ratio`."""

    deviation: np.ndarray  # float64[R]: value of the resample minus value of the sample
    variance: np.ndarray  # float64[R]: squared standard error within the resample


def resample(ratios: Mapping[K, Ratio]) -> dict[K, Resamples]:
    """Resamples of every ratio; those of many values see the same ones in one task and number of examples.

    What a ratio gets depends on itself alone, not on the others, nor on the machine.
    """
    resamples: dict[K, Resamples] = {}
    together: dict[tuple[str, int], dict[K, Ratio]] = {}
    for key, ratio in ratios.items():
        n = len(ratio.top)
        residual, counts = np.unique(ratio.residuals, return_counts=True)
        if 75 * len(residual) >= n or (ratio.bottom != ratio.bottom[0]).any():
            together.setdefault((ratio.task, n), {})[key] = ratio
            continue
        # Where scores have few values, how often each is drawn is multinomial, which costs nothing per example, and
        # least with the most frequent first; with more values it costs more than draws that all methods share.
        order = np.argsort(-counts, kind="stable")
        draws = _generator(ratio.task).multinomial(n, counts[order] / n, RESAMPLES).astype(np.float64)
        residual, bottom = residual[order], ratio.bottom[: len(order)]
        resamples[key] = _resamples(_sums(draws, _tops(residual, bottom)), _sums(draws, _bottoms(bottom)), n)
    for (task, n), alike in together.items():
        # Of methods measured on the same data the denominators are the same.
        bottoms = list({ratio.bottom.tobytes(): ratio.bottom for ratio in alike.values()}.values())
        tops = [_tops(ratio.residuals, ratio.bottom) for ratio in alike.values()]
        columns = np.concatenate([*tops, *map(_bottoms, bottoms)], axis=1)
        sums = np.concatenate([_sums(draws, columns) for draws in _draws(task, n)])
        column_of = {bottom.tobytes(): 3 * len(alike) + 2 * i for i, bottom in enumerate(bottoms)}
        for i, (key, ratio) in enumerate(alike.items()):
            column = column_of[ratio.bottom.tobytes()]
            resamples[key] = _resamples(sums[:, 3 * i : 3 * i + 3], sums[:, column : column + 2], n)
    return resamples


def studentised(ratios: Sequence[Ratio], resamples: Sequence[Resamples]) -> tuple[float, np.ndarray]:
    """The standard error of the unweighted mean of `ratios`, and by how many of its own each resample is off.

    The second is absolute, float64[R]; it is empty where all examples are alike, so that nothing can be told from them.
    """
    error = float(np.sqrt(sum(ratio.variance for ratio in ratios)) / len(ratios))
    if error == 0:
        return 0.0, np.empty(0)
    deviation = np.abs(np.mean([task.deviation for task in resamples], axis=0))
    own_error = np.sqrt(np.sum([task.variance for task in resamples], axis=0)) / len(ratios)
    # A resample whose examples are all alike (the few that differ were not drawn) knows no error of its own, but for
    # the square root of what rounding left of nothing.
    return error, deviation / np.where(own_error > 1e-4 * error, own_error, error)


def _tops(residual: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.stack([residual, residual**2, residual * bottom], axis=1)


def _bottoms(bottom: np.ndarray) -> np.ndarray:
    return np.stack([bottom, bottom**2], axis=1)


def _resamples(tops: np.ndarray, bottoms: np.ndarray, n: int) -> Resamples:
    """From the sums of `_tops`, float64[R, 3], and `_bottoms`, float64[R, 2], over each resample."""
    residual, squared, mixed = tops.T
    bottom, bottom_squared = bottoms.T
    deviation = residual / bottom
    around = squared - 2 * deviation * mixed + deviation**2 * bottom_squared  # squared residuals of the resample
    return Resamples(deviation, n / (n - 1) * np.maximum(around, 0) / bottom**2)


def _sums(draws: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """draws[r, n] @ columns[n, c], the same to the last digit whatever order it is summed in: float64[r, c].

    Otherwise the number of threads, and which other columns there are, would show in a table's bytes.
    """
    # Whole numbers below 2^52 add up exactly; a row of draws sums to the number of examples.
    largest = np.abs(columns).max(axis=0) * draws[0].sum()
    scale = np.ldexp(1.0, 52 - np.frexp(largest)[1])
    return (draws @ np.rint(columns * scale)) / scale


def _draws(task: str, n: int) -> Iterator[np.ndarray]:
    """How often each of n examples is drawn in each of RESAMPLES resamples, some at a time: float64[r, n].

    Memory is bounded however many examples there are.
    """
    generator = _generator(task)
    step = max(1, 1_000_000 // n)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        flat = generator.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(flat.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _generator(task: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big"))
