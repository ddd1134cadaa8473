"""Rows that a task cannot use are refused before a model reads any, in a sentence that names the file and the row."""

from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from harness.evaluation.lm_eval.tasks import Overrides, find_source, prepare, task_folder
from harness.evaluation.suite import LimitedConfig
from tests.harness.suite_rows import write_rows

TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "boolq": (
        "super_glue/boolq/default.yaml",
        "aps/super_glue/boolq/validation.jsonl",
        {"passage": "The fox is.", "question": "is the fox lazy", "label": 1},
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        "allenai/ai2_arc/ARC-Easy/test.jsonl",
        {"question": "Who?", "choices": {"text": ["a", "c"], "label": ["A", "B"]}, "answerKey": "A"},
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "Rowan/hellaswag/default/validation.jsonl",
        {"activity_label": "B", "ctx_a": "S", "ctx_b": "they", "endings": ["a", "b", "c", "d"], "label": "1"},
    ),
    "triviaqa": (
        "triviaqa/default.yaml",
        "mandarjoshi/trivia_qa/rc.nocontext/validation.jsonl",
        {"question": "Who?", "answer": {"value": "Fox", "aliases": ["fox"]}, "unread": None},
    ),
}


@pytest.mark.parametrize(
    ("task", "column", "value", "why"),
    [
        ("boolq", "label", 2**70, "an integer beyond 64 bits as its 'label'"),
        ("boolq", "label", 7, "its answer 7 is none of its 2 choices"),
        ("boolq", "label", -1, "its answer -1 is none of its 2 choices"),
        ("boolq", "label", None, "its answer None is none of its 2 choices"),
        ("boolq", "label", "x", "its answer 'x' is none of its 2 choices"),
        ("arc_easy", "answerKey", "Z", "'Z' is not in list"),
        ("arc_easy", "answerKey", 2**70, "an integer beyond 64 bits as its 'answerKey'"),
        ("arc_easy", "choices", None, "'None' has no attribute"),
        ("hellaswag", "label", "9", "its answer 9 is none of its 4 choices"),
        ("hellaswag", "label", "x", "invalid literal for int"),
        ("hellaswag", "endings", None, "not iterable"),
        ("boolq", "passage", None, "its 'passage' is null, and its question would say None"),
        ("boolq", "question", None, "its 'question' is null, and its question would say None"),
        ("arc_easy", "question", None, "its 'question' is null, and its question would say None"),
        (
            "arc_easy",
            "choices",
            {"text": ["a", None], "label": ["A", "B"]},
            "its 'choices' is null, and its choices would",
        ),
        ("triviaqa", "question", None, "its 'question' is null, and its question would say None"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, task: str, column: str, value: Any, why: str) -> None:
    yaml, place, good = TASKS[task]
    path = write_rows(tmp_path, place, [good, good, {**good, column: value}, good])
    source = find_source(task, task_folder() / yaml, tmp_path, Overrides(0))
    with pytest.raises(UserError) as refused:
        prepare([source], LimitedConfig())
    sentence = str(refused.value)
    assert str(path) in sentence and "row 3" in sentence and why in sentence, sentence


def test_an_empty_choice_of_the_first_row_is_named(tmp_path: Path) -> None:
    yaml, place, good = TASKS["arc_easy"]
    empty = {**good, "choices": {"text": ["", "a"], "label": ["A", "B"]}}
    path = write_rows(tmp_path, place, [empty, good])
    with pytest.raises(UserError) as refused:
        prepare([find_source("arc_easy", task_folder() / yaml, tmp_path, Overrides(0))], LimitedConfig())
    said = f"the rows of {path} (row 1: one of its choices is empty): correct that row"
    assert said in str(refused.value)


def test_good_rows_are_taken(tmp_path: Path) -> None:
    for task, (yaml, place, good) in TASKS.items():
        write_rows(tmp_path, place, [good, good])
        (prepared,) = prepare([find_source(task, task_folder() / yaml, tmp_path, Overrides(0))], LimitedConfig())[
            0
        ].values()
        assert len(prepared.examples) == 2
