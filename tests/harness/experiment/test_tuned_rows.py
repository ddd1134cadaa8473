"""Rows whose settings are chosen by pilots on validation text."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config.loading import load
from harness.config.schema import Config
from harness.experiment import run
from harness.experiment.candidates import candidates
from harness.experiment.pipeline import open_experiment
from harness.experiment.plan import plan
from harness.reporting.runs import open_run
from harness.stages.trainer.fusion_trainer import FusionTrainer
from harness.stages.training_log import tokens_seen
from harness.store.artifacts import read_manifest
from harness.store.cleanup import unused
from tests.harness.command import answer, sentence
from tests.harness.tiny_models import save_corpus

RATES = [0.001, 0.02, 1e30]
ROWS: dict[str, Any] = {
    "CLM": {"method": "clm", "training": {"learning_rate": {"tune": RATES}, "epochs": 2}},
    # At lambda 1 it is a pilot of CLM's.
    "FuseLLM": {
        "method": "fusellm",
        "lambda": {"tune": [1.0, 0.5]},
        "training": {"learning_rate": 0.02, "epochs": 2},
    },
}


@pytest.fixture(scope="module")
def file(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    save_corpus(folder / "validation", 8, 3)
    raw = yaml.safe_load(experiment_file.read_text(encoding="utf-8"))
    raw["validation"] = {"path": str(folder / "validation"), "first_bytes": 300}
    raw["curve"] = {"per_domain": 3, "points": 2}
    path = folder / "tuned.yaml"
    path.write_text(yaml.safe_dump({**raw, "methods": ROWS}, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def config(file: Path) -> Config:
    return load(str(file), seeds=[0, 1])


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The root and the folder of a finished run."""
    root = tmp_path_factory.mktemp("root")
    return root, run.run(config, root)


def pilots(root: Path) -> list[Path]:
    trained = sorted(path.parent for path in (root / "artifacts" / "train").glob("*/manifest.json"))
    return [path for path in trained if "share" in read_manifest(path)["params"]]


@pytest.mark.slow
def test_every_seed_has_the_values_that_the_pilots_of_the_first_choose(
    config: Config, finished: tuple[Path, Path]
) -> None:
    root, folder = finished
    assert len(pilots(root)) == 4  # three of CLM's, of which one is FuseLLM's, too
    assert {read_manifest(path)["params"]["seed"] for path in pilots(root)} == {0}
    rows: dict[tuple[str, int | None], Any] = {
        (row.label, row.seed): row.candidate for row in candidates(open_experiment(config, root))
    }
    by_rate = {read_manifest(path)["params"]["learning_rate"]: path for path in pilots(root) if path.name[:3] == "CLM"}
    assert by_rate.keys() == set(RATES)
    assert "is not finite at step" in read_manifest(by_rate[1e30])["info"]["diverged"]
    for (label, seed), candidate in rows.items():
        tuning = candidate.tuning
        nll = dict(tuning.tried)
        assert tuning.chosen == min(nll, key=lambda values: nll[values]) and tuning == rows[label, 0].tuning
        params = read_manifest(candidate.training)["params"]
        assert params["seed"] == seed and params["epochs"] == 2 and "share" not in params
        assert params["lambda" if label == "FuseLLM" else "learning_rate"] == tuning.chosen[0]
    clm = rows["CLM", 0].tuning
    assert [math.isinf(nll) for _, nll in clm.tried] == [False, False, True]
    # A pilot makes all passes over a fifth of the passages.
    small, whole = tokens_seen(by_rate[0.02]), tokens_seen(rows["CLM", 0].training)
    assert small is not None and whole is not None and 0.1 < small / whole < 0.3
    # It is said below the table, and the run holds the curve.
    assert f"CLM is tuned on validation text with seed 0: {clm.sentence()}." in open_run(folder).notes
    assert clm.sentence().startswith("learning_rate 0.02 of 0.001, 0.02, 1e+30 (")
    tunings = open_run(folder).description["tunings"]
    assert [(one["row"], one["seed"]) for one in tunings] == list(rows)
    assert tunings[0]["tried"] == [[*values, None if math.isinf(nll) else nll] for values, nll in clm.tried]
    assert "CLM is trained with settings of its own: epochs 2.0." in open_run(folder).notes


@pytest.mark.slow
def test_a_second_run_finds_all_of_it(config: Config, finished: tuple[Path, Path]) -> None:
    root, folder = finished
    assert {stage.state for stage in plan(config, root)} == {"ready"}
    before = sorted(str(path) for path in (root / "artifacts").glob("*/*"))
    assert run.run(config, root) == folder
    assert sorted(str(path) for path in (root / "artifacts").glob("*/*")) == before
    assert all((root / name).exists() for name in open_run(folder).description["artifacts"])


@pytest.mark.slow
def test_the_row_is_the_one_that_is_given_its_values(file: Path, config: Config, finished: tuple[Path, Path]) -> None:
    given = load(str(file), overrides=["methods.FuseLLM=null", "methods.CLM.training.learning_rate=0.02"])
    assert {stage.state for stage in plan(given, finished[0]) if stage.spec.kind == "train"} == {"ready"}


@pytest.mark.slow
def test_a_clean_up_spares_what_a_killed_run_had_chosen_to_train(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = FusionTrainer.compute_loss

    def killed(self: FusionTrainer, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 5:  # a pilot has fewer
            raise KeyboardInterrupt
        return compute(self, *arguments, **options)

    config = load(str(file), overrides=["methods.FuseLLM=null", "methods.CLM.training.learning_rate.tune=[0.001,0.02]"])
    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run.run(config, tmp_path)
    assert len(list((tmp_path / "artifacts" / "train").glob(".*.partial"))) == 1 and len(pilots(tmp_path)) == 2
    assert unused(tmp_path) == []


def test_a_plan_before_the_pilots_says_what_it_cannot_know(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, printed, said = answer("experiment", "run", str(file), "--root", str(tmp_path), "--dry-run")
    assert status == 0
    assert "CLM: pilots will choose learning_rate; the plan has one training with the first values." in said
    lines = [line for line in printed.splitlines() if " train " in f" {line} ".replace("|", " ")]
    assert sum("pilot (" in line for line in lines) == 4
    assert sum("with the first values" in line for line in lines) == 2
    assert all("missing" in line for line in lines)
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("validation=null", "has no text to choose by: add a validation section"),
        ("methods.CLM.training.learning_rate.tune=[0.1]", r"learning_rate.tune = [0.1], which is wrong: List should"),
        ("methods.FuseLLM.lambda.tune=[0.1,2]", "lambda.tune = [0.1, 2], which is wrong: Input should be less"),
        ("methods.FuseLLM.lambda={tunes: [0.1,2]}", "no setting: write a value, or {tune: [VALUE, VALUE, ...]}"),
        ("methods.CLM.training.epochs={tune: [1,1]}", "names a value twice: give each once"),
        ("methods.CLM.training.global_batch_size={tune: [2,3]}", "global_batch_size = 3 is no multiple of"),
    ],
)
def test_mistakes(file: Path, tmp_path: Path, setting: str, expected: str) -> None:
    options = ["--set", "training.micro_batch_size=2", "--set", setting]
    status, _, said = answer("experiment", "run", str(file), "--root", str(tmp_path), "--dry-run", *options)
    assert status == 2 and expected in sentence(said), said


@pytest.mark.slow
def test_with_the_best_checkpoint_a_pilot_counts_at_its_best_point(file: Path, tmp_path: Path) -> None:
    settings = ["training.select=best", "methods.FuseLLM=null", "methods.CLM.training.learning_rate.tune=[0.02,0.05]"]
    (row,) = candidates(open_experiment(load(str(file), overrides=settings), tmp_path))
    assert row.candidate.tuning is not None
    best = {
        path_info["settings"]["learning_rate"]: path_info["selected"]["nats_per_byte"]
        for path_info in (read_manifest(path)["info"] for path in pilots(tmp_path))
    }
    assert {rate: nll for (rate,), nll in row.candidate.tuning.tried} == pytest.approx(best, rel=1e-5)
