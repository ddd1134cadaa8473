"""Which examples a suite measures, what they share, and what of a problem a model is asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.evaluation.lm_eval.examples import context_of
from harness.evaluation.multipl_e.code_suite import MultiplE, MultiplEConfig
from harness.evaluation.multipl_e.languages import original_name
from harness.evaluation.perplexity import Perplexity
from harness.evaluation.suite import LimitedConfig, suite_config
from harness.evaluation.vote import chosen_indices, voted
from tests.harness.suite_rows import write_rows

TEXT = "The fox jumps over the dog."


@pytest.mark.parametrize(
    ("dataset", "row"),
    [
        ("EleutherAI/drop", {"id": "1", "passage": TEXT, "question": "Who jumps?"}),
        ("aps/super_glue", {"passage": TEXT, "question": "does the fox jump", "idx": 3}),
        ("lighteval/squad_v2", {"id": "5", "title": "Fox", "context": TEXT, "question": "Who?"}),
        ("nyu-mll/multi_nli", {"premise": TEXT, "hypothesis": "A dog jumps."}),
        ("EleutherAI/race", {"article": TEXT, "problems": "[]"}),
        ("EleutherAI/coqa", {"story": TEXT, "questions": {"input_text": ["Who?"]}}),
    ],
)
def test_questions_about_one_text_have_one_cluster(dataset: str, row: dict[str, Any]) -> None:
    (column,) = [name for name, value in row.items() if value == TEXT]
    asked_again = {**row, "id": "2", "question": "What?", "hypothesis": "It does not."}
    assert context_of(row, dataset) == context_of(asked_again, dataset) == context_of({"passage": TEXT}, None) != ""
    assert context_of({**row, column: "Another text."}, dataset) != context_of(row, dataset)


def test_examples_by_themselves_have_no_cluster() -> None:
    assert context_of({"question": "Who?", "context": "", "passage": None}, "mandarjoshi/trivia_qa") == ""
    # HellaSwag cuts several contexts from one video or article; rows without its name stand by themselves.
    one, other = ({"source_id": "wikihow~7", "ctx": ctx, "context": ctx} for ctx in ("a", "b"))
    assert context_of(one, "Rowan/hellaswag") == context_of(other, "Rowan/hellaswag") != ""
    assert context_of({"ctx": "a"}, "Rowan/hellaswag") == ""


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("HumanEval_53_add", "HumanEval_53"),
        ("mbpp_3_is_not_prime", "mbpp_3"),
        ("HumanEval_7", "HumanEval_7"),
        ("f", "f"),
    ],
)
def test_a_problem_has_one_name_in_all_languages(name: str, original: str) -> None:
    assert original_name(name) == original


def test_documents_of_one_name_are_parts_of_one_text(tmp_path: Path) -> None:
    rows = [
        {"text": f"text {i}", "speech": speech, "source": source}
        for i, (speech, source) in enumerate([("a", "x"), ("a", "x"), ("b", "x"), ("a", "y"), ("", "x"), ("", "x")])
    ]
    path = write_rows(tmp_path, "text.jsonl", rows)
    documents = {"path": str(path), "name_column": "speech", "domain_column": "source"}
    suite = Perplexity(suite_config("perplexity", {"documents": documents}), None)  # type: ignore[arg-type]
    measured = [{"domain": d.domain, "example": d.sha256, "nats": 1.0, "bytes": 2, "lost": 0} for d in suite.documents]
    assert [example.cluster for example in suite._examples(measured)] == ["x/a", "x/a", "", "", "", ""]


def test_a_limit_takes_the_first_or_draws_and_a_greater_one_only_adds() -> None:
    names = [f"{i:05d}" for i in range(500)]

    def taken(limit: int | None, **settings: Any) -> list[int]:
        return LimitedConfig(limit=limit, **settings).taken(names)

    assert taken(3) == [0, 1, 2] and taken(None, limit_by="seed") == list(range(500))
    few, more, other = taken(20, limit_by="seed"), taken(50, limit_by="seed"), taken(50, limit_by="seed", seed=1)
    assert few == sorted(few) and set(few) < set(more) and len(more) == 50
    assert len(set(more) & set(other)) < 20 and max(more) > 400
    assert LimitedConfig(limit=3, seed=1).limit_identity() == LimitedConfig(limit=3).limit_identity()
    keys = [
        LimitedConfig(limit=3, limit_by=by, seed=seed).limit_identity()
        for by, seed in (("first", 0), ("seed", 0), ("seed", 1))
    ]
    assert len({str(key) for key in keys}) == 3


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., list[str]]:
    rows = [
        {
            "name": f"HumanEval_{i}_f{i}",
            "prompt": "//\nfunction f() {\n",
            "tests": "f();",
            "stop_tokens": ["\nfunction"],
        }
        for i in range(30)
    ]
    for language in ("js", "ts"):
        # Languages lack some of the problems.
        write_rows(tmp_path, f"nuprl/MultiPL-E/humaneval-{language}/test.jsonl", rows[: 30 if language == "js" else 27])

    def names(language: str, **settings: Any) -> list[str]:
        suite = MultiplE(MultiplEConfig(**settings), tmp_path)
        return [problem["name"] for problem in suite.problems(language)]

    return names


def test_a_draw_takes_the_same_problems_of_every_language(problems: Callable[..., list[str]]) -> None:
    js, ts = (problems(language, limit=10, limit_by="seed", seed=4) for language in ("js", "ts"))
    assert len(js) == len(ts) == 10 and len(set(js) & set(ts)) >= 7
    assert problems("js", limit=3) == ["HumanEval_0_f0", "HumanEval_1_f1", "HumanEval_2_f2"]


def test_a_model_continues_the_stripped_prompt_as_in_multipl_es_own_tools() -> None:
    problem = {"name": "HumanEval_0_f", "prompt": '\n\ndef f():\n    """Doc."""\n', "tests": "", "stop_tokens": []}
    request = MultiplE(MultiplEConfig(samples=1), None)._request(problem, 0)
    assert request.args[0] == 'def f():\n    """Doc."""' and request.doc["prompt"] == problem["prompt"]


def test_a_vote_keeps_what_examples_share() -> None:
    line = {
        "example": "1",
        "cluster": "text",
        "scores": {"acc": 1.0},
        "answer": [[-1.0, True], [-2.0, False]],
        "choices": ["a", "b"],
    }
    (example,) = voted("boolq", [([line], 1.0)], chosen_indices)
    assert example.cluster == "text"


def test_a_choice_without_characters_is_never_the_likeliest_per_character() -> None:
    line = {"answer": [[-0.5, True], [-8.0, False]], "choices": ["", "abcd"]}
    assert chosen_indices(line) == {"acc": 0, "acc_norm": 1}
