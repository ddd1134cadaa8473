"""Estimates and intervals from records: ratio of sums within a task, unweighted mean over tasks, bootstrap over examples.

An interval speaks about other examples of the same kind for these very checkpoints; what another seed would give is
the spread.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy import stats

from results.errors import UserError
from results.metrics import Metric, metric_of
from results.records import NO_SEED

MIN_UNITS = 20  # fewer examples give no interval
RESAMPLES = 4_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Units:
    """One method's examples in one task, N of them in the order of their ids, under S seeds."""

    method: str
    task: str
    metric: Metric
    examples: tuple[str, ...]  # N ids
    seeds: tuple[int, ...]  # S; (-1,) for a method without seeds
    numerator: np.ndarray  # float64[S, N], such as nats
    denominator: np.ndarray  # float64[N], such as bytes
    weight: np.ndarray  # float64[N]

    def of_seeds(self, seeds: Sequence[int]) -> "Units":
        """The same examples under some of the seeds only."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Units(
            self.method, self.task, self.metric, self.examples, tuple(seeds),
            self.numerator[rows], self.denominator, self.weight,
        )  # fmt: skip

    def by_seed(self) -> np.ndarray:
        """The metric under each seed, float64[S]: ratio of sums over the examples."""
        return self.metric.value(self.numerator @ self.weight, self.denominator @ self.weight)

    def replicates(self, draws: np.ndarray) -> np.ndarray:
        """The metric of resampled examples, float64[R], by how often each was drawn, float64[R, N]; averaged over seeds."""
        top = draws @ (self.weight * self.numerator.mean(axis=0))
        return self.metric.value(top, draws @ (self.weight * self.denominator))


@dataclass(frozen=True)
class Estimate:
    """A value over one task or the unweighted mean over several.

    interval is None below MIN_UNITS examples in any of the tasks. spread is the standard deviation over seeds (None
    below two). n counts the examples of all tasks.
    """

    value: float
    interval: tuple[float, float] | None
    n: int
    seeds: tuple[int, ...]
    spread: float | None


def group(records: pd.DataFrame) -> dict[tuple[str, str], Units]:
    """The examples of each (method, task) in records of one experiment, profile, suite, metric and training step.

    Raises UserError where the records are of several of these, where seeds of a method have other examples,
    denominators or weights, and where a method comes both with and without a seed.
    """
    for name in ("experiment", "profile", "suite", "metric", "tokens"):
        several = records[name].drop_duplicates()
        if len(several) > 1:
            listed = ", ".join(sorted("the final one" if pd.isna(one) else str(one) for one in several))
            raise UserError(f"the records are of more than one {name} ({listed}); choose one of them")
    if records.empty:
        return {}
    metric = metric_of(str(records["metric"].iloc[0]))
    groups = records.groupby(["method", "task"], sort=True, observed=True)
    return {(str(method), str(task)): _units(str(method), str(task), metric, part) for (method, task), part in groups}


def _units(method: str, task: str, metric: Metric, part: pd.DataFrame) -> Units:
    one_seed = []
    for seed, rows in part.groupby("seed", sort=True):
        ordered = rows.sort_values("example")
        one_seed.append(
            Units(
                method,
                task,
                metric,
                tuple(ordered["example"]),
                (int(str(seed)),),
                ordered["numerator"].to_numpy("float64")[None],
                ordered["denominator"].to_numpy("float64"),
                ordered["weight"].to_numpy("float64"),
            )  # fmt: skip
        )
    first = one_seed[0]
    for other in one_seed[1:]:
        check_same_examples(first, other)
    seeds = tuple(one.seeds[0] for one in one_seed)
    if NO_SEED in seeds and len(seeds) > 1:
        raise UserError(f"{method} has records in {task} both with a seed and without; remove the wrong ones")
    numerator = np.concatenate([one.numerator for one in one_seed])
    return Units(method, task, metric, first.examples, seeds, numerator, first.denominator, first.weight)


def check_same_examples(a: Units, b: Units) -> None:
    """Raises UserError, naming both, unless a and b were measured on the same examples with the same denominators."""
    names = [f"{one.method} (seed {', '.join(map(str, one.seeds))})" for one in (a, b)]
    if a.examples != b.examples:
        apart = sorted(set(a.examples) ^ set(b.examples))
        raise UserError(
            f"{names[0]} and {names[1]} were not measured on the same examples of {a.task}: {len(a.examples)} and "
            f"{len(b.examples)}, {len(apart)} of them only on one side, such as {apart[0]!r}; evaluate both on the same data"
        )
    differ = np.flatnonzero((a.denominator != b.denominator) | (a.weight != b.weight))
    if differ.size:
        at = int(differ[0])
        raise UserError(
            f"{names[0]} and {names[1]} disagree about the data of {a.task}: example {a.examples[at]!r} has denominator "
            f"{a.denominator[at]:g} and {b.denominator[at]:g}, weight {a.weight[at]:g} and {b.weight[at]:g}; evaluate both on "
            "the same data"
        )


def estimate(tasks: Sequence[Units]) -> Estimate:
    """One method's value over `tasks` (unweighted mean), with a bootstrap interval over examples within tasks."""
    return _estimate(tasks, [_draws(one) for one in tasks] if _enough(tasks) else None)


def difference(a: Sequence[Units], b: Sequence[Units]) -> Estimate:
    """Method a minus method b over the same tasks, paired: both see the same resamples.

    Where both have seeds only those in common count; a method without seeds is compared with the other's mean over
    seeds. Raises UserError where the tasks, examples, denominators or weights differ, or no seed is in common.
    """
    if [one.task for one in a] != [one.task for one in b]:
        raise UserError(
            f"{a[0].method} and {b[0].method} were not measured on the same tasks; evaluate both on the same"
        )
    pairs = [_shared_seeds(one, other) for one, other in zip(a, b, strict=True)]
    draws = [_draws(one) for one, _ in pairs] if _enough(a) else None
    left, right = (_estimate([pair[side] for pair in pairs], None) for side in (0, 1))
    interval = None
    if draws is not None:
        apart = [one.replicates(w) - other.replicates(w) for (one, other), w in zip(pairs, draws, strict=True)]
        interval = _percentiles(np.mean(apart, axis=0), min(len(one.examples) for one in a))
    seeds = left.seeds if left.seeds != (NO_SEED,) else right.seeds
    per_seed = np.mean([one.by_seed() - other.by_seed() for one, other in pairs], axis=0)
    return Estimate(left.value - right.value, interval, left.n, seeds, _spread(per_seed))


def _shared_seeds(a: Units, b: Units) -> tuple[Units, Units]:
    check_same_examples(a, b)
    if a.seeds == (NO_SEED,) or b.seeds == (NO_SEED,):
        return a, b
    seeds = sorted(set(a.seeds) & set(b.seeds))
    if not seeds:
        raise UserError(
            f"{a.method} (seeds {', '.join(map(str, a.seeds))}) and {b.method} (seeds {', '.join(map(str, b.seeds))}) have no "
            f"seed in common in {a.task}; run one of them with a seed of the other"
        )
    return a.of_seeds(seeds), b.of_seeds(seeds)


def _estimate(tasks: Sequence[Units], draws: Sequence[np.ndarray] | None) -> Estimate:
    seeds = tasks[0].seeds
    for one in tasks:
        if one.seeds != seeds:
            raise UserError(
                f"{one.method} has seeds {', '.join(map(str, seeds))} in {tasks[0].task} but "
                f"{', '.join(map(str, one.seeds))} in {one.task}, so no average can be given; run the missing seeds"
            )
    per_seed = np.mean([one.by_seed() for one in tasks], axis=0)
    interval = None
    if draws is not None:
        means = np.mean([one.replicates(w) for one, w in zip(tasks, draws, strict=True)], axis=0)
        interval = _percentiles(means, min(len(one.examples) for one in tasks))
    n = sum(len(one.examples) for one in tasks)
    return Estimate(float(per_seed.mean()), interval, n, seeds, _spread(per_seed))


def _enough(tasks: Sequence[Units]) -> bool:
    return all(len(one.examples) >= MIN_UNITS for one in tasks)


def _spread(per_seed: np.ndarray) -> float | None:
    return float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None


def _draws(units: Units) -> np.ndarray:
    return _multinomial(units.task, len(units.examples)).astype(np.float64)


# scipy.stats.bootstrap draws every sample from one random stream and hands the statistic indices, so one set of
# resamples cannot serve several cells: a row's or a task's interval would move when another is added, and each cell
# would be drawn anew.
@lru_cache(maxsize=64)
def _multinomial(task: str, n: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each of n examples is drawn in each resample, uint16[R, n]; depends on the task's name and n alone."""
    seed = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big")
    picked = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    flat = (picked + np.arange(resamples)[:, None] * n).ravel()
    return np.bincount(flat, minlength=resamples * n).reshape(resamples, n).astype(np.uint16)


def _percentiles(replicates: np.ndarray, n: int) -> tuple[float, float]:
    """The percentile interval of `replicates`, float64[R], widened for few examples.

    Plain percentiles of n examples are as narrow as a normal interval with the variance over n instead of n - 1.
    Taking them further out by the ratio of Student's t to the normal quantile mends it (Hesterberg, What teachers
    should know about the bootstrap, 2015, section 5.3). For a mean over tasks n is the smallest task's: it errs on
    the wide side.
    """
    outer = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - CONFIDENCE) / 2, n - 1))
    low, high = np.quantile(replicates, [outer, 1 - outer])
    return float(low), float(high)
