"""Problems of MultiPL-E whose prompts do not fit a model's context are named and counted; the others are asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from fusion.errors import UserError
from harness.evaluation.multipl_e.code_suite import COMPLETIONS
from harness.evaluation.multipl_e.problems import read_problems
from harness.evaluation.suite import LimitedConfig, SuiteResult
from tests.harness.evaluation.measuring import measure
from tests.harness.suite_rows import write_rows
from tests.harness.tiny_models import save_model

CONTEXT = 256
JS = {"language": "js", "tests": "assert(true);", "stop_tokens": ["\n//"]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    rows = [{**JS, "name": f"HumanEval_{i}_f", "prompt": f"// {'x y ' * n}\nf("} for i, n in enumerate([1, 500, 2])]
    write_rows(root, "nuprl/MultiPL-E/humaneval-js/test.parquet", rows)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "short"
    return save_model(folder, LlamaConfig, 400, 0, 6, max_position_embeddings=CONTEXT)


def asked(model: Path, root: Path, data: Path, **changed: Any) -> tuple[SuiteResult, list[dict[str, Any]]]:
    section = {"tasks": ["js"], "samples": 2, "max_new_tokens": 8, "execute": False, **changed}
    measured = measure("multipl_e", section, model, root, data)
    (path,) = measured.artifacts.values()
    return measured, [json.loads(line) for line in (path / COMPLETIONS).read_text().splitlines()]


def test_a_prompt_that_does_not_fit_leaves_out_its_problem_and_not_its_language(
    model: Path, data: Path, tmp_path: Path
) -> None:
    measured, lines = asked(model, tmp_path, data)
    assert [line["name"] for line in lines] == ["HumanEval_0_f", "HumanEval_2_f"] and not measured.missing
    assert measured.skipped == {"js": ["HumanEval_1_f"]}
    assert measured.notes == [
        "short was not asked, and examples count for no row, where prompts do not fit its context of 256 tokens "
        "(overflow: skip): js 1 of 3."
    ]
    again, same = asked(model, tmp_path, data)
    assert (again.skipped, again.notes, same) == (measured.skipped, measured.notes, lines)


@pytest.mark.parametrize("rule", ["truncate_left", "shrink_answer"])
def test_by_the_other_rules_it_is_asked_and_counted(model: Path, data: Path, tmp_path: Path, rule: str) -> None:
    measured, lines = asked(model, tmp_path, data, overflow=rule)
    assert not measured.skipped and [bool(line.get("overflow")) for line in lines] == [False, True, False]
    overflow = lines[1]["overflow"]
    assert overflow["read"] + overflow["new"] == CONTEXT and f"(overflow: {rule}): js 1 of 3." in measured.notes[0]
    assert len(lines[1]["completions"]) == 2


def test_a_language_of_which_nothing_fits_is_missing(model: Path, data: Path, tmp_path: Path) -> None:
    measured, lines = asked(model, tmp_path, data, max_new_tokens=CONTEXT - 1)
    assert measured.missing == {"js": "none of its prompts fits the context"} and not lines
    assert measure("multipl_e", {"tasks": ["js"], "max_new_tokens": CONTEXT, "execute": False}, model, tmp_path, data
        ).missing == {"js": "up to 256 tokens are to be generated, which do not fit the context of 256; lower "
        "max_new_tokens"}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tests": 2**70}, r"test\.jsonl, row 2: its 'tests' is no text: put the rows of the hub there"),
        ({"stop_tokens": "\n"}, r"test\.jsonl, row 2: its 'stop_tokens' is no list of texts"),
        ({"prompt": None}, r"test\.jsonl, row 2 has no 'prompt' \(it has"),
    ],
)
def test_a_row_that_is_no_problem_is_named(tmp_path: Path, changed: dict[str, Any], sentence: str) -> None:
    good = {**JS, "name": "HumanEval_0_f", "prompt": "f("}
    write_rows(tmp_path, "nuprl/MultiPL-E/humaneval-js/test.jsonl", [good, {**good, **changed}])
    with pytest.raises(UserError, match=sentence):
        read_problems("js", tmp_path, LimitedConfig())
