"""Answers of one artifact are generated with one batch size, also where it is measured and the run is interrupted."""

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from harness.evaluation import shared_prefix_lm
from harness.evaluation.lm_eval import parts, requests
from harness.store.leases import Leases
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
    decoded, own, write = list[int](), shared_prefix_lm.decode, parts.write_json
    measured = 2

    def decode(*given: Any, rows: int, **more: Any) -> None:
        decoded.append(rows)
        own(*given, rows=rows, **more)

    def killed(path: Path, value: dict[str, Any]) -> None:
        write(path, value)
        if path.name == "part-00000.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(parts, "REQUESTS", 2)

    monkeypatch.setattr(shared_prefix_lm, "decode", decode)
    monkeypatch.setattr(shared_prefix_lm.SharedPrefixLM, "_room", lambda self, length: measured)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parts, "write_json", killed)
        measure(name, SECTIONS[name], model, tmp_path, rows)
    measured = 3  # there is more memory now
    (path,) = measure(name, SECTIONS[name], model, tmp_path, rows).artifacts.values()
    assert len(decoded) > 1 and set(decoded) == {2}
    assert requests.read_json(path / requests.BATCH_SIZE, "")["batch_size"] == 2
    # Another artifact of the same model is measured by itself, and a size that is set is kept.
    for settings, size in ({"seed": 1}, 3), ({"limit": 3, "batch_size": 1}, 1):
        decoded.clear()
        measure(name, {**SECTIONS[name], **settings}, model, tmp_path, rows)
        assert set(decoded) == {size}


def test_artifacts_that_began_with_several_batch_sizes_go_on_with_their_own(tmp_path: Path) -> None:
    for folder, size in {"a": 4, "b": 8, "c": None}.items():
        (tmp_path / folder).mkdir()
        if size is not None:
            requests.write_json(tmp_path / folder / requests.BATCH_SIZE, {"batch_size": size})
    (tmp_path / "leases").mkdir()
    with Leases(tmp_path / "leases") as leases:
        sizes = [requests.settled_batch_size(tmp_path / folder, leases, lambda: 2) for folder in "abc"]
        assert sizes == [4, 8, 2] and requests.settled_batch_size(tmp_path / "c", leases, lambda: 3) == 2
