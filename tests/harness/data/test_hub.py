"""What is read from the hub is named by its commit, and it is that commit that is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from fusion.errors import UserError
from harness.config.schema import CorpusConfig
from harness.data import corpus, hub
from harness.evaluation.lm_eval.tasks import Overrides, find_source, load_rows, task_folder

CORPUS = CorpusConfig(path="owner/texts", revision="main")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[dict[str, Any]]]:
    """A hub whose every data set is at commit `c1`; gives the options of what is read."""
    asked: list[dict[str, Any]] = []

    def download(name: str, file: str, *, repo_type: str, revision: str) -> str:
        assert repo_type == "dataset"
        return str(tmp_path / name / "snapshots" / f"c1-of-{revision}" / file)

    def load(*names: str, **options: Any) -> list[dict[str, str]]:
        asked.append(options)
        return [{"text": "a text"}]

    monkeypatch.setattr(hub, "_answers", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(datasets, "load_dataset", load)
    hub.dataset_commit.cache_clear()
    yield asked
    hub.dataset_commit.cache_clear()


def test_a_corpus_is_named_and_read_by_its_commit(read: list[dict[str, Any]], tmp_path: Path) -> None:
    assert corpus.content_fingerprint(CORPUS, None, tmp_path / "record") == "hub:owner/texts@c1-of-main:default:train"
    other = CORPUS.model_copy(update={"revision": "v2"})
    assert corpus.content_fingerprint(other, None, tmp_path / "record") == "hub:owner/texts@c1-of-v2:default:train"
    assert [document.text for document in corpus.documents(CORPUS, None)] == ["a text"]
    assert [options["revision"] for options in read] == ["c1-of-main"]


def test_rows_are_named_and_read_by_their_commit(read: list[dict[str, Any]]) -> None:
    source = find_source("arc_easy", task_folder() / "arc/arc_easy.yaml", None, Overrides())
    assert source.identity()["data"] == "hub:allenai/ai2_arc@c1-of-main"
    assert load_rows("owner/rows", "default", "test", None) == [{"text": "a text"}]
    assert read[-1]["revision"] == "c1-of-main"


def test_a_data_set_without_a_page_is_named_by_its_commit(
    read: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*arguments: Any, **options: Any) -> str:
        raise EntryNotFoundError("no README.md")

    class Info:
        sha = "c2"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", missing)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *a, **o: Info)
    assert hub.dataset_fingerprint("owner/texts") == "hub:owner/texts@c2"


def test_an_unknown_commit_is_said(read: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(hub, "_answers", lambda: False)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert hub.dataset_fingerprint("owner/texts") == "hub:owner/texts@main (commit not known)"
    with pytest.raises(UserError, match="nor can it be read from the hub"):
        list(corpus.documents(CORPUS, None))
