"""Do tables find what is there, and little else? Verdicts in whole families of comparisons, on simulated data.

A table as the paper's first: ten methods against one reference in 27 tasks, which makes 10 comparisons of averages and
270 of single tasks. Two seeds of each, so that McNemar's test does not apply.
"""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from results import statistics
from results.layout import Part
from results.metrics import measure
from results.statistics import Units

METHODS, TASKS, N = 10, 27, 250
pytestmark = pytest.mark.slow
Draw = Callable[[np.random.Generator], np.ndarray]
"""Gives one method's differences to the reference, in points: float64[TASKS, N]."""


def seeds_apart(won: float, lost: float) -> Draw:
    """Mean over two seeds of answers won and lost with these probabilities."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        return rng.choice([1.0, -1.0, 0.0], (TASKS, N, 2), p=[won, lost, 1 - won - lost]).mean(axis=2)

    return draw


def corrected(draw: Draw, table: int) -> tuple[np.ndarray, np.ndarray]:
    """Corrected p of a table's averages, float64[METHODS], and of its single tasks, float64[METHODS, TASKS]."""
    rng, ids, ones = np.random.default_rng(table), tuple(map(str, range(N))), np.ones(N)
    keyed = {}
    for method in range(METHODS):
        for task, row in enumerate(draw(rng)):
            part, seeds = Part("bbh", f"{task}/{table}", "acc"), np.stack([row] * 2)
            keyed[method, task] = Units("m", part, measure("acc"), ids, (0, 1), seeds, ones, ones, (), "CLM")
    drawn = statistics.resample(keyed)
    averages = [statistics.estimate([drawn[method, task] for task in range(TASKS)]).p for method in range(METHODS)]
    single = [statistics.estimate([one]).p for one in drawn.values()]
    families = [statistics.holm([1.0 if p is None else p for p in family]) for family in (averages, single)]
    return np.array(families[0]), np.array(families[1]).reshape(METHODS, TASKS)


def test_a_great_difference_is_found_in_every_cell_of_a_large_table() -> None:
    """Twenty points in every task."""
    averages, single = corrected(seeds_apart(0.35, 0.15), 0)
    assert single.size == 270
    assert (averages <= 0.05).all() and (single <= 0.05).mean() > 0.95


def test_verdicts_are_nearly_as_many_as_a_z_test_would_give() -> None:
    """Ten points in every task, a part of which a z-test that knows the variance would find (Bonferroni)."""
    won, lost = 0.3, 0.2
    variance = (won + lost - (won - lost) ** 2) / 2 / N
    found = np.mean([(corrected(seeds_apart(won, lost), table)[1] <= 0.05).mean() for table in range(8)])
    ideal = stats.norm.sf(stats.norm.isf(0.025 / 270) - (won - lost) / variance**0.5)
    assert 0.2 < ideal < 0.9
    assert found > ideal - 0.1


def test_an_average_is_found_whatever_the_number_of_tasks_beside_it() -> None:
    """One point in every task: below what a single task can show, above what the average can."""
    found = [corrected(seeds_apart(0.16, 0.145), table) for table in range(8)]
    error = (0.305 / 2 / N / TASKS) ** 0.5
    ideal = stats.norm.sf(stats.norm.isf(0.025 / METHODS) - 0.015 / error)
    assert np.mean([(averages <= 0.05).mean() for averages, _ in found]) > ideal - 0.1
    assert np.mean([(single <= 0.05).mean() for _, single in found]) < 0.02


def test_no_more_false_alarms_in_a_large_table() -> None:
    """Nothing differs in truth: 5 % of the tables at most have a verdict in a family, as far as 80 tables tell."""
    alarms = [[(family <= 0.05).any() for family in corrected(seeds_apart(0.1, 0.1), table)] for table in range(80)]
    assert (np.sum(alarms, axis=0) <= stats.binom.isf(0.01, 80, 0.05)).all()
