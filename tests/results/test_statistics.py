"""Values, intervals and comparisons of domains of held-out text, over documents and seeds."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from results import bootstrap, statistics
from results.errors import UnknownName, UserError
from results.metrics import metric_of
from tests.results.estimating import compared, frame, text, units, value
from tests.results.sample import final


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
    each = [value(found, "CLM", task).value for task in ("code", "news")]
    assert value(found, "CLM", "code", "news").value == pytest.approx(sum(each) / 2, rel=1e-14)


def test_no_interval_of_an_average_with_one_small_domain() -> None:
    found = statistics.group(frame(final("CLM", documents={"code": 24, "news": 19})))
    assert value(found, "CLM", "code").interval is not None
    assert value(found, "CLM", "news").interval is None
    assert value(found, "CLM", "code", "news").interval is None


def test_the_interval_agrees_with_a_plain_studentised_bootstrap() -> None:
    rng = np.random.default_rng(3)
    size = rng.lognormal(6, 0.5, 60)
    nats = size * rng.normal(0.7, 0.1, 60)

    def error(top: np.ndarray, bottom: np.ndarray) -> float:
        return float(np.std(top - top.sum() / bottom.sum() * bottom, ddof=1) * len(top) ** 0.5 / bottom.sum())

    centre, off = nats.sum() / size.sum(), []
    for _ in range(4000):
        drawn = rng.integers(0, 60, 60)
        top, bottom = nats[drawn], size[drawn]
        # The residuals of a resample sum to zero only around its own ratio.
        off.append(abs(top.sum() / bottom.sum() - centre) / error(top, bottom))
    half = np.quantile(off, 0.95) * error(nats, size) / math.log(2)
    ours = statistics.estimate([units(nats, size)])
    assert ours.interval is not None
    assert ours.interval == pytest.approx((ours.value - half, ours.value + half), abs=0.05 * half)


def test_resamples_agree_with_scipy() -> None:
    rng = np.random.default_rng(3)
    size = rng.lognormal(6, 0.5, 250)
    nats = size * rng.normal(0.7, 0.1, 250)
    theirs = stats.bootstrap(
        (nats, size), lambda x, y, axis: x.sum(axis) / y.sum(axis), paired=True, vectorized=True,
        method="percentile", n_resamples=4000, rng=np.random.default_rng(0),
    )  # fmt: skip
    ratio = bootstrap.Ratio("code", nats, size)
    ours = bootstrap.resample({0: ratio})[0]
    assert ours.deviation.std() == pytest.approx(theirs.standard_error, rel=0.05)
    assert ours.variance.mean() ** 0.5 == pytest.approx(theirs.standard_error, rel=0.05)
    assert ratio.variance**0.5 == pytest.approx(theirs.standard_error, rel=0.05)


def test_pairing_makes_the_interval_of_the_difference_narrow() -> None:
    found = statistics.group(frame(final("CLM") + final("FuseLLM", shift=-0.01)))
    own, base = (value(found, method, "code", "news") for method in ("FuseLLM", "CLM"))
    difference = compared(found, "FuseLLM", "CLM", "code", "news")
    assert own.interval is not None and difference.interval is not None
    assert difference.value == pytest.approx(own.value - base.value, abs=1e-15)
    assert difference.interval[1] - difference.interval[0] < 0.5 * (own.interval[1] - own.interval[0])
    mirrored = compared(found, "CLM", "FuseLLM", "code", "news")
    assert mirrored.interval is not None
    assert mirrored.interval == pytest.approx((-difference.interval[1], -difference.interval[0]), abs=1e-12)
    assert mirrored.p == difference.p


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    size = np.full(30, 100.0)
    nats = np.random.default_rng(0).normal(70, 10, 30)
    apart = statistics.contrast(units(nats - 1, size, method="FuseLLM"), units(nats, size))
    found = statistics.estimate([statistics.resample({0: apart})[0]])
    assert found.interval == pytest.approx((-0.01 / math.log(2),) * 2, abs=1e-12)
    assert found.p is not None and found.p < 0.001


def test_an_interval_depends_on_its_own_domain_only() -> None:
    alone = statistics.group(frame(final("CLM", documents={"news": 30})))
    beside = statistics.group(frame(final("CLM") + final("FuseLLM")))
    assert value(alone, "CLM", "news") == value(beside, "CLM", "news")


def test_seeds_are_averaged_per_document_and_their_spread_kept() -> None:
    found = statistics.group(frame(final("CLM", seeds=(0, 1, 2)) + final("FuseLLM", seeds=(1, 2, 3), shift=-0.01)))
    clm, fused = found["CLM", text("code")], found["FuseLLM", text("code")]
    own = value(found, "CLM", "code")
    assert own.seeds == (0, 1, 2)
    assert own.value == pytest.approx(clm.by_seed().mean(), rel=1e-14)
    assert own.spread == pytest.approx(np.std(clm.by_seed(), ddof=1), rel=1e-12)
    difference = compared(found, "FuseLLM", "CLM", "code")
    assert difference.seeds == (1, 2)
    apart = fused.by_seed()[:2] - clm.by_seed()[1:]
    assert difference.value == pytest.approx(apart.mean(), rel=1e-10)
    assert difference.spread == pytest.approx(np.std(apart, ddof=1), rel=1e-10)


def test_a_method_without_seeds_is_compared_with_the_mean_over_seeds() -> None:
    found = statistics.group(frame(final("CLM", seeds=(0, 1)) + final("as it is", seeds=(-1,), shift=0.1)))
    difference = compared(found, "as it is", "CLM", "code")
    assert difference.seeds == (0, 1)
    values = (value(found, method, "code").value for method in ("as it is", "CLM"))
    assert difference.value == pytest.approx(next(values) - next(values), abs=1e-15)
    assert compared(found, "CLM", "as it is", "code").seeds == (0, 1)


def test_no_common_seed_is_refused() -> None:
    found = statistics.group(frame(final("CLM", seeds=(0,)) + final("FuseLLM", seeds=(1,))))
    with pytest.raises(UserError, match="no seed in common"):
        compared(found, "FuseLLM", "CLM", "code")


def test_other_documents_and_other_bytes_are_refused_naming_both() -> None:
    clm = final("CLM")
    fewer = statistics.group(frame(clm + final("FuseLLM")[1:]))
    with pytest.raises(UserError, match=r"FuseLLM .* and CLM .* same examples of code.*'doc000'"):
        compared(fewer, "FuseLLM", "CLM", "code")
    other = frame(clm + final("FuseLLM"))
    other.loc[other["method"] == "FuseLLM", "denominator"] += 1
    bytes_differ = statistics.group(other)
    with pytest.raises(UserError, match=r"FuseLLM .* and CLM .* disagree about the data"):
        compared(bytes_differ, "FuseLLM", "CLM", "code")


def test_seeds_of_one_method_must_have_the_same_documents() -> None:
    with pytest.raises(UserError, match=r"CLM \(seed 0\) and CLM \(seed 1\)"):
        statistics.group(frame(final("CLM", seeds=(0, 1))[:-1]))
    with pytest.raises(UserError, match="with a seed and without"):
        statistics.group(frame(final("CLM", seeds=(-1, 0))))


def test_an_average_over_domains_with_other_seeds_is_refused() -> None:
    records = final("CLM", seeds=(0, 1))
    found = statistics.group(frame([one for one in records if one.task == "code" or one.seed == 0]))
    with pytest.raises(UserError, match="no average can be given"):
        value(found, "CLM", "code", "news")


def test_records_of_two_profiles_are_refused() -> None:
    with pytest.raises(UserError, match=r"more than one profile \(small, tiny\)"):
        statistics.group(frame(final("CLM") + final("FuseLLM", profile="tiny")))


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(UnknownName, match="There is no metric 'bits_per_bite': there are bits_per_byte, "):
        metric_of("bits_per_bite")


def test_holm_multiplies_the_smallest_most() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []


def test_five_seeds_count_themselves_in_the_test() -> None:
    few = statistics.group(frame(final("CLM", seeds=tuple(range(4))) + final("FuseLLM", (0, 1, 2, 3), -0.01)))
    many = statistics.group(frame(final("CLM", seeds=tuple(range(5))) + final("FuseLLM", (0, 1, 2, 3, 4), -0.01)))
    assert not compared(few, "FuseLLM", "CLM", "code").general
    found = compared(many, "FuseLLM", "CLM", "code")
    assert found.general and found.p is not None
    one_seed = statistics.contrast(many["FuseLLM", text("code")], many["CLM", text("code")])
    errors = one_seed.ratio.variance**0.5 / math.log(2), float(found.spread or 0) / 5**0.5
    freedom = sum(e**2 for e in errors) ** 2 / (errors[0] ** 4 / 23 + errors[1] ** 4 / 4)
    both = 2 * stats.t.sf(abs(found.value) / math.hypot(*errors), freedom)
    alone = 2 * stats.t.sf(abs(found.value) / errors[1], 4)
    assert found.p == pytest.approx(max(both, alone))


def test_five_seeds_that_agree_leave_the_doubt_of_the_examples() -> None:
    rng = np.random.default_rng(0)
    nats, size = rng.normal(0.5, 1, 50), np.ones(50)
    apart = replace(units(np.stack([nats] * 5), size), against="CLM")
    found = statistics.estimate([statistics.resample({0: apart})[0]])
    error = apart.ratio.variance**0.5
    assert found.p == pytest.approx(2 * stats.t.sf(nats.mean() / error, 49))
    nothing = replace(units(np.zeros((5, 50)), size), against="CLM")
    assert statistics.estimate([statistics.resample({0: nothing})[0]]).p == 1.0
