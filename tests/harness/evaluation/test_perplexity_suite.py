"""Held-out text as a suite: its documents, and text that a tokenizer drops."""

from pathlib import Path

import pytest

from harness.config.validation import suite_config
from harness.evaluation import standalone
from harness.evaluation.suite import SUITES
from harness.models.resolution import ModelSpec
from harness.reporting.export import write_run
from harness.reporting.runs import open_run
from tests.harness.evaluation.measuring import measure

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_network")]


def test_perplexity_is_the_experiments(made: Path, models: dict[str, Path], tmp_path: Path) -> None:
    section = {"documents": {"path": str(made / "test"), "split": "test", "first_bytes": 300}, "window": 64}
    measured = measure("perplexity", section, models["one"], tmp_path, None)
    examples = list(measured.examples())
    assert len(examples) == 24 and {e.metric for e in examples} == {"bits_per_byte"}
    assert all(e.denominator <= 300 < 8 * e.numerator for e in examples)


def test_text_that_a_tokenizer_drops_is_counted(tmp_path: Path) -> None:
    """Control characters that have no token: eight in ten bytes cost nothing, and the table says so."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.tokenizer_zoo import ZOO

    tokenizer = ZOO["missing_bytes"]()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1, max_position_embeddings=256)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    documents = tmp_path / "documents"
    documents.mkdir()
    for i in range(21):
        (documents / f"{i:02}.txt").write_text(f"Page {i} of the budget. " + "\x13\x14" * (200 if i else 0))
    section = {"documents": {"path": str(documents), "split": "test"}, "window": 64}
    suites = standalone.sections(["perplexity"], tasks=[], common={}, settings={"perplexity": section}, data_root=None)
    suites["perplexity"] = SUITES.get("perplexity")(suite_config("perplexity", section), None)
    spec = ModelSpec(name=str(tmp_path / "model"), dtype="float32")
    folder = standalone.evaluate(spec, suites, tmp_path, device="cpu")
    table = write_run(open_run(folder))["table-perplexity"]
    ((cell, *_),) = table.cells
    assert "do not spell the text of 20 of 21 documents (8,000 of their" in cell.note
    assert cell.lossy and cell.interval is None and not table.best()


def test_default_documents_of_perplexity_are_those_of_the_profile_small() -> None:
    from harness.config.loading import load

    (suite,) = standalone.sections(["perplexity"], tasks=[], common={}, settings={}, data_root=None).values()
    assert suite.config == load("main", profile="small").suites["perplexity"]
    common = {"limit": 3}
    (few,) = standalone.sections(["perplexity"], tasks=[], common=common, settings={}, data_root=None).values()
    assert few.config.documents == suite.config.documents.model_copy(update={"per_domain": 3})


def test_an_experiment_may_measure_no_held_out_text(experiment_file: Path, rows: Path, tmp_path: Path) -> None:
    from harness.config.loading import load
    from harness.experiment import run

    settings = ["methods.FuseLLM=null", "methods.FuseLLM published=null", f"data.root={rows}"]
    settings += ["suites.perplexity=null", "suites.commonsense={tasks: [boolq], limit: 3}"]
    folder = run.run(load(str(experiment_file), overrides=settings), tmp_path)
    assert "boolq" in (folder / "table.md").read_text() and "CLM" in (folder / "table.md").read_text()
    assert not list((tmp_path / "artifacts").glob("perplexity/*"))
