import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from results import bootstrap, statistics
from results.errors import UnknownName, UserError
from results.layout import Part
from results.metrics import METRICS, measure, metric_of
from results.records import COLUMNS, Record
from results.statistics import Estimate, Units
from tests.results.sample import final, scores


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


def test_right_and_wrong_answers_of_one_task_have_wilsons_interval_and_mcnemars_test() -> None:
    right = {"CLM": [1.0] * 30 + [0.0] * 70, "FuseLLM": [1.0] * 25 + [0.0] * 65 + [1.0] * 10}
    found = statistics.group(frame([one for method in right for one in scores(method, "boolq", right[method])]))
    boolq = Part("commonsense", "boolq", "acc")
    own = statistics.estimate([found["FuseLLM", boolq]])
    low, high = stats.binomtest(35, 100).proportion_ci(method="wilson")
    assert (own.value, own.interval) == (35.0, pytest.approx((100 * low, 100 * high)))
    difference = statistics.estimate([statistics.contrast(found["FuseLLM", boolq], found["CLM", boolq])])
    assert difference.value == pytest.approx(5)
    assert difference.p == pytest.approx(stats.binomtest(5, 15).pvalue)
    assert difference.interval is not None and difference.interval[0] < 0 < difference.interval[1]


def test_many_wins_and_losses_are_tested_by_the_corrected_normal_approximation() -> None:
    clm, fused = [1.0] * 100 + [0.0] * 100, [1.0] * 60 + [0.0] * 40 + [1.0] * 20 + [0.0] * 80
    found = statistics.group(frame(scores("CLM", "boolq", clm) + scores("FuseLLM", "boolq", fused)))
    boolq = Part("commonsense", "boolq", "acc")
    p = statistics.estimate([statistics.contrast(found["FuseLLM", boolq], found["CLM", boolq])]).p
    assert p == pytest.approx(float(stats.chi2.sf((40 - 20 - 1) ** 2 / 60, 1)))
    assert p == pytest.approx(stats.binomtest(20, 60).pvalue, rel=0.2)


def test_scores_under_several_seeds_are_resampled() -> None:
    rng = np.random.default_rng(0)
    records = [one for seed in (0, 1) for one in scores("CLM", "boolq", rng.integers(0, 2, 100).tolist(), seed)]
    unit = statistics.group(frame(records))["CLM", Part("commonsense", "boolq", "acc")]
    assert not unit.right_or_wrong
    assert statistics.estimate([unit]).interval is None
    assert statistics.estimate([statistics.resample({0: unit})[0]]).interval is not None


@pytest.mark.parametrize(("won", "lost"), [(3, 2), (4, 3)])
def test_a_handful_of_scores_that_differ_has_no_interval_or_a_sensible_one(won: int, lost: int) -> None:
    records, parts = [], [Part("commonsense", task, "acc_norm") for task in ("a", "b")]
    for task in ("a", "b"):
        apart = [1.0] * won + [0.0] * lost if task == "a" else []
        same = [1.0, 0.0] * 100
        clm = [1 - one for one in apart] + same
        records += scores("CLM", task, clm, metric="acc_norm") + scores(
            "FuseLLM", task, apart + same, metric="acc_norm"
        )
    found = statistics.group(frame(records))
    apart_by = {part: statistics.contrast(found["FuseLLM", part], found["CLM", part]) for part in parts}
    difference = statistics.estimate(list(statistics.resample(apart_by).values()))
    if won + lost < 6:
        assert (difference.interval, difference.p) == (None, 1.0)
    else:
        assert difference.interval is not None and -3 < difference.interval[0] < 0 < difference.interval[1] < 3
        assert difference.p is not None and difference.p > 0.5


def test_five_seeds_that_agree_in_a_handful_of_scores_show_nothing() -> None:
    clm, fused = [0.0] * 5 + [1.0, 0.0] * 100, [1.0] * 5 + [1.0, 0.0] * 100
    records = [
        one
        for seed in range(5)
        for task in ("a", "b")
        for method, values in (("CLM", clm), ("FuseLLM", fused if task == "a" else clm))
        for one in scores(method, task, values, seed)
    ]
    found = statistics.group(frame(records))
    parts = [Part("commonsense", task, "acc") for task in ("a", "b")]
    apart = {part: statistics.contrast(found["FuseLLM", part], found["CLM", part]) for part in parts}
    difference = statistics.estimate(list(statistics.resample(apart).values()))
    assert (difference.interval, difference.p, difference.general) == (None, 1.0, False)


def test_a_resample_without_those_that_differ_is_not_infinitely_far_off() -> None:
    ratios = [bootstrap.Ratio(task, np.array([1.0, -1.0, 1.0] + [0.0] * 297), np.ones(300)) for task in "abc"]
    resamples = list(bootstrap.resample(dict(enumerate(ratios))).values())
    _, off = bootstrap.studentised(ratios[:1], resamples[:1], 1)
    assert off.max() < 10


def test_nothing_solved_in_several_tasks_has_no_interval_and_shows_no_difference() -> None:
    records = [
        one
        for method in ("CLM", "FuseLLM")
        for task in ("a", "b")
        for one in scores(method, task, [0.0] * 40, suite="multipl_e", metric="passed", of=5)
    ]
    found = statistics.group(frame(records))
    parts = [Part("multipl_e", task, "passed") for task in ("a", "b")]
    own = statistics.estimate([statistics.resample(found)["CLM", part] for part in parts])
    assert (own.value, own.interval) == (0.0, None)
    apart = {part: statistics.contrast(found["FuseLLM", part], found["CLM", part]) for part in parts}
    difference = statistics.estimate(list(statistics.resample(apart).values()))
    assert (difference.value, difference.interval, difference.p) == (0.0, None, 1.0)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=1, max_size=8), st.integers(1, 10))
def test_pass_at_k_is_the_chance_that_one_of_k_drawn_samples_passes(passed: list[int], k: int) -> None:
    records = scores("CLM", "cpp", passed, suite="multipl_e", metric=f"passed@{k}", of=10)
    found = statistics.group(frame(records))["CLM", Part("multipl_e", "cpp", f"passed@{k}")]
    failing = [math.comb(10 - one, k) / math.comb(10, k) for one in passed]
    assert statistics.estimate([found]).value == pytest.approx(100 * (1 - np.mean(failing)), abs=1e-9)
    assert found.metric.label == f"pass@{k}, percent"


def test_scores_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="pass@20, percent needs 20 samples per problem, but one has 10"):
        statistics.group(frame(scores("CLM", "cpp", [3], suite="multipl_e", metric="passed@20", of=10)))
    with pytest.raises(UserError, match="score outside 0 to 1"):
        statistics.group(frame(scores("CLM", "boolq", [1.5])))


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


def by_context(n: int, of_one: int, shift: float = 0.0, metric: str = "em", task: str = "drop") -> list[Units]:
    """A contrast over n right or wrong answers, `of_one` of them about each passage: as they are, and by themselves.

    What differs is the same for all questions about a passage.
    """
    rng = np.random.default_rng(n)
    apart = np.repeat(rng.choice([-1.0, 0.0, 1.0], n // of_one, p=[0.2 - shift, 0.6, 0.2 + shift]), of_one)
    ids, passages = tuple(map(str, range(n))), tuple(f"passage {i // of_one}" for i in range(n))
    part = Part("generative", task, metric)
    made = [
        Units("FuseLLM", part, measure(metric), ids, (0,), apart[None], np.ones(n), np.ones(n), clusters, "CLM")
        for clusters in (passages, ())
    ]
    return list(statistics.resample(dict(enumerate(made))).values())


def test_questions_about_one_passage_count_once() -> None:
    shared, alone = by_context(400, 10)
    together, apart = statistics.estimate([shared]), statistics.estimate([alone])
    assert (together.value, together.n) == (apart.value, 400)
    means = shared.numerator[0].reshape(40, 10).mean(axis=1)
    assert shared.ratio.variance**0.5 == pytest.approx(stats.sem(means))
    assert together.interval is not None and apart.interval is not None
    widths = [high - low for low, high in (together.interval, apart.interval)]
    assert widths[0] == pytest.approx(10**0.5 * widths[1], rel=0.15)
    assert together.p is not None and apart.p is not None and together.p > apart.p
    # McNemar's test and Wilson's interval are for independent answers.
    assert alone.right_or_wrong and not shared.right_or_wrong
    few = by_context(190, 10)[0]
    assert (few.n_clusters, statistics.estimate([few]).interval, statistics.estimate([few]).p) == (19, None, None)


def test_tasks_that_share_problems_are_worth_as_much_as_one_task_of_their_means() -> None:
    rng = np.random.default_rng(0)
    problem = rng.normal(0.04, 0.3, 160)
    apart = {f"l{i}": np.clip(problem + rng.normal(0, 0.1, 160), -1, 1) for i in range(10)}
    ids, ones = tuple(f"HumanEval_{i}" for i in range(160)), np.ones(160)

    def contrasts(values: dict[str, np.ndarray], clusters: tuple[str, ...]) -> list[Units]:
        made = {
            task: Units(
                "m", Part("multipl_e", task, "acc"), measure("acc"), ids, (0,), top[None], ones, ones, clusters, "r"
            )
            for task, top in values.items()
        }
        return list(statistics.resample(made).values())

    shared = statistics.estimate(contrasts(apart, ids))
    independent = statistics.estimate(contrasts(apart, ()))
    means = statistics.estimate(contrasts({"mean": np.mean(list(apart.values()), axis=0)}, ()))
    assert shared.value == pytest.approx(means.value) and shared.interval is not None
    assert shared.interval == pytest.approx(means.interval, abs=0.3)
    assert independent.interval is not None
    assert shared.interval[1] - shared.interval[0] > 2.5 * (independent.interval[1] - independent.interval[0])
    assert shared.p is not None and means.p is not None and independent.p is not None
    assert independent.p < shared.p == pytest.approx(means.p, rel=0.2)


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


def test_examples_that_all_differ_alike_are_a_sign_test() -> None:
    ids, ones, part = tuple(map(str, range(26))), np.ones(26), Part("generative", "drop", "f1")
    won, nothing = (
        Units("FuseLLM", part, measure("f1"), ids, (0, 1), np.full((2, 26), top), ones, ones, (), "CLM")
        for top in (0.5, 0.0)
    )
    assert statistics.estimate([statistics.resample({0: won})[0]]).p == pytest.approx(2**-25)
    assert statistics.estimate([statistics.resample({0: nothing})[0]]).p == 1.0


def test_methods_that_disagree_about_what_examples_share_are_refused() -> None:
    shared, alone = by_context(40, 2)
    with pytest.raises(UserError, match="disagree about what examples of drop share"):
        statistics.contrast(shared, replace(alone, clusters=("",) * 40))
