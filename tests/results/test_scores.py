"""Right and wrong answers, samples that pass, and examples that share a passage or a problem."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from results import statistics
from results.errors import UserError
from results.layout import Part
from results.metrics import measure
from results.statistics import Units
from tests.results.estimating import frame
from tests.results.sample import scores


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
