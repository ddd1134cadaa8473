"""Estimates from records: ratio of sums within a task, unweighted mean over tasks, bootstrap over examples.

An interval speaks about other examples of the same kind for these very checkpoints; what another seed would give is
the spread.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit

from results.errors import UserError
from results.metrics import Metric, metric_of
from results.records import NO_SEED, VALUES

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
    replicates: np.ndarray | None = None  # float64[S, R]: the metric of resampled examples; None below MIN_UNITS

    def of_seeds(self, seeds: Sequence[int]) -> "Units":
        """The same examples under some of the seeds only."""
        rows = [self.seeds.index(seed) for seed in seeds]
        replicates = None if self.replicates is None else self.replicates[rows]
        return replace(self, seeds=tuple(seeds), numerator=self.numerator[rows], replicates=replicates)

    def by_seed(self) -> np.ndarray:
        """The metric under each seed, float64[S]: ratio of sums over the examples."""
        return self.metric.value(_sums(self.numerator, self.weight), _sums(self.denominator[None], self.weight))


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


def group(records: pd.DataFrame, intervals: bool = True) -> dict[tuple[str, str], Units]:
    """The examples of each (method, task) in records of one experiment, profile, suite, metric and training step.

    They are resampled if `intervals` are wanted. Raises UserError where the records are of several of these, where
    seeds of a method have other examples, denominators or weights, and where a method comes both with and without a
    seed.
    """
    for name in ("experiment", "profile", "suite", "metric", "tokens"):
        several = records[name].drop_duplicates()
        if len(several) > 1:
            listed = ", ".join(sorted("the final one" if pd.isna(one) else str(one) for one in several))
            raise UserError(f"the records are of more than one {name} ({listed}); choose one of them")
    if records.empty:
        return {}
    metric = metric_of(str(records["metric"].iloc[0]))
    ordered = records.sort_values("example", kind="stable")
    examples = ordered["example"].to_numpy(object)
    numbers = ordered[list(VALUES)].to_numpy("float64")
    found: dict[tuple[str, str], list[Units]] = {}
    rows = cast("dict[tuple[str, str, int], np.ndarray]", ordered.groupby(["method", "task", "seed"]).indices)
    for (method, task, seed), at in sorted(rows.items()):
        one = Units(method, task, metric, tuple(examples[at]), (int(seed),), numbers[None, at, 0], *numbers[at, 1:].T)
        found.setdefault((method, task), []).append(one)
    units = {key: _join_seeds(one_seed) for key, one_seed in found.items()}
    return resample(units) if intervals else units


def _join_seeds(one_seed: Sequence[Units]) -> Units:
    first = one_seed[0]
    for other in one_seed[1:]:
        check_same_examples(first, other)
    seeds = tuple(one.seeds[0] for one in one_seed)
    if NO_SEED in seeds and len(seeds) > 1:
        raise UserError(f"{first.method} has records in {first.task} with a seed and without; remove the wrong ones")
    return replace(first, seeds=seeds, numerator=np.concatenate([one.numerator for one in one_seed]))


def check_same_examples(a: Units, b: Units) -> None:
    """Raises UserError, naming both, unless a and b were measured on the same examples with the same denominators."""
    names = [f"{one.method} (seed {_listed(one.seeds)})" for one in (a, b)]
    if a.examples != b.examples:
        apart = sorted(set(a.examples) ^ set(b.examples))
        raise UserError(
            f"{names[0]} and {names[1]} were not measured on the same examples of {a.task}: {len(a.examples)} and "
            f"{len(b.examples)}, {len(apart)} of them on one side only, such as {apart[0]!r}; evaluate both on the same"
        )
    differ = np.flatnonzero((a.denominator != b.denominator) | (a.weight != b.weight))
    if differ.size:
        at = int(differ[0])
        raise UserError(
            f"{names[0]} and {names[1]} disagree about the data of {a.task}: example {a.examples[at]!r} has "
            f"denominator {a.denominator[at]:.17g} and {b.denominator[at]:.17g}, weight {a.weight[at]:.17g} and "
            f"{b.weight[at]:.17g}; evaluate both on the same"
        )


def estimate(tasks: Sequence[Units]) -> Estimate:
    """One method's value over `tasks` (unweighted mean), with a bootstrap interval over examples within tasks."""
    seeds = tasks[0].seeds
    for one in tasks:
        if one.seeds != seeds:
            raise UserError(
                f"{one.method} has seeds {_listed(seeds)} in {tasks[0].task} but {_listed(one.seeds)} in {one.task}, "
                "so no average can be given; run the missing seeds"
            )
    per_seed = np.mean([one.by_seed() for one in tasks], axis=0)
    n = sum(len(one.examples) for one in tasks)
    return Estimate(float(per_seed.mean()), _interval(tasks, _replicates(tasks)), n, seeds, _spread(per_seed))


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
    own, others = [one for one, _ in pairs], [other for _, other in pairs]
    left, right = estimate(own), estimate(others)
    replicates, opposite = _replicates(own), _replicates(others)
    apart = None if replicates is None or opposite is None else replicates - opposite
    seeds = left.seeds if left.seeds != (NO_SEED,) else right.seeds
    per_seed = np.mean([one.by_seed() - other.by_seed() for one, other in pairs], axis=0)
    return Estimate(left.value - right.value, _interval(own, apart), left.n, seeds, _spread(per_seed))


def _shared_seeds(a: Units, b: Units) -> tuple[Units, Units]:
    check_same_examples(a, b)
    if a.seeds == (NO_SEED,) or b.seeds == (NO_SEED,):
        return a, b
    seeds = sorted(set(a.seeds) & set(b.seeds))
    if not seeds:
        raise UserError(
            f"{a.method} (seeds {_listed(a.seeds)}) and {b.method} (seeds {_listed(b.seeds)}) have no seed in common "
            f"in {a.task}; run one of them with a seed of the other"
        )
    return a.of_seeds(seeds), b.of_seeds(seeds)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join("none" if seed == NO_SEED else str(seed) for seed in seeds)


def _replicates(tasks: Sequence[Units]) -> np.ndarray | None:
    """The mean over tasks and seeds of resampled examples, float64[R]; None where a task has too few examples."""
    means = [one.replicates.mean(axis=0) for one in tasks if one.replicates is not None]
    return np.mean(means, axis=0) if len(means) == len(tasks) else None


def _spread(per_seed: np.ndarray) -> float | None:
    return float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None


# scipy.stats.bootstrap draws every sample from one random stream and hands the statistic indices, so one set of
# resamples cannot serve several cells: a row's or a task's interval would move when another is added, and each cell
# would be drawn anew.
def resample(units: Mapping[tuple[str, str], Units]) -> dict[tuple[str, str], Units]:
    """The same units with their replicates; methods with as many examples in a task see the same resamples."""
    alike: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for key, one in units.items():
        alike.setdefault((one.task, len(one.examples)), []).append(key)
    found = dict(units)
    for (task, n), keys in alike.items():
        if n < MIN_UNITS:
            continue
        parts: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in keys}
        for draws in _multinomial(task, n):
            bottoms: dict[bytes, np.ndarray] = {}  # of methods measured on the same data it is the same
            for key in keys:
                one = units[key]
                bottom = one.weight * one.denominator
                data = bottom.tobytes()
                if data not in bottoms:
                    bottoms[data] = _sums(draws, bottom)
                tops = np.stack([_sums(draws, one.weight * row) for row in one.numerator])
                parts[key].append(one.metric.value(tops, bottoms[data]))
        found.update({key: replace(units[key], replicates=np.concatenate(parts[key], axis=1)) for key in keys})
    return found


def _sums(rows: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """The sum of each row, float64[r, n], with its entries times `factors`, float64[n]: float64[r]."""
    # Not BLAS, whose last digits depend on the number of threads and so on the machine's load.
    return np.einsum("rn,n->r", rows, factors)


def _multinomial(task: str, n: int) -> Iterator[np.ndarray]:
    """How often each of n examples is drawn in each of RESAMPLES resamples, some at a time: float64[r, n].

    Depends on the task's name and n alone. Memory is bounded however many examples there are.
    """
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big"))
    step = max(1, 1_000_000 // n)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        flat = rng.integers(0, n, size=(rows, n)) + np.arange(rows)[:, None] * n
        yield np.bincount(flat.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


def _interval(tasks: Sequence[Units], replicates: np.ndarray | None) -> tuple[float, float] | None:
    """The percentile interval of `replicates`, float64[R], widened for few examples; None where there are none.

    Plain percentiles of n examples are as narrow as a normal interval with the variance over n instead of n - 1.
    Taking them further out by the ratio of Student's t to the normal quantile mends it (Hesterberg 2015, What
    teachers should know about the bootstrap). For a mean over tasks n is the smallest task's: it errs on the wide
    side.
    """
    if replicates is None:
        return None
    n = min(len(one.examples) for one in tasks)
    outer = ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - CONFIDENCE) / 2))
    low, high = np.quantile(replicates, [outer, 1 - outer])
    return float(low), float(high)
