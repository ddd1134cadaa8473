"""The bootstrap over clusters within tasks, studentised: what intervals and tests of ratios and averages rest on.

A cluster is one example, or several that share a context and so do not vary independently. A resample draws the N
clusters of a task N times with replacement; tasks that share clusters are drawn together. What is looked at is not how
far a resample's value lies from the sample's but how far in its own standard errors; quantiles of that give intervals
with nearly their nominal coverage for skewed documents too, where plain percentiles are too narrow (Efron and
Tibshirani 1993, chapter 12; symmetric: Hall 1988, On symmetric bootstrap confidence intervals; clusters: Cameron,
Gelbach and Miller 2008, Bootstrap-based improvements for inference with clustered errors).

scipy.stats.bootstrap has neither this interval nor resamples that are shared by all cells of a task, without which
a table of a hundred thousand records takes a minute.
"""

import hashlib
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TypeVar

import numpy as np

RESAMPLES = 4_000
_FITTED = 0.1, 0.01  # the shares of resamples, most off, at whose ends the tail of p-values is fitted
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Ratio:
    """sum(top) / sum(bottom) over N clusters of one task: its value and squared standard error, unscaled."""

    task: str
    top: np.ndarray  # float64[N], sums over the examples of each cluster
    bottom: np.ndarray  # float64[N]
    clusters: tuple[str, ...] = ()  # N names, by which other tasks know the same clusters; empty if no task shares any

    @cached_property
    def value(self) -> float:
        """The ratio of the sums."""
        return float(self.top.sum() / self.bottom.sum())

    @cached_property
    def residuals(self) -> np.ndarray:
        """What each cluster adds to the deviation of the sum, float64[N]."""
        return self.top - self.value * self.bottom

    @property
    def size(self) -> int:
        """The number of clusters."""
        return len(self.top)

    @cached_property
    def unlike(self) -> int:
        """The number of clusters that score otherwise than most."""
        return self.size - int(np.unique(self.top / self.bottom, return_counts=True)[1].max())

    @cached_property
    def unequal(self) -> int:
        """The number of clusters whose top is not zero: of a contrast, those in which the methods differ."""
        return int(np.count_nonzero(self.top))

    @cached_property
    def variance(self) -> float:
        """The squared standard error, by linearisation."""
        return float(self.size / (self.size - 1) * (self.residuals**2).sum() / self.bottom.sum() ** 2)


@dataclass(frozen=True)
class SharedRatios:
    """The sum of the ratios of T tasks that share clusters, N in all: its squared standard error and resamples.

    A task may lack some of the clusters.
    """

    ratios: tuple[Ratio, ...]

    @cached_property
    def _clusters(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(sorted({name for ratio in self.ratios for name in ratio.clusters}))}

    def _by_cluster(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """One row a task, zero where the task lacks a cluster: float64[T, N]."""
        table = np.zeros((len(self.ratios), self.size))
        for ratio, values, into in zip(self.ratios, rows, table, strict=True):
            into[[self._clusters[name] for name in ratio.clusters]] = values
        return table

    @property
    def size(self) -> int:
        """The number of clusters."""
        return len(self._clusters)

    @cached_property
    def unlike(self) -> int:
        """The number of clusters that score otherwise than most."""
        scores = self._by_cluster([ratio.top / ratio.bottom for ratio in self.ratios])
        return self.size - int(np.unique(scores, axis=1, return_counts=True)[1].max())

    @cached_property
    def unequal(self) -> int:
        """The number of clusters whose top is not zero in some task: of a contrast, those in which methods differ."""
        return int(self._by_cluster([ratio.top for ratio in self.ratios]).any(axis=0).sum())

    @cached_property
    def variance(self) -> float:
        """The squared standard error, by linearisation: residuals of one cluster are added up over the tasks."""
        parts = self._by_cluster([ratio.residuals / ratio.bottom.sum() for ratio in self.ratios])
        return float(self.size / (self.size - 1) * (parts.sum(axis=0) ** 2).sum())

    @cached_property
    def resamples(self) -> "Resamples":
        """What RESAMPLES resamples of the clusters give for the sum."""
        tops = self._by_cluster([ratio.residuals for ratio in self.ratios])
        bottoms = self._by_cluster([ratio.bottom for ratio in self.ratios])
        name = "+".join(ratio.task for ratio in self.ratios)
        deviations, variances = zip(
            *(self._of_draws(draws, tops, bottoms) for draws in _draws(name, self.size)), strict=True
        )
        return Resamples(np.concatenate(deviations), np.concatenate(variances))

    def _of_draws(self, draws: np.ndarray, tops: np.ndarray, bottoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Deviation and squared standard error of each of the draws, float64[R, N]: both float64[R]."""
        # einsum, since the last digits of BLAS depend on the number of threads and so on the machine's load. A task of
        # whose clusters none is drawn says nothing in that resample.
        bottom = np.einsum("rn,tn->rt", draws, bottoms)
        share = np.divide(1.0, bottom, out=np.zeros_like(bottom), where=bottom > 0)
        deviation = np.einsum("rn,tn->rt", draws, tops) * share
        around = np.einsum("rt,tn->rn", share, tops) - np.einsum("rt,tn->rn", deviation * share, bottoms)
        variance = self.size / (self.size - 1) * np.einsum("rn,rn->r", draws, around**2)
        return deviation.sum(axis=1), variance


def strata(ratios: Sequence[Ratio]) -> list[Ratio | SharedRatios]:
    """The ratios, those of tasks that share clusters as one: what is resampled independently of the rest."""
    groups: list[tuple[list[Ratio], set[str]]] = []
    for ratio in ratios:
        names = set(ratio.clusters)
        joined = [group for group in groups if not names.isdisjoint(group[1])]
        groups = [group for group in groups if names.isdisjoint(group[1])]
        groups.append(([*(one for group, _ in joined for one in group), ratio], names.union(*(n for _, n in joined))))
    return [SharedRatios(tuple(group)) if len(group) > 1 else group[0] for group, _ in groups]


@dataclass(frozen=True)
class Resamples:
    """What RESAMPLES resamples give for a ratio, or for a sum of ratios."""

    deviation: np.ndarray  # float64[R]: value of the resample minus value of the sample
    variance: np.ndarray  # float64[R]: squared standard error within the resample


def resample(ratios: Mapping[K, Ratio]) -> dict[K, Resamples]:
    """Resamples of every ratio; those of many values see the same ones in one task and number of clusters.

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


def studentised(
    parts: Sequence[Ratio | SharedRatios], resamples: Sequence[Resamples], n_tasks: int
) -> tuple[float, np.ndarray]:
    """The standard error of the mean over `n_tasks` tasks, and by how many of its own each resample is off.

    parts: the strata of the tasks, each with its resamples. The second is absolute, float64[R]; it is empty where all
    clusters are alike, so that nothing can be told from them.
    """
    error = float(np.sqrt(sum(part.variance for part in parts)) / n_tasks)
    if error == 0:
        return 0.0, np.empty(0)
    deviation = np.abs(np.sum([one.deviation for one in resamples], axis=0)) / n_tasks
    own_error = np.sqrt(np.sum([one.variance for one in resamples], axis=0)) / n_tasks
    # A resample whose clusters are all alike (the few that differ were not drawn) knows no error of its own, but for
    # the square root of what rounding left of nothing.
    return error, deviation / np.where(own_error > 1e-4 * error, own_error, error)


def p_value(statistic: float, off: np.ndarray) -> float:
    """The probability of a difference of `statistic` standard errors or more where there is none.

    off: by how many standard errors each resample is off, float64[R], from `studentised`. Up to the 1 % that are most
    off it is a share of resamples. Beyond, where these are few, it is that of Student's t, scaled and with the degrees
    of freedom so that it agrees with the resamples at 10 % and at 1 %; so p has no least value, and stays near to what
    very many resamples would give.
    """
    from scipy.stats import t

    n = len(off)
    ranks = [max(round(share * n), 1) for share in _FITTED]
    wide, far = np.partition(off, [n - rank for rank in ranks])[[n - rank for rank in ranks]]
    if statistic <= far:
        return (1 + int((off >= statistic).sum())) / (n + 1)
    one_sided = tuple((rank + 1) / (n + 1) / 2 for rank in ranks)
    inverse_freedoms, ratios = _tails(*one_sided)
    inverse = np.interp(far / wide if wide else np.inf, ratios, inverse_freedoms)
    freedom = 1 / inverse if inverse else np.inf
    return float(2 * t.sf(statistic / far * t.isf(one_sided[1], freedom), freedom))


@cache
def _tails(wide: float, far: float) -> tuple[np.ndarray, np.ndarray]:
    """How many times as far off as its `wide` quantile (one-sided) is the `far` one of Student's t.

    The inverse degrees of freedom, from 0 to 1, and that ratio for each.
    """
    from scipy.stats import t

    inverse = np.linspace(0, 1, 1001)
    freedom = np.divide(1, inverse, out=np.full_like(inverse, np.inf), where=inverse > 0)
    return inverse, t.isf(far, freedom) / t.isf(wide, freedom)


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
