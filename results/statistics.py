"""Estimates from records: ratio of sums within a task, unweighted mean over tasks, intervals and paired tests.

Examples that share a context (records name it as their cluster) count as one for intervals and tests. An interval
speaks about other examples of the same kind for these very checkpoints; what another seed would give is the spread. So
does a test, unless five seeds or more let it speak about the method.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar, cast

import numpy as np
import pandas as pd
from scipy.special import ndtri

from results.bootstrap import (
    RESAMPLES,
    Ratio,
    Resamples,
    SharedRatios,
    p_value,
    strata,
    studentised,
)
from results.bootstrap import resample as resample_ratios
from results.errors import UserError
from results.layout import Part
from results.metrics import Metric, measure
from results.records import NO_SEED

MIN_UNITS = 20  # fewer clusters give no interval and no test
MIN_UNLIKE = 6  # of scores: if fewer differ from the rest, even all of them in one direction show nothing (sign test)
MIN_SEEDS = 5  # fewer say nothing about a method
CONFIDENCE = 0.95
K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Units:
    """One method's examples in one task, N of them in the order of their ids, under S seeds.

    With `against` it is a contrast: the method's numerators minus that method's, for the same examples.
    """

    method: str
    part: Part
    metric: Metric
    examples: tuple[str, ...]  # N ids
    seeds: tuple[int, ...]  # S; (-1,) for a method without seeds
    numerator: np.ndarray  # float64[S, N], such as nats
    denominator: np.ndarray  # float64[N], such as bytes
    weight: np.ndarray  # float64[N]
    clusters: tuple[str, ...] = ()  # N names; examples of one name, in any task, share a context. '' (or empty): none
    against: str | None = None
    resamples: Resamples | None = None  # None below MIN_UNITS

    @property
    def task(self) -> str:
        """The task that the examples are of."""
        return self.part.task

    def of_seeds(self, seeds: Sequence[int]) -> "Units":
        """The same examples under some of the seeds only."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return replace(self, seeds=tuple(seeds), numerator=self.numerator[rows], resamples=None)

    def by_seed(self) -> np.ndarray:
        """The metric under each seed, float64[S]: ratio of sums over the examples."""
        # Not BLAS, whose last digits depend on the number of threads and so on the machine's load.
        top = np.einsum("sn,n->s", self.numerator, self.weight)
        return self.metric.value(top, np.einsum("n,n->", self.denominator, self.weight))

    @cached_property
    def ratio(self) -> Ratio:
        """The mean over seeds, summed over the examples of each cluster, for the bootstrap."""
        top, bottom = self.weight * self.numerator.mean(axis=0), self.weight * self.denominator
        if not any(self.clusters):
            return Ratio(self.task, top, bottom)
        own = (f"{self.part.suite}/{self.task}/{example}" for example in self.examples)
        names, index = np.unique(
            [name or alone for name, alone in zip(self.clusters, own, strict=True)], return_inverse=True
        )
        return Ratio(self.task, np.bincount(index, top), np.bincount(index, bottom), tuple(map(str, names)))

    @property
    def n_clusters(self) -> int:
        """What counts as the number of independent examples."""
        return self.ratio.size

    @cached_property
    def right_or_wrong(self) -> bool:
        """Whether examples are independent, right or wrong, and count alike; in a contrast: won, lost or neither."""
        if self.metric.bounds is None or len(self.seeds) > 1 or (self.weight != self.weight[0]).any():
            return False
        if self.n_clusters < len(self.examples):
            return False
        return bool(np.isin(self.numerator, (-1, 0, 1) if self.against else (0, 1)).all())


@dataclass(frozen=True)
class Estimate:
    """A value, or a difference, over one task or the unweighted mean over several.

    interval is None below MIN_UNITS clusters in any of the tasks, and where fewer than MIN_UNLIKE of them score unlike
    the rest (in a difference: differ at all). spread is the standard deviation over seeds (None below two). n counts
    the examples of all tasks. p, of a difference only, is that of a paired test that it is zero; it is `general` where
    that counts seeds as well as examples.
    """

    value: float
    interval: tuple[float, float] | None
    n: int
    seeds: tuple[int, ...]
    spread: float | None
    p: float | None = None
    general: bool = False


def group(records: pd.DataFrame) -> dict[tuple[str, Part], Units]:
    """The examples of each method and part in records of one experiment, profile and training step.

    They are not resampled yet. Raises UserError where the records are of several of these, where seeds of a method
    have other examples, denominators or weights, and where a method comes both with and without a seed.
    """
    for name in ("experiment", "profile", "tokens"):
        several = records[name].drop_duplicates()
        if len(several) > 1:
            listed = ", ".join(sorted("the final one" if pd.isna(value) else str(value) for value in several))
            raise UserError(f"the records are of more than one {name} ({listed}); choose one of them")
    if records.empty:
        return {}
    ordered = records.sort_values("example", kind="stable")
    examples, clusters = (ordered[name].to_numpy(object) for name in ("example", "cluster"))
    numerators, denominators, weights = (
        ordered[name].to_numpy("float64") for name in ("numerator", "denominator", "weight")
    )
    rows = cast(
        "dict[tuple[str, str, str, str, int], np.ndarray]",
        ordered.groupby(["method", "suite", "task", "metric", "seed"]).indices,
    )
    by_seed: dict[tuple[str, Part], list[Units]] = {}
    for (method, suite, task, name, seed), index in sorted(rows.items()):
        part, metric = Part(suite, task, name), measure(name)
        top, bottom = metric.examples(numerators[index], denominators[index])
        ids, of_clusters = tuple(examples[index]), tuple(clusters[index])
        units = Units(method, part, metric, ids, (int(seed),), top[None], bottom, weights[index], of_clusters)
        by_seed.setdefault((method, part), []).append(units)
    return {key: _join_seeds(one_seed) for key, one_seed in by_seed.items()}


def _join_seeds(by_seed: Sequence[Units]) -> Units:
    first = by_seed[0]
    for other in by_seed[1:]:
        check_same_examples(first, other)
    seeds = tuple(seed_units.seeds[0] for seed_units in by_seed)
    if NO_SEED in seeds and len(seeds) > 1:
        raise UserError(f"{first.method} has records in {first.task} with a seed and without; remove the wrong ones")
    return replace(first, seeds=seeds, numerator=np.concatenate([seed_units.numerator for seed_units in by_seed]))


def check_same_examples(a: Units, b: Units) -> None:
    """Raises UserError, naming both, unless a and b were measured on the same examples with the same denominators."""
    names = [f"{units.method} (seed {_listed(units.seeds)})" for units in (a, b)]
    if a.examples != b.examples:
        apart = sorted(set(a.examples) ^ set(b.examples))
        raise UserError(
            f"{names[0]} and {names[1]} were not measured on the same examples of {a.task}: {len(a.examples)} and "
            f"{len(b.examples)}, {len(apart)} of them on one side only, such as {apart[0]!r}; evaluate both on the same"
        )
    if a.clusters != b.clusters:
        raise UserError(f"{names[0]} and {names[1]} disagree about what examples of {a.task} share; evaluate both anew")
    differ = np.flatnonzero((a.denominator != b.denominator) | (a.weight != b.weight))
    if differ.size:
        index = int(differ[0])
        raise UserError(
            f"{names[0]} and {names[1]} disagree about the data of {a.task}: example {a.examples[index]!r} has "
            f"denominator {a.denominator[index]:.17g} and {b.denominator[index]:.17g}, weight {a.weight[index]:.17g} "
            f"and {b.weight[index]:.17g}; evaluate both on the same"
        )


def contrast(a: Units, b: Units) -> Units:
    """Method a minus method b, paired: example by example and seed by seed.

    Where both have seeds only those in common count; a method without seeds is set against each of the other's.
    Raises UserError where the examples, denominators or weights differ, or no seed is in common.
    """
    check_same_examples(a, b)
    if NO_SEED not in a.seeds and NO_SEED not in b.seeds:
        seeds = sorted(set(a.seeds) & set(b.seeds))
        if not seeds:
            raise UserError(
                f"{a.method} (seeds {_listed(a.seeds)}) and {b.method} (seeds {_listed(b.seeds)}) have no seed in "
                f"common in {a.task}; run one of them with a seed of the other"
            )
        a, b = a.of_seeds(seeds), b.of_seeds(seeds)
    seeds_of = b if NO_SEED in a.seeds else a
    apart = a.numerator - b.numerator
    return replace(a, seeds=seeds_of.seeds, numerator=apart, against=b.method, resamples=None)


def resample(units: Mapping[K, Units]) -> dict[K, Units]:
    """The same units, those with enough clusters with their resamples."""
    drawn = resample_ratios({key: task.ratio for key, task in units.items() if task.n_clusters >= MIN_UNITS})
    return {key: replace(task, resamples=drawn.get(key)) for key, task in units.items()}


def estimate(tasks: Sequence[Units]) -> Estimate:
    """One method's value, or one contrast, over `tasks` (unweighted mean).

    The interval is Wilson's for right and wrong answers of one task, Bonett and Price's for their difference, else
    from the studentised bootstrap over clusters. A difference is tested by McNemar's test, else by the same bootstrap.
    Raises UserError where the seeds differ between tasks.
    """
    seeds = tasks[0].seeds
    for task in tasks:
        if task.seeds != seeds:
            raise UserError(
                f"{task.method} has seeds {_listed(seeds)} in {tasks[0].task} but {_listed(task.seeds)} in {task.task}"
                ", so no average can be given; run the missing seeds"
            )
    per_seed = np.mean([task.by_seed() for task in tasks], axis=0)
    value = float(per_seed.mean())
    spread = float(per_seed.std(ddof=1)) if len(seeds) > 1 else None
    n = sum(len(task.examples) for task in tasks)
    interval, p = _inferred(tasks, value)
    general = p is not None and interval is not None and len(seeds) >= MIN_SEEDS
    if general:
        p = _over_seeds(tasks, per_seed)
    return Estimate(value, interval, n, seeds, spread, p, general)


def holm(values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number, so that 5 % is the chance of any false alarm among them."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(values, method="holm")[1]] if values else []


def _inferred(tasks: Sequence[Units], value: float) -> tuple[tuple[float, float] | None, float | None]:
    """The interval, and the p-value of a contrast, over clusters."""
    if min(task.n_clusters for task in tasks) < MIN_UNITS:
        return None, None
    first = tasks[0]
    contrast = first.against is not None
    if len(tasks) == 1 and first.right_or_wrong:
        low, high, p = _paired_proportions(first) if contrast else _proportion(first)
    else:
        if any(task.resamples is None for task in tasks):
            return None, None
        parts = strata([task.ratio for task in tasks])
        if first.metric.bounds and sum(part.unequal if contrast else part.unlike for part in parts) < MIN_UNLIKE:
            return None, 1.0 if contrast else None
        low, high, p = _bootstrapped(tasks, parts, value)
    if first.metric.bounds:
        least, most = first.metric.bounds
        low, high = max(low, least - most if contrast else least), min(high, most)
    return (low, high), p if contrast else None


def _proportion(units: Units) -> tuple[float, float, None]:
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(units.numerator.sum(), len(units.examples), 1 - CONFIDENCE, method="wilson")
    return float(low) * units.metric.scale, float(high) * units.metric.scale, None


def _paired_proportions(units: Units) -> tuple[float, float, float]:
    """McNemar's test, and the interval of Bonett and Price (2012): Wald's with one more win and one more loss."""
    from statsmodels.stats.contingency_tables import mcnemar

    won, lost, n = int((units.numerator > 0).sum()), int((units.numerator < 0).sum()), len(units.examples) + 2
    middle = (won - lost) / n
    half = -float(ndtri((1 - CONFIDENCE) / 2)) * math.sqrt(((won + lost + 2) / n - middle**2) / n)
    p = float(mcnemar([[0, won], [lost, 0]], exact=won + lost < 25).pvalue)
    return (middle - half) * units.metric.scale, (middle + half) * units.metric.scale, p


def _bootstrapped(
    tasks: Sequence[Units], parts: Sequence[Ratio | SharedRatios], value: float
) -> tuple[float, float, float]:
    """The symmetric interval, and the p-value that agrees with it: below 5 % just where the interval leaves out 0.

    parts: the strata of the tasks.
    """
    error, off = studentised(parts, _resamples(tasks, parts), len(tasks))
    if not off.size:  # all clusters are alike: a sign test
        return value, value, 1.0 if value == 0 else 2.0 ** (1 - sum(part.size for part in parts))
    error *= tasks[0].metric.scale
    rank = int((1 - CONFIDENCE) * (RESAMPLES + 1))
    half = float(np.partition(off, RESAMPLES - rank)[RESAMPLES - rank]) * error
    return value - half, value + half, p_value(abs(value) / error, off)


def _resamples(tasks: Sequence[Units], parts: Sequence[Ratio | SharedRatios]) -> list[Resamples]:
    """Those of each of the strata `parts` of the tasks, all of which have enough clusters."""
    own = {id(task.ratio): task.resamples for task in tasks}
    drawn = [part.resamples if isinstance(part, SharedRatios) else own[id(part)] for part in parts]
    return [one for one in drawn if one is not None]


def resampled_values(tasks: Sequence[Units]) -> np.ndarray | None:
    """The mean over `tasks` in each resample of their clusters, float64[R]; None where a task has too few clusters.

    Methods and training steps measured on the same text see the same resamples.
    """
    if any(task.resamples is None for task in tasks):
        return None
    value = float(np.mean([task.by_seed() for task in tasks]))
    drawn = _resamples(tasks, strata([task.ratio for task in tasks]))
    deviation = np.sum([one.deviation for one in drawn], axis=0) / len(tasks)
    return np.asarray(value + tasks[0].metric.scale * deviation)


def _over_seeds(tasks: Sequence[Units], per_seed: np.ndarray) -> float:
    """The p-value of a mean difference whose variance is that over examples plus that over seeds.

    Welch's t with the two as its samples: the sum of two squared standard errors, and degrees of freedom to match. It
    must hold over the seeds alone, too: where they happen to lie close together Welch's is a little too sure.
    """
    from scipy.stats import ttest_1samp, ttest_ind_from_stats

    metric, n = tasks[0].metric, min(task.n_clusters for task in tasks)
    parts = strata([task.ratio for task in tasks])
    error = float(np.sqrt(sum(part.variance for part in parts)) / len(tasks)) * metric.scale
    value, over_seeds = float(per_seed.mean()), float(per_seed.std(ddof=1))
    if error == over_seeds == 0:
        return 1.0
    both = ttest_ind_from_stats(value, error * np.sqrt(n), n, 0.0, over_seeds, len(per_seed), equal_var=False)
    alone = ttest_1samp(per_seed, 0.0).pvalue if over_seeds else 0.0
    return float(max(both.pvalue, alone))


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join("none" if seed == NO_SEED else str(seed) for seed in seeds)
