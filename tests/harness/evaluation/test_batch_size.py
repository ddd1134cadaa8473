"""Answers of one artifact are generated with one batch size, also where it is measured and the run is interrupted."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from harness.evaluation import shared_prefix_lm
from harness.evaluation.lm_eval import requests, task_suite
from harness.evaluation.multipl_e import code_suite
from tests.harness.evaluation.measuring import measure
from tests.harness.suite_rows import make_data_root
from tests.harness.tiny_models import save_model

SECTIONS: dict[str, dict[str, Any]] = {
    "generative": {"tasks": ["triviaqa"], "num_fewshot": 0, "max_new_tokens": 3},
    "multipl_e": {"tasks": ["js"], "samples": 1, "max_new_tokens": 3, "execute": False},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "one", LlamaConfig, 400, 0, 6, max_position_embeddings=2048)


@pytest.mark.parametrize("name", SECTIONS)
def test_an_interrupted_artifact_goes_on_with_the_batch_size_that_was_measured(
    rows: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    suite, decoded, own = task_suite if name == "generative" else code_suite, list[int](), shared_prefix_lm.decode
    measured = 2

    def decode(*given: Any, rows: int, **more: Any) -> None:
        decoded.append(rows)
        own(*given, rows=rows, **more)

    def killed(path: Path, value: dict[str, Any]) -> None:
        append(path, value)
        raise KeyboardInterrupt

    monkeypatch.setattr(shared_prefix_lm, "decode", decode)
    monkeypatch.setattr(shared_prefix_lm.SharedPrefixLM, "_room", lambda self, length: measured)
    append = suite.append_line
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(suite, "append_line", killed)
        measure(name, SECTIONS[name], model, tmp_path, rows)
    measured = 3  # there is more memory now
    (path,) = measure(name, SECTIONS[name], model, tmp_path, rows).artifacts.values()
    assert decoded == [2, 2]
    assert requests.read_json(path / requests.BATCH_SIZE, "")["batch_size"] == 2
    # Another artifact of the same model is measured by itself, and a size that is set is kept.
    measure(name, {**SECTIONS[name], "seed": 1}, model, tmp_path, rows)
    measure(name, {**SECTIONS[name], "limit": 3, "batch_size": 1}, model, tmp_path, rows)
    assert decoded == [2, 2, 3, 1]


def test_tasks_that_began_with_several_batch_sizes_go_on_with_their_own(tmp_path: Path) -> None:
    folders = {task: tmp_path / task for task in "abc"}
    for task, size in {"a": 4, "b": 8}.items():
        folders[task].mkdir()
        requests.write_json(folders[task] / requests.BATCH_SIZE, {"batch_size": size})
    groups = {size: sorted(some) for size, some in requests.by_batch_size(folders, "auto")}
    assert groups == {4: ["a", "c"], 8: ["b"]}
    assert list(requests.by_batch_size(folders, 2)) == [(2, folders)]
    assert list(requests.by_batch_size({"c": folders["c"]}, "auto")) == [("auto", {"c": folders["c"]})]
