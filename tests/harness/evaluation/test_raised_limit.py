"""Another `limit` asks for the examples that have no answer yet, and for no other."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from harness.evaluation.lm_eval import requests
from harness.evaluation.lm_eval.examples import EXAMPLES
from harness.evaluation.multipl_e.code_suite import COMPLETIONS
from harness.evaluation.suite import BATCH_SIZE, read_lines
from harness.store.files import read_json
from tests.harness.evaluation.test_suites import measure
from tests.harness.suite_rows import make_data_root
from tests.harness.tiny_models import save_model

SECTIONS: dict[str, dict[str, Any]] = {
    "generative": {"tasks": ["triviaqa"], "num_fewshot": 2, "max_new_tokens": 3},
    "commonsense": {"tasks": ["arc_easy"]},
    "multipl_e": {"tasks": ["js"], "samples": 2, "max_new_tokens": 3, "execute": False},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_data_root(tmp_path_factory.mktemp("data"), 6)
    (root / "mandarjoshi/trivia_qa/rc.nocontext/train.jsonl").write_bytes(
        (root / "mandarjoshi/trivia_qa/rc.nocontext/validation.jsonl").read_bytes()
    )
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "one", LlamaConfig, 400, 0, 6, max_position_embeddings=2048)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many examples or samples each run asked for."""
    counts: list[int] = []
    own = requests.drop_unanswerable

    def counted(lm: Any, examples: dict[Any, Any], dropped: Any) -> Any:
        counts.append(len(examples))
        return own(lm, examples, dropped)

    for module in ("lm_eval.task_suite", "multipl_e.code_suite"):
        monkeypatch.setattr(f"harness.evaluation.{module}.drop_unanswerable", counted)
    yield counts


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_answers_are_taken_over(rows: Path, model: Path, tmp_path: Path, asked: list[int], name: str) -> None:
    file, samples = (COMPLETIONS, 2) if name == "multipl_e" else (EXAMPLES, 1)

    def run(root: Path, **changed: Any) -> tuple[Path, list[Any]]:
        (path,) = measure(name, {**SECTIONS[name], **changed}, model, root, rows).artifacts.values()
        return path, sorted(read_lines(path / file), key=lambda line: str(line.get("example", line.get("name"))))

    first, _ = run(tmp_path, limit=2)
    raised, lines = run(tmp_path, limit=5)
    _, lowered = run(tmp_path, limit=3)
    assert asked[:2] == [2 * samples, 3 * samples] and len(asked) == 2  # the third run has all it needs
    assert lowered == lines[:3]
    assert lines == run(tmp_path / "anew", limit=5)[1]
    if name != "commonsense":
        assert read_json(raised / BATCH_SIZE, "") == read_json(first / BATCH_SIZE, "")
    # Answers with another batch size, other settings of an answer, or damaged ones are not taken.
    del asked[:]
    if name != "commonsense":
        run(tmp_path, limit=4, batch_size=1)
        assert asked.pop() == 4 * samples
    run(tmp_path, limit=2, seed=1)
    assert asked.pop() == 2 * samples
    for path in raised.parent.glob("*/*.jsonl"):
        path.write_text("damaged")
    run(tmp_path, limit=1)
    assert asked == [samples]


def test_more_samples_are_added(rows: Path, model: Path, tmp_path: Path, asked: list[int]) -> None:
    for n in (1, 3, 2):
        measure("multipl_e", {**SECTIONS["multipl_e"], "samples": n, "limit": 2}, model, tmp_path, rows)
    assert asked == [2, 4]


def test_a_draw_takes_over_what_it_has_in_common(rows: Path, model: Path, tmp_path: Path, asked: list[int]) -> None:
    section = {**SECTIONS["commonsense"], "limit_by": "seed"}
    measure("commonsense", {**section, "limit": 3}, model, tmp_path, rows)
    measure("commonsense", {**section, "limit": 5}, model, tmp_path, rows)
    measure("commonsense", SECTIONS["commonsense"], model, tmp_path, rows)
    assert asked == [3, 2, 1]
