"""Perplexity is computed in float32 whatever a role's dtype, in training and after it, unless it is set otherwise."""

from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from fusion.errors import UserError
from harness import api
from harness.config.loading import load
from harness.config.schema import CorpusConfig
from harness.evaluation import perplexity
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.perplexity import Perplexity, PerplexityConfig
from harness.evaluation.suite import SuiteResult
from harness.experiment.checks import check_memory
from harness.experiment.pipeline import open_experiment
from harness.models.resolution import ModelSpec
from harness.reporting.tables import run_table
from harness.store.artifacts import Store
from harness.store.costs import Costs
from tests.harness.tiny_models import save_corpus, save_model


def measured(folder: Path, role: str, **settings: str) -> SuiteResult:
    evaluated = EvaluatedModel(
        label="m",
        fingerprint="f",
        spec=ModelSpec(name=str(folder / "model"), dtype=role),  # type: ignore[arg-type]
        dtype=role,
        device="cpu",
        batch_tokens=512,
        parameters=1e4,
        models_dir=folder,
    )
    documents = CorpusConfig(path=str(folder / "test"))
    suite = Perplexity(PerplexityConfig(documents=documents, window=64, **settings), None)  # type: ignore[arg-type]
    return suite.measure(evaluated, Store(folder / "artifacts"), Costs("cpu"))


def nats(result: SuiteResult) -> list[float]:
    return [example.numerator for example in result.examples()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perplexity")
    save_model(folder / "model", LlamaConfig, 300, 0, 4)
    save_corpus(folder / "test", 3, 2)
    return folder


def test_a_roles_dtype_is_not_that_of_perplexity(folder: Path) -> None:
    exact, other = measured(folder, "float32"), measured(folder, "bfloat16")
    assert nats(other) == nats(exact) and other.artifacts == exact.artifacts
    assert other.dtype == "float32"
    asked = [measured(folder, "bfloat16", dtype="role"), measured(folder, "float32", dtype="bfloat16")]
    assert nats(asked[0]) == nats(asked[1]) != nats(exact)
    assert [result.dtype for result in asked] == ["bfloat16"] * 2


def test_weights_beyond_the_memory_are_refused_before_the_run(
    folder: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perplexity, "device_memory", lambda device: 30_000)
    with pytest.raises(UserError, match=r"m has 0.0 GB of weights in float32.*set suites.perplexity.dtype to bfloat16"):
        measured(folder, "float32", stride="3", mode="strided")
    with pytest.raises(UserError, match="weights in float32"):
        check_memory(open_experiment(load(str(experiment_file)), tmp_path))


def test_members_of_an_ensemble_share_the_memory(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*settings: str) -> None:
        both = ["methods.Both.method=ensemble", "methods.Both.models=[CLM,neox]"]
        check_memory(open_experiment(load(str(experiment_file), overrides=[*both, *settings]), tmp_path))

    models = open_experiment(load(str(experiment_file)), tmp_path).models
    sizes = [4 * models.size(name).parameters for name in ("target", "neox")]
    monkeypatch.setattr(perplexity, "device_memory", lambda device: sum(sizes) - 1)
    with pytest.raises(UserError, match=r"Both has .* of weights in float32"):
        check()
    check("methods.Both.combine=vote")
    check("methods.Both.weights=[1,0]")
    monkeypatch.setattr(perplexity, "device_memory", lambda device: sum(sizes))
    check()
    # Of two precisions each member has its own.
    mixed = ["suites.perplexity.dtype=role", "roles.target.dtype=float32", "roles.sources.neox.dtype=bfloat16"]
    monkeypatch.setattr(perplexity, "device_memory", lambda device: sizes[0] + sizes[1] / 2)
    check(*mixed)
    monkeypatch.setattr(perplexity, "device_memory", lambda device: sizes[0] + sizes[1] / 2 - 1)
    with pytest.raises(UserError, match=r"Both has .* of weights in bfloat16 and float32"):
        check(*mixed)


@pytest.mark.slow
def test_curve_and_table_agree_to_every_digit_printed(experiment_file: Path, tmp_path: Path) -> None:
    settings = ["training.dtype=bfloat16", "roles.target.dtype=bfloat16", "methods.FuseLLM=null"]
    config = load(str(experiment_file), overrides=[*settings, "methods.FuseLLM published=null"])
    run = api.run(config, root=tmp_path)
    records = run.records[run.records["method"] == "CLM"]
    last = records[records["tokens"] == records["tokens"].max()].set_index("example")
    final = records[records["tokens"].isna()].set_index("example").loc[last.index]
    assert len(last)
    np.testing.assert_allclose(last["numerator"], final["numerator"], rtol=2e-6)
    assert "perplexity is computed in float32." in run.suites["perplexity"]["notes"]
    assert run.precision("perplexity") == run_table(run).precision == "float32"
