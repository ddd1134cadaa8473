"""An example that cannot be answered or scored is named and counted, stops nothing else, and is tried again."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from fusion.errors import UserError
from harness.evaluation.lm_eval import requests, task_suite
from harness.evaluation.lm_eval.examples import EXAMPLES
from harness.evaluation.overflow import WrongRow
from harness.evaluation.shared_prefix_lm import SharedPrefixLM
from harness.evaluation.suite import SuiteResult
from harness.store.files import read_json
from tests.harness.evaluation.measuring import measure
from tests.harness.suite_rows import make_data_root, write_rows
from tests.harness.tiny_models import save_model


class _Lm:
    """Answers a prompt by itself, but refuses the whole call for one in `bad`."""

    def __init__(self, bad: Sequence[str]) -> None:
        self.bad, self.calls = bad, 0

    def set_cache_hook(self, hook: Any) -> None: ...

    def generate_until(self, some: list[Instance], disable_tqdm: bool) -> list[str]:
        self.calls += 1
        if refused := [request for request in some if request.args[0] in self.bad]:
            raise TypeError(f"no text: {refused[0].args[0]}")
        return [request.args[0] for request in some]


def _answer(n: int, bad: Sequence[str]) -> tuple[_Lm, list[str], dict[str, str]]:
    examples = {str(i): [Instance("generate_until", {}, (str(i), {"until": []}), 0)] for i in range(n)}
    lm, finished, failed = _Lm(bad), list[str](), dict[str, str]()
    requests.answer_requests(lm, examples, finished.append, lambda key, error: failed.update({key: str(error)}))
    return lm, sorted(finished, key=int), failed


def test_a_request_that_cannot_be_answered_is_found_among_the_others() -> None:
    lm, finished, failed = _answer(100, ["17", "18", "70"])
    assert failed == {bad: f"no text: {bad}" for bad in ("17", "18", "70")}
    assert finished == [str(i) for i in range(100) if str(i) not in failed]
    assert lm.calls < 50


def test_a_model_that_answers_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match=r"More than 8 examples .*the last of them 8, TypeError: no text"):
        _answer(100, [str(i) for i in range(100)])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "one", LlamaConfig, 400, 0, 6, max_position_embeddings=2048)


def test_the_other_examples_and_tasks_are_finished(
    rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = task_suite.scored_line

    def scored(prepared: Any, example: str, *rest: Any) -> Any:
        if prepared.source.name == "arc_easy" and example in ("00001", "00003"):
            raise ZeroDivisionError("division by zero")
        return score(prepared, example, *rest)

    monkeypatch.setattr(task_suite, "scored_line", scored)

    def run() -> SuiteResult:
        return measure("commonsense", {"tasks": ["arc_easy", "boolq"]}, model, tmp_path, rows)

    first = run()
    assert first.missing == {
        "arc_easy": "2 of 5 examples cannot be scored (first 00001, ZeroDivisionError: division by zero); the others "
        "are kept, and the same command tries these again"
    }
    assert set(first.artifacts) == {"boolq"} and {example.task for example in first.examples()} == {"boolq"}
    (kept,) = tmp_path.glob("artifacts/commonsense/.*.partial/parts/kept-00000.json")
    assert [line["example"] for line in read_json(kept, "")[EXAMPLES]] == ["00000", "00002", "00004"]
    monkeypatch.setattr(task_suite, "scored_line", score)
    asked: list[str] = []
    answer = task_suite.answer_requests
    monkeypatch.setattr(
        task_suite, "answer_requests", lambda lm, pending, *rest: (asked.extend(pending), answer(lm, pending, *rest))
    )
    second = run()
    assert second.missing == {} and set(second.artifacts) == {"arc_easy", "boolq"}
    assert asked == ["00001", "00003"]


def _spanning(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer, saved into a model's folder, whose pieces span words and which strips spaces at the end."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Strip(left=False), normalizers.Replace(" ", "_")])
    text = [f"Question: Who {i}?\nAnswer: the {word}" for i in range(9) for word in ("dog", "fox")] * 5
    special = ["<unk>", "</s>"]
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=200, special_tokens=special, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("shared", [True, False])
def test_a_choice_that_joins_the_prompt_is_encoded_by_itself(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    tokenizer = _spanning(folder)
    prompt = "Question: Who 1?\nAnswer:"
    assert len(tokenizer.encode(prompt + " the dog")) <= len(tokenizer.encode(prompt))
    lm = SharedPrefixLM(AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer, label="one")
    if not shared:
        monkeypatch.setattr(lm, "reader", None)
    asked = [Instance("loglikelihood", {}, (prompt, f" the {word}"), 0) for word in ("dog", "fox")]
    got = lm.loglikelihood(asked, disable_tqdm=True)
    before = tokenizer.encode(prompt)
    for word, (score, _) in zip(("dog", "fox"), got, strict=True):
        alone = tokenizer.encode(f" the {word}")
        with torch.no_grad():
            of_all = lm.model(torch.tensor([before + alone])).logits[0].log_softmax(-1)
        wanted = sum(float(of_all[len(before) + i - 1, token]) for i, token in enumerate(alone))
        assert score == pytest.approx(wanted, abs=1e-4)


def test_a_choice_without_a_token_is_named(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    _spanning(folder)
    good = {"question": "Who 1?", "choices": {"text": ["the dog", "the fox"], "label": ["A", "B"]}, "answerKey": "A"}
    blank = {**good, "choices": {"text": ["the dog", "  "], "label": ["A", "B"]}}
    write_rows(tmp_path / "data", "allenai/ai2_arc/ARC-Easy/test.parquet", [good, blank, good])
    result = measure("commonsense", {"tasks": ["arc_easy"]}, folder, tmp_path / "root", tmp_path / "data")
    assert result.missing == {
        "arc_easy": "1 of 3 examples cannot be scored (first row 2, its choice '   ' has no token of model); correct "
        "that row"
    }


def test_a_choice_without_a_token_after_no_prompt_is_named(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    lm = SharedPrefixLM(AutoModelForCausalLM.from_pretrained(folder).eval(), _spanning(folder), label="one")
    good, blank = (Instance("loglikelihood", {}, ("", text), 0) for text in ("the dog", "  "))
    assert lm.loglikelihood([good], disable_tqdm=True)[0][0] < 0
    with pytest.raises(WrongRow, match="its choice '  ' has no token of one"):
        lm.loglikelihood([good, blank], disable_tqdm=True)


def test_a_log_likelihood_that_is_no_number_has_no_score(
    rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an LM that does not check its logits gives it; minus infinity is one, of a token that cannot be."""

    def loglikelihood(self: Any, some: list[Instance], disable_tqdm: bool) -> list[tuple[float, bool]]:
        return [(float("-inf" if r.doc_id % 2 else "nan" if r.doc_id else "-1"), False) for r in some]

    monkeypatch.setattr(SharedPrefixLM, "loglikelihood", loglikelihood)
    result = measure("commonsense", {"tasks": ["arc_easy"], "limit": 3}, model, tmp_path, rows)
    assert (
        "1 of 3 examples cannot be scored (first 00002, ValueError: its log-likelihood is not a number)"
        in (result.missing["arc_easy"])
    )
    result = measure("commonsense", {"tasks": ["arc_easy"], "limit": 2}, model, tmp_path, rows)
    assert len({example.example for example in result.examples()}) == 2


@pytest.mark.parametrize(
    "name",
    [
        "data [old]",
        "x::y",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("a*b?", "sp ace", "100%20", "été", "#1", "{a,b}", "~tilde", ".hidden", "a:b")
        ),
    ],
)
def test_rows_are_read_from_any_path_without_a_cache(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` takes a path for a pattern or an address, and wants a folder that can be written."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/proc/nothing/can/be/here"))
    data = make_data_root(tmp_path / name)
    section = {"tasks": ["arc_easy", "boolq"], "limit": 1}
    result = measure("commonsense", section, model, tmp_path / "root", data)
    assert result.missing == {} and len(list(result.examples())) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"passage": ' + "[" * 100_000 + "}", "line 2 is not JSON in UTF-8 .it is nested too deeply"),
        ("\0" * 30, "line 2 is not JSON in UTF-8"),
        ("[1, 2]", "line 2 is no JSON object: correct that line"),
        ('{"passage": "x", "question": "y"', "line 2 is not JSON in UTF-8 .Expecting"),
        ('{"frage": "y"}', "give them the columns of"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(line: str, said: str, model: Path, tmp_path: Path) -> None:
    data = make_data_root(tmp_path / "data")
    path = data / "aps/super_glue/boolq/validation.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first}\n{line}\n" if "frage" not in line else line)
    with pytest.raises(UserError, match=said) as refused:
        measure("commonsense", {"tasks": ["boolq"]}, model, tmp_path, data)
    assert str(path) in str(refused.value)
