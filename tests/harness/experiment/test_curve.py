"""The learning curve is an artifact of its own: another curve trains nothing again, and is said to be missing."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.config.loading import load
from harness.config.schema import Config
from harness.experiment import run
from harness.experiment.plan import plan
from harness.reporting.runs import open_run
from harness.stages.trainer.fusion_trainer import FusionTrainer

ROWS = ["methods.FuseLLM=null", "methods.FuseLLM published=null"]


def configured(experiment_file: Path, *settings: str) -> Config:
    return load(str(experiment_file), overrides=[*ROWS, *settings])


def points(folder: Path) -> list[int]:
    """Training tokens at the points of CLM's curve."""
    records = open_run(folder).records
    return sorted(records.loc[records["method"] == "CLM", "tokens"].dropna().unique())


def said(folder: Path) -> str:
    return " ".join(open_run(folder).notes)


@pytest.fixture(scope="module")
def trained(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    folder = run.run(configured(experiment_file), root)
    assert len(points(folder)) == 3 and "learning curve" not in said(folder)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["curve.points=1", "curve.per_domain=2", "suites.perplexity.window=32", "suites.perplexity.mode=strided"]
)
def test_another_curve_trains_nothing_again(experiment_file: Path, trained: Path, setting: str) -> None:
    config = configured(experiment_file, setting)
    assert {p.spec.kind for p in plan(config, trained) if p.state != "ready"} <= {"perplexity"}
    folder = run.run(config, trained)
    assert len(list((trained / "artifacts" / "train").glob("CLM-*"))) == 1
    assert points(folder) == []
    assert "CLM (seed 0) has no learning curve: it was trained before" in said(folder)
    assert "Remove artifacts/train/CLM-seed0-" in said(folder)
    assert len(points(run.run(configured(experiment_file), trained))) == 3  # the first one's is still there


@pytest.mark.slow
def test_a_training_that_goes_on_under_another_curve_has_none(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first points were measured otherwise, and cannot be measured any more."""
    compute, calls = FusionTrainer.compute_loss, iter(range(100))

    def killed_in_the_fourth_step(self: FusionTrainer, *arguments: Any, **options: Any) -> Any:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return compute(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "compute_loss", killed_in_the_fourth_step)
        with pytest.raises(KeyboardInterrupt):
            run.run(configured(experiment_file), tmp_path)
    folder = run.run(configured(experiment_file, "curve.points=1"), tmp_path)
    (training,) = (tmp_path / "artifacts" / "train").glob("CLM-*")
    manifest = json.loads((training / "manifest.json").read_text())
    assert manifest["resumed"] and not [name for name in manifest["files"] if "curve" in name]
    assert not (tmp_path / "artifacts" / "curve").exists()
    assert points(folder) == [] and "CLM (seed 0) has no learning curve" in said(folder)
