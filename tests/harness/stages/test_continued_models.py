"""Roles that a run makes for itself, what methods are given of an experiment, and that all rows are trained alike."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from baselines.method import Artifact, Candidate, Context, Parameters
from baselines.registry import METHODS
from fusion.errors import UserError
from fusion.registry import Part
from harness.config.loading import load
from harness.config.schema import Config
from harness.experiment import run
from harness.experiment.method_context import MethodContext
from harness.experiment.pipeline import open_experiment
from harness.experiment.plan import plan
from harness.store.artifacts import read_manifest
from harness.store.cleanup import unused
from tests.harness.tiny_models import save_corpus


@pytest.fixture(scope="module")
def file(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two continuations of one model, merged and fused."""
    folder = tmp_path_factory.mktemp("continued_model")
    for i, name in enumerate(("one", "two", "validation")):
        save_corpus(folder / name, 6, 10 + i)
    continued = {"model": str(made / "llama"), "dtype": "float32"}
    raw = {
        "title": "continued_model",
        "reference": "CLM",
        "roles": {
            "target": continued,
            "sources": {
                "one": {**continued, "corpus": {"path": str(folder / "one")}},
                "two": {**continued, "corpus": {"path": str(folder / "two")}},
            },
        },
        "methods": {
            "{target}": {"method": "as_is"},
            "{sources}": {"method": "as_is"},
            "Merged": {"method": "merge"},
            "Tuned": {"method": "merge", "weights": "tuned", "trials": 3},
            "CLM": {"method": "clm"},
            "FuseLLM": {"method": "fusellm", "lambda": 0.5},
            "FuseLLM em": {"method": "fusellm", "map": "em", "projection": "token", "inside": "none"},
        },
        "corpus": {"path": str(made / "train"), "first_bytes": 400},
        "validation": {"path": str(folder / "validation"), "first_bytes": 80},
        "passages": {"max_bytes": 120},
        "extraction": {"k": 5, "passages_per_shard": 4},
        "training": {
            "sequence_length": 200,
            "global_batch_size": 2,
            "learning_rate": 0.01,
            "save_every": 2,
            "dtype": "float32",
        },
        "suites": {"perplexity": {"documents": {"path": str(made / "test"), "first_bytes": 300}, "window": 64}},
        "curve": {"per_domain": 0},
    }
    path = folder / "continued-models.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Path]:
    config, root = load(str(file)), tmp_path_factory.mktemp("root")
    return config, root, run.run(config, root)


def _manifests(root: Path, kind: str) -> dict[str, dict[str, Any]]:
    found = (read_manifest(path.parent) for path in (root / "artifacts" / kind).glob("*/manifest.json"))
    return {manifest["label"]: manifest for manifest in found}


@pytest.mark.slow
def test_siblings_are_made_once_and_their_tokens_shown(finished: tuple[Config, Path, Path]) -> None:
    config, root, folder = finished
    continued_models = _manifests(root, "continued_model")
    assert continued_models.keys() == {"one", "two"}
    models = open_experiment(config, root).models
    fingerprint = models.model("target").fingerprint
    assert all(manifest["inputs"]["model"] == fingerprint for manifest in continued_models.values())
    assert models.vocabulary_key("one") == models.vocabulary_key("target")  # one map serves both
    assert models.tokenizer("one")[1] == models.tokenizer("target")[1]
    assert config.roles.sources["one"].corpus is not None and config.roles.sources["one"].corpus.first_bytes == 400
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    notes = "\n".join(table["notes"])
    (log,) = (root / "artifacts" / "continued_model").glob("one-*/log.json")
    tokens = int(json.loads(log.read_text(encoding="utf-8"))[-2]["tokens"])
    assert f"one is llama continued on {tokens:,} tokens of its own text" in notes and "two is llama" in notes
    assert "Tuned: the best of 3 merges tried on validation text" in notes
    assert re.search(r"The corpus train \(train\): [\d,]+ of [\d,]+ bytes .* first_bytes shortened \d+\.", notes)
    assert {path for path, _ in unused(root)} == set()


@pytest.mark.slow
def test_all_trained_rows_see_the_same_and_share_what_is_made(finished: tuple[Config, Path, Path]) -> None:
    """Same model, text, steps, schedule and seed in every manifest, same tokens after every step; one extraction."""
    _, root, _ = finished
    trained = _manifests(root, "train")
    assert trained.keys() == {"CLM-seed0", "FuseLLM-seed0", "FuseLLM em-seed0"}
    own = {"lambda", "loss"}
    alike = [{k: v for k, v in manifest["params"].items() if k not in own} for manifest in trained.values()]
    assert alike[0] == alike[1] == alike[2]
    assert len({json.dumps([m["inputs"][k] for k in ("model", "passages")]) for m in trained.values()}) == 1
    logs = [
        [entry["tokens"] for entry in json.loads(path.read_text(encoding="utf-8")) if "tokens" in entry]
        for path in (root / "artifacts" / "train").glob("*/log.json")
    ]
    assert len(logs) == 3 and logs[0] == logs[1] == logs[2] and len(logs[0]) > 2
    assert sorted(_manifests(root, "predictions")) == ["llama", "one", "two"]
    assert trained["FuseLLM-seed0"]["inputs"]["extractions"] == trained["FuseLLM em-seed0"]["inputs"]["extractions"]


@pytest.mark.slow
def test_a_plan_makes_nothing_and_knows_siblings_and_merges(
    finished: tuple[Config, Path, Path], tmp_path: Path
) -> None:
    config, root, _ = finished
    assert {p.state for p in plan(config, root)} == {"ready"}
    fresh = [(p.spec.kind, p.spec.label) for p in plan(config, tmp_path)]
    assert ("continued_model", "one") in fresh and ("merge", "Tuned") in fresh and not (tmp_path / "artifacts").exists()
    # Other trials, another search; other seeds, the same continued models.
    config.methods["Tuned"]["trials"] = 4
    todo = [p.spec.label for p in plan(config, root) if p.state == "missing"]
    config.methods["Tuned"]["trials"] = 3
    assert todo == ["Tuned", "Tuned"]
    seeds = config.model_copy(update={"seeds": [7]})
    todo = [p.spec.kind for p in plan(seeds, root) if p.state == "missing"]
    assert "continued_model" not in todo and "merge" not in todo and "train" in todo


def _probe(context: Context, parameters: Parameters) -> Candidate:
    """A method that takes the better of two sources, as a plug-in would: from validation losses alone."""
    losses = {name: context.validation_nll(context.model(name), name) for name in context.sources}

    def build(folder: Path) -> Mapping[str, Any]:
        (folder / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
        return {"note": "probed"}

    artifact = context.make(
        "probe",
        build,
        version=1,
        inputs={"validation": context.validation_fingerprint},
        params={"losses": losses},
        validations=2,
    )
    assert isinstance(artifact, Artifact)
    return context.model(min(losses, key=lambda name: losses[name]))


@pytest.mark.slow
def test_a_method_from_validation_losses_plans_and_runs(
    finished: tuple[Config, Path, Path], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS._parts, "probe", Part("probe", _probe, parameters=Parameters))
    config = load(str(file), overrides=["methods.Probe.method=probe", "reference=Probe"])
    config.methods = {"Probe": config.methods["Probe"]}
    # Nothing is known yet: the plan does not open what is not there.
    assert ("probe", "Probe") in [(p.spec.kind, p.spec.label) for p in plan(config, tmp_path)]
    _, root, _ = finished
    folder = run.run(config, root)
    (losses,) = (json.loads(p.read_text()) for p in (root / "artifacts" / "probe").glob("*/losses.json"))
    context = MethodContext(open_experiment(config, root), "again", 0)
    for name, nll in losses.items():
        assert math.isfinite(nll) and context.validation_nll(context.model(name)) == nll
    assert json.loads((folder / "table.json").read_text())["rows"] == ["Probe"]
    assert {p.state for p in plan(config, root)} == {"ready"}


@pytest.mark.slow
def test_validation_nll_is_the_validation_texts_nats_per_byte(finished: tuple[Config, Path, Path]) -> None:
    import torch

    from harness.data.corpus import documents
    from harness.models.checkpoints import load_model, load_tokenizer

    config, root, _ = finished
    small = open_experiment(config, root)
    context = MethodContext(small, "row", 0)
    model, tokenizer = load_model(small.models.model("one"), "float32"), load_tokenizer(small.models.model("one"))
    nats = n_bytes = 0.0
    assert config.validation is not None
    for document in documents(config.validation, None):
        ids = torch.tensor([[0, *tokenizer(document.text)["input_ids"]]])
        assert ids.shape[1] <= config.suites["perplexity"].window + 1, "one window, so that a plain forward is the same"
        with torch.no_grad():
            log_q = model(ids[:, :-1]).logits.log_softmax(-1)
        nats -= float(log_q.gather(-1, ids[:, 1:, None]).sum())
        n_bytes += len(document.text.encode())
    assert context.validation_nll(context.model("one")) == pytest.approx(nats / n_bytes, rel=1e-5)


@pytest.mark.slow
def test_any_model_can_be_asked_for_by_name(finished: tuple[Config, Path, Path], made: Path) -> None:
    config, root, _ = finished
    context = MethodContext(open_experiment(config, root), "row", 0)
    assert context.model(str(made / "neox")).folder == made / "neox"
    with pytest.raises(UserError, match=r"no role 'on' .did you mean 'one'.*: there are target, one, two"):
        context.model("on")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("validation.path={test}", "24 validation documents are in suites.perplexity.documents, too .first 000.txt"),
        ("validation.path={train}", "14 held-out documents are in the training corpus .*another split in validation"),
        ("validation.path={one}", "6 held-out documents are in the training corpus .*another split in validation"),
        ("suites.perplexity.documents.path={one}", "6 held-out documents .*split in suites.perplexity.documents"),
        ("validation=null", "has no text to choose by: add a validation section"),
    ],
)
def test_held_out_text_is_held_out(file: Path, made: Path, setting: str, expected: str, tmp_path: Path) -> None:
    places = {"test": made / "test", "train": made / "train", "one": file.parent / "one"}
    with pytest.raises(UserError, match=expected):
        run.run(load(str(file), overrides=[setting.format(**places)]), tmp_path)
    assert not list((tmp_path / "artifacts").glob("continued model/*/model"))
