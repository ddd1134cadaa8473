"""One small experiment on random models, shared by the tests of the harness."""

from pathlib import Path

import pytest
import yaml

from harness.config.loading import load
from harness.config.schema import Config


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and two folders of text."""
    from transformers import GPTNeoXConfig, LlamaConfig

    from tests.harness.tiny_models import save_corpus, save_model

    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "llama", LlamaConfig, 300, 0)
    save_model(folder / "neox", GPTNeoXConfig, 340, 1)
    save_corpus(folder / "train", 14, 1)
    save_corpus(folder / "test", 24, 2)
    return folder


@pytest.fixture(scope="session")
def experiment_file(made: Path) -> Path:
    """An experiment of a user's own: every row of `main`, seconds long."""
    raw = {
        "title": "a small experiment",
        "reference": "CLM",
        # float32, so that machines with and without bfloat16 test the same thing.
        "roles": {
            "target": {"model": str(made / "llama"), "dtype": "float32"},
            "sources": {"neox": {"model": str(made / "neox"), "dtype": "float32"}},
        },
        "methods": {
            "{target}": {"method": "as_is"},
            "{sources}": {"method": "as_is"},
            "CLM": {"method": "clm"},
            "FuseLLM": {"method": "fusellm", "lambda": 0.5},
            "FuseLLM published": {"method": "fusellm", "preset": "published"},
        },
        "corpus": {"path": str(made / "train"), "first_bytes": 500},
        "passages": {"max_bytes": 120},
        "extraction": {"k": 5, "passages_per_shard": 4},
        "training": {
            "sequence_length": 200,
            "global_batch_size": 2,
            "learning_rate": 0.01,
            "save_every": 2,
            "dtype": "float32",
        },
        "suites": {
            "perplexity": {
                "documents": {"path": str(made / "test"), "first_bytes": 300, "split": "test"},
                "window": 64,
            }
        },
        "curve": {"per_domain": 3, "points": 2},
    }
    path = made / "small-experiment.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture
def config(experiment_file: Path) -> Config:
    return load(str(experiment_file))
