"""Tuning: which values are tried and which win, of any settings."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baselines.method import Candidate
from baselines.training import MixedParameters, TrainedParameters
from baselines.tuning import MOST_COMBINATIONS, tuned
from fusion.errors import UserError

Values = dict[str, Any]


@dataclass
class _Context:
    """Knows how good every candidate is, and notes what is trained as a pilot and what as a row."""

    score: Callable[[Values], float]
    label: str = "row"
    seed: int = 7
    share: float = 1.0
    trained: list[tuple[float, int, str, Values]] = field(default_factory=list)

    def pilot(self, share: float, label: str) -> "_Context":
        return _Context(self.score, label, 0, share, self.trained)

    def relabelled(self, label: str) -> "_Context":
        return _Context(self.score, label, self.seed, self.share, self.trained)

    def candidate(self, name: str) -> Candidate:
        return Candidate(Path(f"{name} with seed {self.seed}"), name, True)

    def train(self, *, lam: float, training: Values, start: Candidate | None = None, **_: Any) -> Candidate:
        values = {"lambda": lam, **training, **({} if start is None else {"start": str(start.folder)})}
        self.trained.append((self.share, self.seed, self.label, values))
        return Candidate(Path(repr(values)), repr(values), True)

    def validation_nll(self, candidate: Candidate) -> float:
        return self.score(eval(candidate.fingerprint))

    @property
    def pilots(self) -> list[Values]:
        return [values for share, *_, values in self.trained if share < 1]


def _tune(tunes: dict[str, Sequence[float]], score: Callable[[Values], float]) -> tuple[Candidate, _Context]:
    context: Any = _Context(score)
    return tuned(context, tunes, lambda c, values: c.train(lam=1.0, training=values)), context


SETTINGS = st.dictionaries(
    st.sampled_from("abc"), st.lists(st.floats(0, 9), min_size=2, max_size=5, unique=True), min_size=1
)


@given(SETTINGS, st.randoms())
def test_the_best_pilot_wins_and_is_trained_once_more_on_all(tunes: dict[str, Sequence[float]], random: Any) -> None:
    weights = {name: random.uniform(-1, 1) for name in tunes}
    # Settings that do not depend on one another: one after the other finds the best, too.
    score = lambda values: 3 + sum(weights[name] * values[name] for name in tunes)  # noqa: E731
    candidate, context = _tune(tunes, score)
    tuning = candidate.tuning
    assert tuning is not None and tuning.known
    best = {name: min(values, key=lambda value: weights[name] * value) for name, values in tunes.items()}
    assert score(dict(zip(tunes, tuning.chosen, strict=True))) == pytest.approx(score(best))
    combinations = math.prod(len(values) for values in tunes.values())
    assert tuning.every == (combinations <= MOST_COMBINATIONS)
    one_by_one = 1 + sum(len(values) - 1 for values in tunes.values())
    assert len(context.pilots) == len(tuning.tried) == (combinations if tuning.every else one_by_one)
    assert [(share, seed) for share, seed, *_ in context.trained][-1] == (1.0, 7)
    assert {seed for share, seed, *_ in context.trained if share < 1} == {0}
    assert eval(candidate.fingerprint) == {"lambda": 1.0, **dict(zip(tunes, tuning.chosen, strict=True))}


def test_of_equal_pilots_the_first_wins() -> None:
    candidate, _ = _tune({"a": [3.0, 1.0, 2.0]}, lambda values: 1.0)
    assert candidate.tuning is not None and candidate.tuning.chosen == (3.0,)


def test_a_pilot_that_diverges_loses() -> None:
    candidate, _ = _tune({"a": [1.0, 2.0]}, lambda values: math.inf if values["a"] == 1 else 2.0)
    assert candidate.tuning is not None and candidate.tuning.chosen == (2.0,)
    assert candidate.tuning.sentence().startswith("a 2 of 1, 2 (diverged, 2.8854 bits per byte of validation text")
    with pytest.raises(UserError, match="row: every pilot diverges: lower the learning rates"):
        _tune({"a": [1.0, 2.0]}, lambda values: math.inf)


@pytest.mark.parametrize("n", [2, 5])
def test_a_plan_has_the_pilots_and_one_training_with_the_first_values(n: int) -> None:
    candidate, context = _tune({name: list(range(1, n + 1)) for name in "ab"}, lambda values: math.nan)
    assert candidate.tuning is not None and not candidate.tuning.known
    *_, (share, _, label, values) = context.trained
    assert share == 1 and values == {"lambda": 1.0, "a": 1, "b": 1}
    assert label == "row (with the first values: the pilots will choose)"
    assert len(context.pilots) == (4 if n == 2 else 9)


def test_lambda_and_training_are_tuned_together_from_another_row() -> None:
    context: Any = _Context(lambda values: -values["lambda"] - values["epochs"])
    given: Any = {
        "lambda": {"tune": [0.5, 0.9]},
        "training": {"epochs": {"tune": [2, 1]}, "weight_decay": 0},
        "warm_start": "CLM",
    }
    MixedParameters(**given).train_mixed(context, None)  # type: ignore[arg-type]
    assert context.pilots == [
        {"lambda": lam, "weight_decay": 0, "epochs": epochs, "start": "CLM with seed 0"}
        for lam in (0.5, 0.9)
        for epochs in (2, 1)
    ]
    share, _, label, values = context.trained[-1]
    assert (share, label) == (1, "row")
    assert values == {"lambda": 0.9, "weight_decay": 0, "epochs": 2, "start": "CLM with seed 7"}


def test_what_is_not_tuned_has_no_pilots() -> None:
    context: Any = _Context(lambda values: 1.0)
    candidate = TrainedParameters(training={"epochs": 2}).train(context, lam=1.0)  # type: ignore[arg-type]
    assert candidate.tuning is None and len(context.trained) == 1
