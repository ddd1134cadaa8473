"""The checkpoint that validation text likes best: which it is, that a kill does not lose it, and what says so."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.config.loading import load
from harness.config.schema import Config
from harness.experiment import run
from harness.experiment.method_context import MethodContext
from harness.experiment.pipeline import open_experiment
from harness.experiment.plan import plan
from harness.reporting.runs import open_run
from harness.stages.trainer.fusion_trainer import FusionTrainer
from harness.store.artifacts import Store, read_manifest
from harness.store.cleanup import leftovers
from tests.harness.command import answer, sentence
from tests.harness.tiny_models import save_corpus

ROWS = ["methods.FuseLLM=null", "methods.FuseLLM published=null", "methods.neox=null", "methods.llama=null"]
OVERFITTING = ["training.learning_rate=0.02", "training.epochs=4", "training.save_every=5", "curve.points=5"]


@pytest.fixture(scope="module")
def file(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small experiment with validation text that a training soon makes less likely: it is written backwards."""
    folder = tmp_path_factory.mktemp("selection")
    save_corpus(folder / "validation", 8, 3)
    for path in (folder / "validation").iterdir():
        path.write_text(path.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    raw = yaml.safe_load(experiment_file.read_text(encoding="utf-8"))
    raw["validation"] = {"path": str(folder / "validation"), "first_bytes": 300}
    path = folder / "selection.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    return path


def configured(file: Path, *settings: str) -> Config:
    return load(str(file), overrides=[*ROWS, *OVERFITTING, *settings])


def trained(root: Path, row: str = "CLM") -> Path:
    (found,) = (root / "artifacts" / "train").glob(f"{row}-seed0-*")
    return found


def files(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "model").iterdir())}


@pytest.fixture(scope="module")
def chosen(file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The root and the folder of a run that takes the best checkpoint."""
    root = tmp_path_factory.mktemp("chosen")
    return root, run.run(configured(file, "training.select=best"), root)


@pytest.mark.slow
def test_the_checkpoint_is_the_one_that_validation_text_likes_best(file: Path, chosen: tuple[Path, Path]) -> None:
    root, folder = chosen
    selected: dict[str, Any] = read_manifest(trained(root))["info"]["selected"]
    tokens = [at for at, _ in selected["points"]]
    assert tokens == sorted(tokens) and tokens[0] == 0 and len(tokens) == 6
    best = min(selected["points"][1:], key=lambda point: float(point[1]))
    assert best == [selected["tokens"], selected["nats_per_byte"]] != selected["points"][-1]
    config = configured(file, "training.select=best")
    context = MethodContext(open_experiment(config, root), "CLM", 0)
    assert context.validation_nll(context.train(lam=1.0)) == pytest.approx(selected["nats_per_byte"], rel=1e-5)
    assert {stage.state for stage in plan(config, root)} == {"ready"}
    # It is said below the table, with the run and in the figure.
    (note,) = (note for note in open_run(folder).notes if "checkpoint" in note)
    assert note.startswith(f"CLM (seed 0) is its checkpoint at {best[0]:,} of {tokens[-1]:,} tokens, the best of 5")
    assert f"{best[1] / math.log(2):.4f} bits per byte there" in note
    (entry,) = open_run(folder).description["checkpoints"]
    assert entry == {"row": "CLM", "seed": 0, **selected}


@pytest.mark.slow
@pytest.mark.parametrize("calls", [15, 29, 45])
def test_a_kill_does_not_lose_it(
    file: Path, chosen: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    compute, counted = FusionTrainer.compute_loss, iter(range(1000))

    def killed(self: FusionTrainer, *arguments: Any, **options: Any) -> Any:
        if next(counted) == calls:
            raise KeyboardInterrupt
        return compute(self, *arguments, **options)

    config = configured(file, "training.select=best")
    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "compute_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            MethodContext(open_experiment(config, tmp_path), "CLM", 0).train(lam=1.0)
    MethodContext(open_experiment(config, tmp_path), "CLM", 0).train(lam=1.0)
    assert files(trained(tmp_path)) == files(trained(chosen[0]))
    of_chosen, found = (read_manifest(trained(root)) for root in (chosen[0], tmp_path))
    assert found["resumed"] and found["info"]["selected"] == of_chosen["info"]["selected"]
    kept = [{name for name in one["files"] if not name.startswith("tensorboard")} for one in (found, of_chosen)]
    assert kept[0] == kept[1] and not list(leftovers(Store(tmp_path / "artifacts")))


@pytest.mark.slow
def test_the_last_checkpoint_is_the_same_model_however_it_was_chosen(file: Path, tmp_path: Path) -> None:
    slow = ["training.learning_rate=0.0005", "training.epochs=1", "curve.points=1"]
    for select in ("last", "best"):
        experiment = open_experiment(configured(file, *slow, f"training.select={select}"), tmp_path / select)
        MethodContext(experiment, "CLM", 0).train(lam=1.0)
    last, best = (trained(tmp_path / select) for select in ("last", "best"))
    selected = read_manifest(best)["info"]["selected"]
    assert selected["tokens"] == selected["points"][-1][0]
    assert files(last).keys() == files(best).keys()
    assert {name for name, content in files(last).items() if content != files(best)[name]} <= {"complete", "README.md"}
    assert "selected" not in read_manifest(last)["info"]


def test_where_no_checkpoint_is_chosen_its_text_is_no_part_of_the_key(file: Path, tmp_path: Path) -> None:
    def key(*settings: str) -> str:
        stages = plan(configured(file, *settings), tmp_path)
        (found,) = (stage.spec.fingerprint for stage in stages if stage.spec.kind == "train")
        return found

    assert key() == key("validation.first_bytes=200") == key("curve.points=2")
    keys = [key(), key("training.select=best")]
    keys += [key("training.select=best", one) for one in ("validation.first_bytes=200", "curve.points=2")]
    assert len(set(keys)) == 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["training.select=best", "validation=null"], "has no text to choose by: add a validation section"),
        (["training.select=first"], "training.select = 'first', which is wrong"),
        (["methods.CLM.training.select=best"], "select is the same for all rows: set training.select of the exp"),
    ],
)
def test_mistakes(file: Path, tmp_path: Path, settings: list[str], expected: str) -> None:
    options = [part for setting in [*ROWS, *settings] for part in ("--set", setting)]
    status, _, said = answer("experiment", "run", str(file), "--root", str(tmp_path), *options)
    assert status == 2 and expected in sentence(said), said


@pytest.mark.slow
def test_a_figure_is_drawn_again_from_the_run_alone(chosen: tuple[Path, Path], tmp_path: Path) -> None:
    from harness.reporting.figures import learning_curves

    run_of = open_run(chosen[1])
    curves = learning_curves(run_of, tmp_path / "figure")
    assert curves is not None and curves.curves[0].checkpoint is not None
    assert curves.curves[0].row.at == (json.loads((chosen[1] / "run.json").read_text())["checkpoints"][0]["tokens"],)
    assert (tmp_path / "figure.png").read_bytes() == (chosen[1] / "learning_curves.png").read_bytes()
