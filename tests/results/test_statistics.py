import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from results import statistics
from results.errors import UserError
from results.metrics import METRICS, metric_of
from results.records import COLUMNS, Record
from results.statistics import Units
from tests.results.sample import final


def frame(records: Sequence[Record]) -> pd.DataFrame:
    rows = [[getattr(one, name) for name in COLUMNS] for one in records]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"tokens": "Int64"})


def units(nats: np.ndarray, size: np.ndarray, task: str = "code", method: str = "CLM") -> Units:
    nats = np.atleast_2d(nats)
    seeds = tuple(range(len(nats)))
    ids = tuple(f"{i:04}" for i in range(len(size)))
    made = Units(method, task, METRICS["bits_per_byte"], ids, seeds, nats, size, np.ones(len(size)))
    return statistics.resample({(method, task): made})[method, task]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0.1, 1e4), st.integers(1, 10_000)), min_size=1, max_size=60))
def test_a_domain_is_a_ratio_of_sums_in_bits(documents: list[tuple[float, int]]) -> None:
    nats, size = (np.array(column, dtype=float) for column in zip(*documents, strict=True))
    found = statistics.estimate([units(nats, size)])
    assert found.value == pytest.approx(nats.sum() / size.sum() / math.log(2), rel=1e-12)
    assert (found.interval is None) == (len(documents) < 20)
    assert found.n == len(documents)


def test_the_average_is_the_unweighted_mean_of_the_domains() -> None:
    found = statistics.group(frame(final("CLM", documents={"code": 24, "news": 50})))
    code, news = found["CLM", "code"], found["CLM", "news"]
    each = [statistics.estimate([one]).value for one in (code, news)]
    assert statistics.estimate([code, news]).value == pytest.approx(sum(each) / 2, rel=1e-14)


def test_no_interval_of_an_average_with_one_small_domain() -> None:
    found = statistics.group(frame(final("CLM", documents={"code": 24, "news": 19})))
    assert statistics.estimate([found["CLM", "code"]]).interval is not None
    assert statistics.estimate([found["CLM", "news"]]).interval is None
    assert statistics.estimate([found["CLM", "code"], found["CLM", "news"]]).interval is None


def test_the_interval_agrees_with_scipy() -> None:
    rng = np.random.default_rng(3)
    size = rng.lognormal(6, 0.5, 250)
    nats = size * rng.normal(0.7, 0.1, 250)
    theirs = stats.bootstrap(
        (nats, size), lambda x, y, axis: x.sum(axis) / y.sum(axis) / math.log(2), paired=True, vectorized=True,
        method="percentile", n_resamples=4000, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    ours = statistics.estimate([units(nats, size)]).interval
    assert ours is not None
    width = theirs.high - theirs.low
    assert ours[0] == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours[1] == pytest.approx(theirs.high, abs=0.06 * width)


@pytest.mark.parametrize("n", [20, 50])
def test_intervals_cover_the_truth(n: int) -> None:
    """Documents of lognormal length (sigma 0.5) and normal nats per byte, paired: 95 % give or take the 300 trials."""
    rng = np.random.default_rng(n)
    trials, value_hits, difference_hits, average_hits = 300, 0, 0, 0
    for _ in range(trials):
        pairs = []
        for task in ("code", "news"):
            size = rng.lognormal(6, 0.5, n)
            hard = rng.normal(0.7, 0.1, n)
            clm = units(size * hard, size, task)
            fused = units(size * (hard - 0.01 + rng.normal(0, 0.02, n)), size, task, "FuseLLM")
            pairs.append((fused, clm))
        ends = (
            statistics.estimate([pairs[0][1]]).interval,
            statistics.difference([pairs[0][0]], [pairs[0][1]]).interval,
            statistics.estimate([clm for _, clm in pairs]).interval,
        )
        assert ends[0] and ends[1] and ends[2]
        value_hits += ends[0][0] <= 0.7 / math.log(2) <= ends[0][1]
        difference_hits += ends[1][0] <= -0.01 / math.log(2) <= ends[1][1]
        average_hits += ends[2][0] <= 0.7 / math.log(2) <= ends[2][1]
    for hits in (value_hits, difference_hits, average_hits):
        assert 0.91 <= hits / trials <= 0.985


def test_pairing_makes_the_interval_of_the_difference_narrow() -> None:
    found = statistics.group(frame(final("CLM") + final("FuseLLM", shift=-0.01)))
    own = [found["FuseLLM", task] for task in ("code", "news")]
    base = [found["CLM", task] for task in ("code", "news")]
    value, difference = statistics.estimate(own), statistics.difference(own, base)
    assert value.interval is not None and difference.interval is not None
    assert difference.value == pytest.approx(value.value - statistics.estimate(base).value, abs=1e-15)
    assert difference.interval[1] - difference.interval[0] < 0.5 * (value.interval[1] - value.interval[0])
    mirrored = statistics.difference(base, own)
    assert mirrored.interval is not None
    assert mirrored.interval == pytest.approx((-difference.interval[1], -difference.interval[0]), abs=1e-12)


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    size = np.full(30, 100.0)
    nats = np.random.default_rng(0).normal(70, 10, 30)
    found = statistics.difference([units(nats - 1, size, method="FuseLLM")], [units(nats, size)])
    assert found.interval == pytest.approx((-0.01 / math.log(2),) * 2, abs=1e-12)


def test_an_interval_depends_on_its_own_domain_only() -> None:
    alone = statistics.group(frame(final("CLM", documents={"news": 30})))["CLM", "news"]
    beside = statistics.group(frame(final("CLM") + final("FuseLLM")))["CLM", "news"]
    assert statistics.estimate([alone]) == statistics.estimate([beside])


def test_seeds_are_averaged_per_document_and_their_spread_kept() -> None:
    found = statistics.group(frame(final("CLM", seeds=(0, 1, 2)) + final("FuseLLM", seeds=(1, 2, 3), shift=-0.01)))
    clm, fused = found["CLM", "code"], found["FuseLLM", "code"]
    value = statistics.estimate([clm])
    assert value.seeds == (0, 1, 2)
    assert value.value == pytest.approx(clm.by_seed().mean(), rel=1e-14)
    assert value.spread == pytest.approx(np.std(clm.by_seed(), ddof=1), rel=1e-12)
    difference = statistics.difference([fused], [clm])
    assert difference.seeds == (1, 2)
    apart = fused.by_seed()[:2] - clm.by_seed()[1:]
    assert difference.value == pytest.approx(apart.mean(), rel=1e-10)
    assert difference.spread == pytest.approx(np.std(apart, ddof=1), rel=1e-10)


def test_a_method_without_seeds_is_compared_with_the_mean_over_seeds() -> None:
    found = statistics.group(frame(final("CLM", seeds=(0, 1)) + final("as it is", seeds=(-1,), shift=0.1)))
    difference = statistics.difference([found["as it is", "code"]], [found["CLM", "code"]])
    assert difference.seeds == (0, 1)
    values = (statistics.estimate([found[method, "code"]]).value for method in ("as it is", "CLM"))
    assert difference.value == pytest.approx(next(values) - next(values), abs=1e-15)


def test_no_common_seed_is_refused() -> None:
    found = statistics.group(frame(final("CLM", seeds=(0,)) + final("FuseLLM", seeds=(1,))))
    with pytest.raises(UserError, match="no seed in common"):
        statistics.difference([found["FuseLLM", "code"]], [found["CLM", "code"]])


def test_other_documents_and_other_bytes_are_refused_naming_both() -> None:
    clm = final("CLM")
    fewer = statistics.group(frame(clm + final("FuseLLM")[1:]))
    with pytest.raises(UserError, match=r"FuseLLM .* and CLM .* same examples of code.*'doc000'"):
        statistics.difference([fewer["FuseLLM", "code"]], [fewer["CLM", "code"]])
    other = frame(clm + final("FuseLLM"))
    other.loc[other["method"] == "FuseLLM", "denominator"] += 1
    bytes_differ = statistics.group(other)
    with pytest.raises(UserError, match=r"FuseLLM .* and CLM .* disagree about the data"):
        statistics.difference([bytes_differ["FuseLLM", "code"]], [bytes_differ["CLM", "code"]])
    with pytest.raises(UserError, match="not measured on the same tasks"):
        statistics.difference([fewer["CLM", "code"]], [fewer["CLM", "news"]])


def test_seeds_of_one_method_must_have_the_same_documents() -> None:
    with pytest.raises(UserError, match=r"CLM \(seed 0\) and CLM \(seed 1\)"):
        statistics.group(frame(final("CLM", seeds=(0, 1))[:-1]))
    with pytest.raises(UserError, match="with a seed and without"):
        statistics.group(frame(final("CLM", seeds=(-1, 0))))


def test_an_average_over_domains_with_other_seeds_is_refused() -> None:
    records = final("CLM", seeds=(0, 1))
    found = statistics.group(frame([one for one in records if one.task == "code" or one.seed == 0]))
    with pytest.raises(UserError, match="no average can be given"):
        statistics.estimate([found["CLM", "code"], found["CLM", "news"]])


def test_records_of_two_profiles_are_refused() -> None:
    with pytest.raises(UserError, match=r"more than one profile \(small, tiny\)"):
        statistics.group(frame(final("CLM") + final("FuseLLM", profile="tiny")))


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'bits_per_byte'"):
        metric_of("bits_per_bite")


def test_resamples_draw_every_example_n_times_on_average() -> None:
    draws = np.concatenate(list(statistics._multinomial("code", 30)))
    assert len(draws) == statistics.RESAMPLES
    assert (draws.sum(axis=1) == 30).all()
    assert draws.mean(axis=0) == pytest.approx(np.ones(30), abs=0.1)
    assert draws.var() == pytest.approx(29 / 30, rel=0.03)


def test_resampling_in_parts_gives_every_resample_once() -> None:
    parts = list(statistics._multinomial("code", 600))
    assert len(parts) > 1
    assert sum(len(part) for part in parts) == statistics.RESAMPLES
    assert all((part.sum(axis=1) == 600).all() for part in parts)
