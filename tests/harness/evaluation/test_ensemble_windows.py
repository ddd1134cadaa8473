"""Documents of which a member of an ensemble cannot read a window count for no row, and are named."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig

from harness.config.validation import suite_config
from harness.evaluation.perplexity import Perplexity
from harness.store.artifacts import Store
from harness.store.costs import Costs
from tests.harness.evaluation.test_joint_model import evaluated, together
from tests.harness.tiny_models import save_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The second needs some five tokens for one of the first, and has three times the positions of a window."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "coarse": save_model(folder / "coarse", LlamaConfig, 400, 0, 6),
        "fine": save_model(folder / "fine", LlamaConfig, 260, 1, 6, max_position_embeddings=96),
    }


def test_what_a_member_cannot_read_is_left_out_and_counted(models: dict[str, Path], tmp_path: Path) -> None:
    texts = {"short": "the ale", "long": "seven wizards brew potent ale while the lazy dogs jump " * 3, "tiny": "ale"}
    source = {"short": "a", "long": "a", "tiny": "b"}
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": text, "name": name, "source": source[name]}) + "\n" for name, text in texts.items())
    )
    documents = {"path": str(tmp_path / "text.jsonl"), "name_column": "name", "domain_column": "source"}
    config = suite_config("perplexity", {"documents": documents, "window": 32})
    suite = Perplexity(config, tmp_path)  # type: ignore[arg-type]
    (long,) = [document.sha256 for document in suite.documents if document.name == "long"]
    ensemble = together(models, tmp_path)
    measured = suite.measure(ensemble, Store(tmp_path / "artifacts"), Costs("cpu"))
    assert measured.skipped == {"a": [long]} and not measured.missing
    (note,) = [note for note in measured.notes if "did not read" in note]
    assert note.startswith("E did not read documents, and these count for no row, of which a window of 32 tokens ")
    assert note.endswith(": a 1 of 2.")
    found = {example.example: example.numerator for example in measured.examples()}
    assert set(found) == {document.sha256 for document in suite.documents} - {long}
    # A single model reads them all, and where the window is short enough the ensemble does, too.
    alone = suite.measure(evaluated(models["coarse"], tmp_path), Store(tmp_path / "artifacts"), Costs("cpu"))
    assert not alone.skipped and long in {example.example for example in alone.examples()}
    shorter = suite_config("perplexity", {"documents": documents, "window": 8})
    again = Perplexity(shorter, tmp_path).measure(ensemble, Store(tmp_path / "artifacts"), Costs("cpu"))  # type: ignore[arg-type]
    assert not again.skipped and long in {example.example for example in again.examples()}


def test_a_domain_of_which_nothing_can_be_read_is_missing(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "seven wizards brew potent ale " * 9}) + "\n")
    config = suite_config("perplexity", {"documents": {"path": str(tmp_path / "text.jsonl")}, "window": 32})
    suite = Perplexity(config, tmp_path)  # type: ignore[arg-type]
    measured = suite.measure(together(models, tmp_path), Store(tmp_path / "artifacts"), Costs("cpu"))
    assert set(measured.missing.values()) == {"none of its documents can be read"} and not measured.skipped
    assert not list(measured.examples())
