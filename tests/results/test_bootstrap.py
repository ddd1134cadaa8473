"""Resampling: how often each example is drawn, sums, strata that share clusters, p-values far out."""

import numpy as np
import pytest
from scipy import stats

from results import bootstrap


def test_resamples_draw_every_example_n_times_on_average() -> None:
    draws = np.concatenate(list(bootstrap._draws("code", 30)))
    assert len(draws) == bootstrap.RESAMPLES
    assert (draws.sum(axis=1) == 30).all()
    assert draws.mean(axis=0) == pytest.approx(np.ones(30), abs=0.1)
    assert draws.var() == pytest.approx(29 / 30, rel=0.03)


def test_resampling_in_parts_gives_every_resample_once() -> None:
    parts = list(bootstrap._draws("code", 600))
    assert len(parts) > 1
    assert sum(len(part) for part in parts) == bootstrap.RESAMPLES
    assert all((part.sum(axis=1) == 600).all() for part in parts)


def test_few_different_scores_are_drawn_like_many() -> None:
    rng = np.random.default_rng(0)
    ratio = bootstrap.Ratio("code", rng.choice([-1.0, 0.0, 1.0], 300, p=[0.1, 0.7, 0.2]), np.ones(300))
    quick = bootstrap.resample({0: ratio})[0]
    many = bootstrap.Ratio("code", ratio.top + 1e-12 * rng.random(300), np.ones(300))
    slow = bootstrap.resample({0: many})[0]
    assert not np.array_equal(quick.deviation, slow.deviation)
    for a, b in ((quick.deviation, slow.deviation), (quick.variance, slow.variance)):
        assert stats.ks_2samp(a, b).pvalue > 0.001


def test_sums_do_not_depend_on_their_neighbours() -> None:
    rng = np.random.default_rng(0)
    draws, columns = next(bootstrap._draws("code", 500)), rng.lognormal(0, 3, (500, 40))
    whole = bootstrap._sums(draws, columns)
    assert np.array_equal(whole[:, 3:4], bootstrap._sums(draws, columns[:, 3:4]))
    shuffled = rng.permutation(500)
    assert np.array_equal(whole, bootstrap._sums(draws[:, shuffled], columns[shuffled]))
    assert whole == pytest.approx(draws @ columns, rel=1e-10)


def test_a_resample_without_those_that_differ_is_not_infinitely_far_off() -> None:
    ratios = [bootstrap.Ratio(task, np.array([1.0, -1.0, 1.0] + [0.0] * 297), np.ones(300)) for task in "abc"]
    resamples = list(bootstrap.resample(dict(enumerate(ratios))).values())
    _, off = bootstrap.studentised(ratios[:1], resamples[:1], 1)
    assert off.max() < 10


def test_tasks_may_share_some_of_their_clusters() -> None:
    rng = np.random.default_rng(0)
    names = [[f"c{i}" for i in range(40)], [f"c{i}" for i in range(20, 70)], [f"d{i}" for i in range(30)]]
    ratios = [
        bootstrap.Ratio(task, rng.normal(size=len(own)), rng.uniform(1, 3, len(own)), tuple(own))
        for task, own in zip("abd", names, strict=True)
    ]
    shared, alone = bootstrap.strata(ratios)
    assert isinstance(shared, bootstrap.SharedRatios) and (shared.size, alone) == (70, ratios[2])
    # The bootstrap's own variance, of a resample that draws every cluster for both tasks, is what the formula gives.
    assert shared.resamples.deviation.var() == pytest.approx(shared.variance, rel=0.15)
    assert shared.resamples.variance.mean() == pytest.approx(shared.variance, rel=0.15)
    chain = [bootstrap.Ratio("t", np.ones(2), np.ones(2), own) for own in (("p", "q"), ("r", "s"), ("q", "r"))]
    assert [one.size for one in bootstrap.strata(chain)] == [4]


@pytest.mark.parametrize("freedom", [4, 12, 1000])
def test_small_p_values_are_those_of_very_many_resamples(freedom: int) -> None:
    rng = np.random.default_rng(0)
    found = [
        np.array([bootstrap.p_value(at, np.abs(rng.standard_t(freedom, bootstrap.RESAMPLES))) for _ in range(200)])
        for at in stats.t.isf(np.array([0.05, 1e-3, 1e-4, 1e-5]) / 2, freedom)
    ]
    assert [float(np.median(p)) for p in found] == pytest.approx([0.05, 1e-3, 1e-4, 1e-5], rel=0.5)
    off = np.abs(rng.standard_t(freedom, bootstrap.RESAMPLES))
    p = [bootstrap.p_value(at, off) for at in np.linspace(0, 30, 3000)]
    assert p == sorted(p, reverse=True) and p[-1] > 0
    assert max(np.diff(np.log(p[1:2000]))) <= 0  # no step up where the fitted tail begins
