"""What a suite's artifact gives a person to read, whatever was answered."""

from pathlib import Path
from typing import Any

import pytest

from harness.evaluation.lm_eval.examples import EXAMPLES
from harness.evaluation.multipl_e.code_suite import RESULTS
from harness.evaluation.suite import SUITES, write_lines

CHOICES: dict[str, Any] = {"example": "7", "question": "Which?", "choices": ["a", "abcd"], "target": 1}


def answers(suite: str, folder: Path, metric: str) -> list[tuple[str, str, str, str, float]]:
    return [(a.example, a.prompt, a.target, a.answer, a.score) for a in SUITES.get(suite).answers(folder, metric)]


@pytest.mark.parametrize(
    ("metric", "choices", "arrow"),
    [("acc", ["a", "abcd"], 0), ("acc_norm", ["a", "abcd"], 1), ("acc_norm", ["", "abcd"], 1), ("other", ["", "x"], 0)],
)
def test_the_arrow_is_at_the_choice_that_the_metric_takes(
    tmp_path: Path, metric: str, choices: list[str], arrow: int
) -> None:
    line = {**CHOICES, "choices": choices, "answer": [[-2.0, False], [-4.0, False]], "scores": {metric: 1.0}}
    write_lines(tmp_path / EXAMPLES, [line])
    ((example, prompt, target, text, score),) = answers("commonsense", tmp_path, metric)
    assert (example, prompt, target, score) == ("7", "Which?", choices[1], 1.0)
    lines = text.splitlines()
    assert [row.startswith("→") for row in lines] == [i == arrow for i in range(2)]
    assert lines[0].endswith("(-2.00 nats)") and lines[1].endswith("(-4.00 nats)")


def test_only_as_many_answers_as_choices_are_shown(tmp_path: Path) -> None:
    """Mutual information asks for every choice twice: with the question, and without."""
    answer = [[-2.0, False], [-1.0, False], [-9.0, False], [-9.0, False]]
    write_lines(tmp_path / EXAMPLES, [{**CHOICES, "answer": answer, "scores": {"acc": 1.0}}])
    ((_, _, _, text, _),) = answers("bbh", tmp_path, "acc")
    assert [row[0] for row in text.splitlines()] == [" ", "→"]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (["42"], "42"),
        ([[-1.5, True]], "the likeliest continuation (-1.50 nats)"),
        ([[-1.5, False]], "not the likeliest continuation (-1.50 nats)"),
    ],
)
def test_an_answer_without_choices_is_its_text(tmp_path: Path, answer: list[Any], text: str) -> None:
    line = {"example": "1", "question": None, "choices": None, "target": ["42", "forty-two"], "answer": answer}
    write_lines(tmp_path / EXAMPLES, [{**line, "scores": {"acc": 0.0}}])
    assert answers("generative", tmp_path, "acc") == [("1", "", "42, forty-two", text, 0.0)]


@pytest.mark.parametrize(("metric", "passing"), [("passed", 1), ("passed_exit", 2)])
def test_a_problem_shows_its_first_program(tmp_path: Path, metric: str, passing: int) -> None:
    program = "def f():\n    return 1\n\nassert f()"
    results = [
        {"program": program, "status": "OK", "strict": True, "exit_code": 0},
        {"program": program, "status": "OK", "strict": False, "exit_code": 0},
    ]
    write_lines(
        tmp_path / RESULTS, [{"name": "p", "prompt": "def f():\n", "tests": "\nassert f()", "results": results}]
    )
    expected = f"return 1\n\n[OK; {passing} of 2 samples pass]"
    assert answers("multipl_e", tmp_path, metric) == [
        ("p", "def f():\n", "programs that pass the tests", expected, passing / 2)
    ]


@pytest.mark.parametrize("suite", SUITES.names())
def test_an_artifact_without_answers_has_none(tmp_path: Path, suite: str) -> None:
    assert list(getattr(SUITES.get(suite), "answers", lambda *_: [])(tmp_path, "acc")) == []
