"""The metadata of model cards names hub ids and licences, and leaves out what is not known."""

import json
from pathlib import Path

import pytest
import yaml

from harness.models.card import card_metadata
from harness.models.manifest import MANIFEST
from harness.models.resolution import ModelSpec, ResolvedModel


def _model(folder: Path, name: str) -> ResolvedModel:
    return ResolvedModel(folder, Path(name).name, "0" * 64, ModelSpec(name=name))


def _metadata(model: ResolvedModel, corpus: str = "owner/set") -> dict[str, object]:
    first, header, rest = card_metadata(model, corpus=corpus, tags=["fusellm"]).split("---\n")
    assert (first, rest) == ("", "")
    values: dict[str, object] = yaml.safe_load(header)
    return values


@pytest.mark.parametrize(
    ("name", "hub", "licence"),
    [
        ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("google/gemma-3-270m", "google/gemma-3-270m", "gemma"),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", "llama2"),
    ],
)
def test_a_model_of_the_catalogue_is_named_by_its_hub_id(name: str, hub: str, licence: str, tmp_path: Path) -> None:
    metadata = _metadata(_model(tmp_path, name))
    assert (metadata["base_model"], metadata["license"]) == (hub, licence)
    assert metadata["datasets"] == ["owner/set"]
    assert metadata["tags"] == ["fusellm-harness", "fusellm"]


def test_a_fetched_model_is_described_by_its_manifest(tmp_path: Path) -> None:
    manifest = {"source": {"kind": "hub", "hub": "owner/model"}, "licence": "My licence 2"}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    metadata = _metadata(_model(tmp_path, "owner/model"))
    assert metadata["base_model"] == "owner/model"
    assert (metadata["license"], metadata["license_name"]) == ("other", "My licence 2")


@pytest.mark.parametrize("corpus", ["stdlib:micro", "/data/train", "text.jsonl"])
def test_what_is_not_on_the_hub_is_left_out(corpus: str, tmp_path: Path) -> None:
    metadata = _metadata(_model(tmp_path, str(tmp_path)), corpus)
    assert not {"base_model", "license", "datasets"} & metadata.keys()


def test_a_local_folder_is_no_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "datasets" not in _metadata(_model(tmp_path, str(tmp_path)), "data/train")
