"""Rows that are made from other rows, and rows that cannot be made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from baselines.method import Candidate, Context, Parameters
from baselines.registry import METHODS
from fusion.errors import UserError
from fusion.registry import Part
from harness.config.loading import Config, load
from harness.experiment import run
from harness.experiment.candidates import candidates
from harness.experiment.pipeline import open_experiment
from harness.experiment.plan import plan
from harness.reporting.runs import open_run
from harness.stages.training_log import tokens_seen
from harness.store.artifacts import read_manifest
from tests.harness.command import answer, assert_whole, sentence

ROWS: dict[str, dict[str, Any]] = {
    "llama": {"method": "as_is"},
    "neox": {"method": "as_is", "role": "neox"},
    "Merged": {"method": "merge", "models": ["CLM", "FuseLLM"], "weights": [1.0, 3.0]},
    "Together": {"method": "ensemble", "models": ["target", "CLM", "FuseLLM"]},
    "CLM": {"method": "clm"},
    "FuseLLM": {"method": "fusellm", "lambda": 0.5},
}


@pytest.fixture
def file(experiment_file: Path, tmp_path: Path) -> Path:
    """Rows that name rows below them in the table."""
    raw = yaml.safe_load(experiment_file.read_text(encoding="utf-8"))
    path = tmp_path / "rows.yaml"
    path.write_text(
        yaml.safe_dump({**raw, "methods": ROWS, "curve": {"per_domain": 0}}, sort_keys=False), encoding="utf-8"
    )
    return path


def _weights(candidate: Candidate) -> Mapping[str, torch.Tensor]:
    return load_file(candidate.folder / "model.safetensors")


@pytest.mark.slow
def test_rows_are_made_from_rows_with_the_same_seed(file: Path, tmp_path: Path) -> None:
    config, root = load(str(file), seeds=[0, 1]), tmp_path / "root"
    folder = run.run(config, root)
    assert {stage.state for stage in plan(config, root)} == {"ready"}
    rows: dict[tuple[str, int | None], Any] = {
        (row.label, row.seed): row.candidate for row in candidates(open_experiment(config, root))
    }
    assert rows.keys() == {
        ("llama", None),
        ("neox", None),
        *((label, seed) for label in ("Merged", "Together", "CLM", "FuseLLM") for seed in (0, 1)),
    }
    for seed in (0, 1):
        merged, clm, fused = (_weights(rows[label, seed]) for label in ("Merged", "CLM", "FuseLLM"))
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, 0.25 * clm[name] + 0.75 * fused[name], rtol=0, atol=1e-6)
        inputs = read_manifest(rows["Merged", seed].folder.parent)["inputs"]
        assert list(inputs.values()) == [rows["CLM", seed].fingerprint, rows["FuseLLM", seed].fingerprint]
        members = {member.name: member.candidate for member in rows["Together", seed].members}
        assert members["CLM"] == rows["CLM", seed] and members["target"] == rows["llama", None]
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert table["rows"] == list(ROWS)
    assert len(list((root / "artifacts" / "train").glob("*/manifest.json"))) == 4


def _refused(file: Path, rows: Mapping[str, Any]) -> str:
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump({**raw, "methods": {**ROWS, **rows}}, sort_keys=False), encoding="utf-8")
    status, _, said = answer("experiment", "show", str(file))
    assert status == 2
    return sentence(said)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            {"M": {"method": "merge", "models": ["CLM", "FuseLM"]}},
            r"methods.M names 'FuseLM', which is no role and no row .did you mean 'FuseLLM'.*: roles are target, neox; "
            "rows are llama, neox, Merged",
        ),
        ({"M": {"method": "merge", "models": ["CLM", "M"]}}, "methods.M names itself: name another row"),
        (
            {"A": {"method": "merge", "models": ["CLM", "B"]}, "B": {"method": "ensemble", "models": ["A", "CLM"]}},
            "methods.A needs methods.B, which needs methods.A: take one of these rows out",
        ),
        (
            {"M": {"method": "merge", "base": "Nowhere", "merge_method": "ties"}},
            "'Nowhere', which is no role and no row",
        ),
        (
            {"neox": {"method": "clm"}, "M": {"method": "merge", "models": ["neox", "CLM"]}},
            "methods.M names 'neox', which is a role and also a row that is not the role's unchanged model: rename",
        ),
        ({"X": {"method": "as_is", "role": "CLM"}}, "methods.X names 'CLM', which is no role"),
    ],
)
def test_names_of_rows_are_checked_with_the_configuration(file: Path, rows: Mapping[str, Any], expected: str) -> None:
    import re

    assert re.search(expected, _refused(file, rows))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["methods.M.method=merge"],
            r"M cannot merge coder and reader, which differ in model_type \(qwen2 and gemma3_tex",
        ),
        (
            ["methods.M.method=merge", "methods.M.models=[target,CLM,coder]"],
            "M cannot merge target and coder, which diff",
        ),
        (
            ["methods.M.method=ensemble", "methods.M.combine=logits"],
            "coder and reader must have one tokenizer, but theirs",
        ),
        (
            ["methods.M.method=merge", "methods.M.models=[target,E]", "methods.E.method=ensemble"],
            "M names the row E, which is an ensemble and has no checkpoint of its own",
        ),
        (
            ["methods.M.method=merge", "methods.M.models=[target,N]", "methods.N.method=merge"],
            "2 rows cannot be made .M, N.: M needs the row N, which cannot be made: N cannot merge coder and reader",
        ),
    ],
)
def test_a_plan_refuses_rows_that_cannot_be_made_before_any_model_exists(
    settings: list[str], expected: str, tmp_path: Path
) -> None:
    import re

    options = [part for setting in settings for part in ("--set", setting)]
    command = ["experiment", "run", "quickstart", "--profile", "micro", "--dry-run", "--root", str(tmp_path), *options]
    status, _, said = answer(*command)
    assert status == 2 and re.search(expected, sentence(said)), said
    assert not (tmp_path / "artifacts").exists()


def test_rows_of_one_shape_can_be_planned_before_any_model_exists(tmp_path: Path) -> None:
    settings = ["methods.M.method=merge", "methods.M.models=[target,CLM,FuseLLM]"]
    config = load("quickstart", profile="micro", overrides=settings)
    assert ("merge", "M") in [(stage.spec.kind, stage.spec.label) for stage in plan(config, tmp_path)]


@pytest.mark.slow
def test_a_row_that_the_plan_refuses_does_not_cost_the_others_their_table(file: Path, tmp_path: Path) -> None:
    rows = ["methods.M.method=merge", "methods.M.models=[CLM,neox]", "methods.E.method=ensemble"]
    rows += ["methods.E.models=[M,CLM]", "methods.Together=null", "methods.Merged=null"]
    status, _, said = answer(*_command(file, tmp_path, *rows), "--dry-run")
    assert status == 2 and "2 rows cannot be made (M, E): M cannot merge CLM and neox" in sentence(said)
    assert not (tmp_path / "artifacts").exists()
    status, printed, said = answer(*_command(file, tmp_path, *rows))
    assert status == 2 and "2 rows cannot be made (M, E): M cannot merge CLM and neox" in sentence(said)
    assert said.index("The other rows are made.") < said.index("Table, figure and records")
    assert "FuseLLM" in printed and "E is missing with seed 0: E needs the row M" in " ".join(printed.split())
    with pytest.raises(run.IncompleteRun) as incomplete:
        run.run(load(str(file), overrides=rows), tmp_path)
    assert (incomplete.value.folder / "table.md").exists()


class _Failing:
    """A method that finds out only when it is at work that it cannot be done."""

    fails = True

    def __call__(self, context: Context, parameters: Parameters) -> Candidate:
        def build(folder: Path) -> None:
            if self.fails:
                raise UserError("The moon is full: wait for another.")
            (folder / "done").write_text("yes", encoding="utf-8")

        context.make("moon", build, version=1, inputs={}, params={})
        return context.model("target")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> _Failing:
    method = _Failing()
    monkeypatch.setitem(METHODS._parts, "moon", Part("moon", method, parameters=Parameters))
    return method


def _command(file: Path, root: Path, *settings: str) -> list[str]:
    options = [part for setting in settings for part in ("--set", setting)]
    return ["experiment", "run", str(file), "--root", str(root), *options]


@pytest.mark.slow
def test_a_row_that_fails_in_a_run_does_not_cost_the_others_their_table(
    file: Path, tmp_path: Path, failing: _Failing
) -> None:
    rows = ["methods.Moon.method=moon", "methods.OnMoon.method=merge", "methods.OnMoon.models=[Moon,CLM]"]
    command = _command(file, tmp_path / "root", *rows, "methods.Together=null", "methods.Merged=null")
    status, printed, said = answer(*command)
    assert status == 2
    assert "2 rows cannot be made (Moon, OnMoon): The moon is full: wait for another." in sentence(said)
    assert "OnMoon needs the row Moon, which cannot be made: The moon is full" in sentence(said)
    assert "FuseLLM" in printed and "Moon is missing with seed 0: The moon is full: wait for another." in printed
    (folder,) = (path.parent for path in (tmp_path / "root" / "runs").glob("*/*/*/run.json"))
    table = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert table["rows"] == ["llama", "neox", "CLM", "FuseLLM", "Moon", "OnMoon"]
    values = dict(zip(table["rows"], table["cells"], strict=True))
    assert all(cell["value"] is not None for cell in values["FuseLLM"])
    assert_whole(tmp_path / "root")
    # Once it can be made, its numbers are there and the notes are gone.
    failing.fails = False
    status, printed, said = answer(*command)
    assert status == 0, said
    assert "is missing" not in printed and open_run(folder).description["failures"] == []


@pytest.mark.slow
def test_a_run_without_its_reference_row_still_says_why(file: Path, tmp_path: Path, failing: _Failing) -> None:
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    raw["methods"] = {"llama": {"method": "as_is"}, "Moon": {"method": "moon"}}
    file.write_text(yaml.safe_dump({**raw, "reference": "Moon"}, sort_keys=False), encoding="utf-8")
    status, printed, said = answer(*_command(file, tmp_path / "root"))
    assert status == 2 and "The moon is full: wait for another." in sentence(said)
    assert "llama" in printed


@pytest.mark.slow
def test_where_no_row_can_be_made_there_is_no_table(file: Path, tmp_path: Path, failing: _Failing) -> None:
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    raw["methods"] = {"Moon": {"method": "moon"}}
    file.write_text(yaml.safe_dump({**raw, "reference": "Moon"}, sort_keys=False), encoding="utf-8")
    status, printed, said = answer(*_command(file, tmp_path / "root"))
    assert status == 2 and sentence(said) == "fusellm: The moon is full: wait for another." and printed == ""
    assert not list((tmp_path / "root" / "runs").glob("*/*/*/run.json"))


def _twice(context: Context, parameters: Parameters) -> Candidate:
    """Plain training, and training that goes on from there."""
    return context.train(lam=1.0, start=context.candidate("CLM"))


def _elsewhere(context: Context, parameters: Parameters) -> Candidate:
    return context.train(lam=1.0, start=context.model("neox"))


@pytest.mark.slow
def test_a_row_has_its_own_training_start_and_balance(file: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    raw["methods"] = {
        "Plain": {"method": "fusellm", "lambda": 0.5, "warm_start": "CLM"},
        "Rescaled": {"method": "fusellm", "lambda": 0.5, "warm_start": "CLM", "balance": "rescale"},
        "CLM": {"method": "clm", "training": {"epochs": 2, "learning_rate": 0.02}},
        "Once": {"method": "clm"},
    }
    file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    config: Config = load(str(file))
    folder = run.run(config, tmp_path)
    assert {stage.state for stage in plan(config, tmp_path)} == {"ready"}
    rows: dict[str, Any] = {row.label: row.candidate for row in candidates(open_experiment(config, tmp_path))}
    manifests = {label: read_manifest(row.training) for label, row in rows.items()}
    assert manifests["CLM"]["params"]["learning_rate"] == 0.02
    assert tokens_seen(rows["CLM"].training) == 2 * (tokens_seen(rows["Once"].training) or 0) > 0
    assert {manifests[label]["inputs"]["model"] for label in ("Plain", "Rescaled")} == {rows["CLM"].fingerprint}
    plain, rescaled = _weights(rows["Plain"]), _weights(rows["Rescaled"])
    assert any(not torch.equal(plain[name], rescaled[name]) for name in plain)
    notes = open_run(folder).notes
    assert "CLM is trained with settings of its own: learning_rate 0.02, epochs 2.0." in notes
    assert "Plain starts from the checkpoint of CLM, whose tokens are not among its own." in notes


@pytest.mark.slow
def test_a_training_starts_from_the_candidate_of_another_row(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS._parts, "twice", Part("twice", _twice, parameters=Parameters))
    monkeypatch.setitem(METHODS._parts, "elsewhere", Part("elsewhere", _elsewhere, parameters=Parameters))
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    raw["methods"] = {"Twice": {"method": "twice"}, "CLM": {"method": "clm"}}
    file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    config: Config = load(str(file))
    run.run(config, tmp_path)
    experiment = open_experiment(config, tmp_path)
    rows: dict[str, Any] = {row.label: row.candidate for row in candidates(experiment)}
    inputs = read_manifest(rows["Twice"].folder.parent)["inputs"]
    assert inputs["model"] == rows["CLM"].fingerprint != read_manifest(rows["CLM"].folder.parent)["inputs"]["model"]
    once, twice = _weights(rows["CLM"]), _weights(rows["Twice"])
    assert any(not torch.equal(once[name], twice[name]) for name in once)
    config.methods["Twice"] = {"method": "elsewhere"}
    with pytest.raises(UserError, match="Twice starts from a candidate with another tokenizer than the target's"):
        list(candidates(open_experiment(config, tmp_path, dry=True)))
