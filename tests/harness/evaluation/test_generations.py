"""Files of completions and results that are read: what is refused, and what is counted."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import UserError
from harness.evaluation.multipl_e.generations import read_generations
from harness.evaluation.multipl_e.languages import cut
from harness.evaluation.multipl_e.scores import ProblemScore, check_samples, read_results, summary
from results.metrics import pass_at_k
from tests.harness.evaluation.programs import PROMPT, RIGHT, problem, write


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 2 is no JSON"),
        ("3", "line 2 is no JSON object"),
        (json.dumps(PROMPT), "line 2 cannot be executed: it lacks completions"),
        (json.dumps({"completions": []}), "lacks name, language, prompt, tests, stop_tokens"),
        (json.dumps(problem()), "has no completions"),
        (json.dumps(problem(RIGHT, tests=3)), "its tests is no text"),
        (json.dumps(problem(RIGHT, stop_tokens="\n")), "its stop_tokens are no list of texts"),
        (json.dumps(problem(RIGHT, language="pyhton")), "did you mean 'python'?"),
        (json.dumps(problem(RIGHT, language="java")), "tests do not end as MultiPL-E's for Java do"),
        (json.dumps(problem(RIGHT)), "line 2 repeats Python's HumanEval_53_add"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text(f"{json.dumps(problem(RIGHT))}\n{line}\n")
    with pytest.raises(UserError, match=r"g\.jsonl") as error:
        read_generations(path)
    assert sentence in str(error.value)


def test_files_without_problems_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        read_generations(tmp_path / "g.jsonl")
    (tmp_path / "g.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no problems"):
        read_generations(tmp_path / "g.jsonl")
    write(tmp_path / "g.jsonl", [problem(RIGHT)])
    with pytest.raises(UserError, match="is no result"):
        read_results(tmp_path / "g.jsonl")


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_mean_over_all_choices(samples: int, data: st.DataObject) -> None:
    passed, k = data.draw(st.integers(0, samples)), data.draw(st.integers(1, samples))
    choices = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
    assert pass_at_k(np.array(samples), np.array(passed), k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_needs_k_samples_before_anything_is_run(tmp_path: Path) -> None:
    from harness.cli.suite_commands import multipl_e_execute

    with pytest.raises(UserError, match="at least 5 samples"):
        check_samples(4, 5)
    path = write(tmp_path / "g.jsonl", [problem(RIGHT)])
    with pytest.raises(UserError, match="at least 2 samples"):
        multipl_e_execute(path, k=2, root=tmp_path)
    assert list(tmp_path.iterdir()) == [path]


@given(st.text("ab\n}"), st.lists(st.text("ab\n}", max_size=3), max_size=3))
def test_a_completion_ends_before_its_first_stop_token(completion: str, stops: list[str]) -> None:
    kept = cut(completion, stops)
    assert completion.startswith(kept)
    assert not any(stop in kept for stop in stops if stop)
    assert kept == completion or any(completion.startswith(stop, len(kept)) for stop in stops if stop)


def test_unsolvable_rows_count_and_are_named() -> None:
    examples = [
        ProblemScore("js", "HumanEval_51_remove_vowels", 2, 0, 0),
        ProblemScore("js", "HumanEval_53_add", 2, 1, 2),
    ]
    ((title, problems, samples, strict, by_exit, note),) = summary(examples, {}, 1)
    assert (title, problems, samples, strict, by_exit) == ("JavaScript", 2, "2", "0.2500", "0.5000")
    assert note == "cannot be solved as published: HumanEval_51_remove_vowels"
