"""Two ranks on the CPU: the same training as one, under plain data parallel and under ZeRO."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from transformers import LlamaConfig

from fusion.errors import UserError
from harness.config.loading import load
from harness.runtime import distributed
from harness.stages.trainer.fusion_trainer import FusionTrainer, Order
from harness.stages.trainer.sharding import zero_config
from harness.stages.training_log import read_curve
from harness.store.artifacts import Spec, Store
from tests.harness import ranks_worker
from tests.harness.ranks_worker import place
from tests.harness.tiny_models import save_model

ROOT = Path(__file__).resolve().parents[3]
STEPS = 20
BESIDE = ("KD", "ALM")  # a teacher in memory, and a term over several positions


def launch(*arguments: str | Path, n: int = 2, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs a Python module or a script by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}", *arguments]
    # Each process finds its accelerator itself.
    environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(map(str, command), capture_output=True, text=True, env=environment, timeout=1800)
    assert done.returncode == 0 or not check, done.stderr
    return done


def sentences(done: subprocess.CompletedProcess[str]) -> list[str]:
    return re.findall(r"^fusellm: .*", done.stderr, re.M)


@pytest.fixture(scope="module")
def experiment_file(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small experiment in twenty steps of four rows, with one in the last of each epoch, on a target whose head is
    its embedding: the weight that all kinds of sharing find hardest.
    """
    folder = tmp_path_factory.mktemp("ranks")
    raw = yaml.safe_load(experiment_file.read_text())
    raw["training"] |= {"global_batch_size": 4, "epochs": 4}
    raw["roles"]["target"]["model"] = str(save_model(folder / "llama", LlamaConfig, 300, 0, tie_word_embeddings=True))
    raw["roles"]["sources"]["twin"] = {
        "model": str(save_model(folder / "twin", LlamaConfig, 300, 7)),
        "dtype": "float32",
    }
    raw["methods"]["FuseLLM"]["sources"] = ["neox"]
    raw["methods"]["KD"] = {"method": "distillation", "online": True, "teachers": ["twin"], "lambda": 0.5}
    raw["methods"]["ALM"] = {"method": "alm", "teachers": ["neox"], "lambda": 0.5}
    path = folder / "small-experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def alone(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLM and FuseLLM trained by one process: artifacts, and the gradients of the first step."""
    root = tmp_path_factory.mktemp("alone")
    ranks_worker.main(str(experiment_file), root, *(f"-:{row}" for row in ("CLM", "FuseLLM", *BESIDE)))
    return root


@pytest.fixture(scope="module")
def together(experiment_file: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two ranks."""
    root = tmp_path_factory.mktemp("together")
    for kind in ("passages", "predictions", "map"):
        for zero in ("-", "zero1", "zero2", "zero3"):
            for folder in (root, root / "again"):
                shutil.copytree(alone / "artifacts" / kind, place(folder, zero) / "artifacts" / kind)
    jobs = [f"{zero}:{row}" for zero in ("zero1", "zero2", "zero3", "-") for row in ("CLM", "FuseLLM")]
    jobs += [f"{zero}:{row}" for zero in ("zero3", "-") for row in BESIDE]
    launch("-m", "tests.harness.ranks_worker", experiment_file, root, *jobs, "zero2:FuseLLM:interrupt:7")
    return root


def trained(root: Path, row: str, zero: str = "-") -> Path:
    """The training's artifact."""
    (found,) = (place(root, zero) / "artifacts" / "train").glob(f"{row}-seed0-*")
    assert json.loads((found / "manifest.json").read_text())["info"]["settings"]["deepspeed"] in (zero, None)
    return found


def curve(root: Path, row: str, zero: str = "-") -> list[dict[str, Any]]:
    """The points of the training's held-out curve."""
    (found,) = (place(root, zero) / "artifacts" / "curve").glob(f"{row}-seed0-*")
    return read_curve(found)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "zero"),
    [
        *product(("CLM", "FuseLLM"), ("-", "zero1", "zero2", "zero3")),
        *product(BESIDE, ("-", "zero3")),
    ],
)
def test_two_ranks_train_as_one(alone: Path, together: Path, row: str, zero: str) -> None:
    one, two = load_file(alone / f"--{row}.safetensors"), load_file(together / f"{zero}-{row}.safetensors")
    assert one.keys() == two.keys() and len(one) > 10
    for name, expected in one.items():
        assert expected.abs().max() > 0
        assert (two[name] - expected).norm() <= 1e-6 * expected.norm(), name
    before, after = trained(alone, row), trained(together, row, zero)
    log = [json.loads((path / "log.json").read_text()) for path in (before, after)]
    assert log[0][-1]["step"] == log[1][-1]["step"] == STEPS
    assert [entry.get("tokens") for entry in log[0]] == [entry.get("tokens") for entry in log[1]]
    learning_rate = 0.01
    expected_weights, found = weights(before), weights(after)
    assert expected_weights.keys() == found.keys()
    for name, value in expected_weights.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - value).abs().max() <= learning_rate * STEPS * 1e-2, name


@pytest.mark.slow
def test_the_curve_is_measured_as_alone(alone: Path, together: Path) -> None:
    for zero in ("-", "zero3"):
        lines = [curve(alone, "FuseLLM"), curve(together, "FuseLLM", zero)]
        assert [(p["step"], p["tokens"]) for p in lines[0]] == [(p["step"], p["tokens"]) for p in lines[1]]
        for one, two in zip(*lines, strict=True):
            assert [r["nats"] for r in two["records"]] == pytest.approx([r["nats"] for r in one["records"]], rel=1e-3)


@pytest.mark.slow
def test_ranks_take_the_checkpoint_that_one_takes(experiment_file: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(experiment_file.read_text())
    backwards = tmp_path / "validation"
    shutil.copytree(Path(raw["suites"]["perplexity"]["documents"]["path"]), backwards)
    for path in backwards.iterdir():
        path.write_text(path.read_text()[::-1])
    raw["validation"] = {"path": str(backwards), "first_bytes": 300}
    raw["training"] |= {"select": "best", "learning_rate": 0.02}
    raw["curve"]["points"] = 5
    file = tmp_path / "best.yaml"
    file.write_text(yaml.safe_dump(raw))
    ranks_worker.main(str(file), tmp_path, "-:CLM")
    launch("-m", "tests.harness.ranks_worker", file, tmp_path / "two", "-:CLM", "zero3:CLM")
    found = [
        json.loads((trained(root, "CLM", zero) / "manifest.json").read_text())["info"]["selected"]
        for root, zero in ((tmp_path, "-"), (tmp_path / "two", "-"), (tmp_path / "two", "zero3"))
    ]
    one = found[0]
    assert one["tokens"] < one["points"][-1][0]
    for two in found[1:]:
        assert (two["step"], two["tokens"]) == (one["step"], one["tokens"])
        assert [nll for _, nll in two["points"]] == pytest.approx([nll for _, nll in one["points"]], rel=1e-2)
    assert {"best", "checkpoints"}.isdisjoint(p.name for p in trained(tmp_path / "two", "CLM").iterdir())
    # What ZeRO-3 had in parts is whole, and the best point's weights, not the last one's.
    whole, alone = weights(trained(tmp_path / "two", "CLM", "zero3")), weights(trained(tmp_path, "CLM"))
    assert all((whole[name] - value).abs().max() <= 0.02 * one["step"] * 1e-2 for name, value in alone.items())


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["-", "zero3"])
def test_ranks_choose_by_their_pilots_as_one_does(experiment_file: Path, tmp_path: Path, zero: str) -> None:
    raw = yaml.safe_load(experiment_file.read_text())
    validation = tmp_path / "validation"
    shutil.copytree(Path(raw["suites"]["perplexity"]["documents"]["path"]), validation)
    for path in validation.iterdir():
        path.write_text(f"Of {path.read_text()}")
    raw["validation"] = {"path": str(validation), "first_bytes": 300}
    raw["methods"] = {"CLM": {"method": "clm", "training": {"learning_rate": {"tune": [1e30, 0.02, 0.0001]}}}}
    file = tmp_path / "tuned.yaml"
    file.write_text(yaml.safe_dump(raw))
    launch("-m", "tests.harness.ranks_worker", file, tmp_path / "two", f"{zero}:CLM")
    alone, _ = ranks_worker.train(load(str(file)), tmp_path, "CLM")
    together, _ = ranks_worker.train(load(str(file)), place(tmp_path / "two", zero), "CLM")  # which is there
    assert alone.tuning is not None and together.tuning is not None
    assert alone.tuning.chosen == together.tuning.chosen == (0.02,)
    one, two = ([nll for _, nll in tuning.tried] for tuning in (alone.tuning, together.tuning))
    assert two[1:] == pytest.approx(one[1:], rel=1e-2)
    # Though DeepSpeed leaves out steps whose gradient is not finite, without a word.
    assert one[0] == two[0] == float("inf")


@pytest.mark.slow
def test_zero_goes_on_bit_by_bit(together: Path) -> None:
    """Interrupted in the middle of the second epoch, at a step that is no checkpoint's."""
    resumed = trained(together / "again", "FuseLLM", "zero2")
    assert json.loads((resumed / "manifest.json").read_text())["resumed"]
    expected, found = weights(trained(together, "FuseLLM", "zero2")), weights(resumed)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_command_goes_on(together: Path, experiment_file: Path) -> None:
    root = together / "again"
    killed = launch("-m", "tests.harness.ranks_worker", experiment_file, together, "-:FuseLLM:kill:7", check=False)
    assert killed.returncode != 0 and "SIGKILL" in killed.stderr
    # The checkpoint is that of two ranks.
    with pytest.raises(UserError, match="checkpoint-6 is the checkpoint of 2 ranks and cannot be continued by 1"):
        ranks_worker.train(load(str(experiment_file)), root, "FuseLLM")
    only = ["--set", "methods.KD=null", "--set", "methods.ALM=null", "--set", "roles.sources.twin=null"]
    done = launch("-m", "harness", "experiment", "run", experiment_file, *only, "--root", root)
    assert "FuseLLM (seed 0): going on from checkpoint-6" in done.stderr
    expected, found = weights(trained(together, "FuseLLM")), weights(trained(root, "FuseLLM"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    # All stages of the run, said and written once.
    assert done.stdout.count("a small experiment") == 1 and done.stderr.count("Table, figure and records") == 1
    (run,) = root.glob("runs/*/*/*/run.json")
    assert {r.split("-")[0] for r in json.loads(run.read_text())["records"]} == {"llama", "neox", "CLM", "FuseLLM"}
    assert json.loads((trained(root, "CLM") / "manifest.json").read_text())["info"]["ranks"] == 2


@pytest.mark.slow
def test_a_mistake_of_all_ranks_is_said_once(experiment_file: Path, tmp_path: Path) -> None:
    settings = ["--set", "training.global_batch_size=3", "--root", tmp_path]
    done = launch("-m", "harness", "experiment", "run", experiment_file, *settings, check=False)
    (sentence,) = sentences(done)
    assert "training.global_batch_size = 3 is no multiple of 2 ranks" in sentence
    assert "2" in re.findall(r"exitcode +: (\S+)", done.stderr)


@pytest.mark.slow
def test_the_deepspeed_launcher_does_as_well(experiment_file: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [launcher, "--num_accelerators", 2, "--master_port", port, "--module", "harness", "experiment", "run"]
    command += [experiment_file, "--root", tmp_path, "--set", "training.global_batch_size=3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(map(str, command), capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 2 and "is no multiple of 2 ranks" in done.stderr
    assert len(sentences(done)) == 1


FAILING = """
import torch
from fusion.errors import UserError
from harness import cli
from harness.experiment import run as running
from harness.runtime import distributed

def make_records(config, root):
    distributed.initialize("cpu")
    if distributed.is_main_process():
        torch.distributed.barrier()
    raise UserError("the second rank has failed.")

distributed._GRACE = 3
running.make_records = make_records
cli.main()
"""


@pytest.mark.slow
def test_the_mistake_of_one_rank_ends_all(experiment_file: Path, tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING)
    done = launch(tmp_path / "failing.py", "experiment", "run", experiment_file, check=False)
    assert sentences(done) == ["fusellm: the second rank has failed."]
    assert "Traceback" not in done.stderr.split("torch/distributed/elastic")[0]


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set_rank(rank: int, world: int) -> None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}.items():
            monkeypatch.setenv(name, str(value))

    return set_rank


def test_other_ranks_wait_for_what_the_first_one_makes(
    as_rank: Callable[[int, int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Spec("passages", "some", 1, {}, {})

    def make(folder: Path) -> None:
        (folder / "file").write_text("whole")

    def meanwhile(there: Callable[[], bool]) -> None:
        assert not there()
        as_rank(0, 2)
        Store(tmp_path).ensure(spec, make)
        assert there()

    as_rank(1, 2)
    monkeypatch.setattr(distributed, "wait_until", meanwhile)
    path = Store(tmp_path).ensure(spec, lambda folder: pytest.fail("made twice"))
    assert (path / "file").read_text() == "whole"


def test_no_epoch_of_one_seed_has_the_order_of_an_epoch_of_another() -> None:
    orders = []
    for seed in range(4):
        order = Order(50, seed, 1)
        for epoch in range(4):
            order.set_epoch(epoch)
            orders.append(tuple(order))
    assert len(set(orders)) == len(orders)


@given(
    rows=st.integers(1, 40),
    world=st.integers(1, 4),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    epoch=st.integers(0, 2),
)
def test_every_step_has_the_rows_of_one_rank(rows: int, world: int, micro: int, accumulation: int, epoch: int) -> None:
    def order(multiple: int) -> Order:
        made = Order(rows, 7, multiple)
        made.set_epoch(epoch)
        return made

    dealt = [
        list(BatchSamplerShard(BatchSampler(order(micro * world), micro, False), world, rank)) for rank in range(world)
    ]
    assert len({len(batches) for batches in dealt}) == 1
    alone, size = list(order(1)), micro * accumulation * world
    assert sorted(alone) == list(range(rows))
    for step, start in enumerate(range(0, rows, size)):
        part = slice(step * accumulation, (step + 1) * accumulation)
        together = [row for batches in dealt for batch in batches[part] for row in batch]
        assert sorted(row for row in together if row < rows) == sorted(alone[start : start + size])


def test_probabilities_are_not_rounded_to_the_models_dtype() -> None:
    """Under DeepSpeed the Trainer would cast every floating-point input."""
    trainer = object.__new__(FusionTrainer)
    trainer.args, trainer.is_deepspeed_enabled = SimpleNamespace(device="cpu"), True
    p = torch.rand(3)
    assert torch.equal(trainer._prepare_inputs({"p": p})["p"], p)


@pytest.mark.parametrize(
    "environment", [{"WORLD_SIZE": "2"}, {"ACCELERATE_USE_CPU": "true", "MASTER_PORT": "29500"}], ids=str
)
def test_a_launcher_that_numbers_none_is_refused(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="their launcher numbered none"):
        distributed.initialize("cpu")


def test_another_number_of_ranks_than_was_started_is_refused(as_rank: Callable[[int, int], None]) -> None:
    as_rank(0, 2)
    with pytest.raises(UserError, match="The launcher started 2 ranks, but accelerate works with 1"):
        distributed.check_world(1, "accelerate")


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_shipped_configurations_are_of_their_stage(name: str) -> None:
    config = zero_config(name)
    assert config["zero_optimization"]["stage"] == int(name[-1])
    assert config["train_batch_size"] == config["gradient_clipping"] == config["bf16"]["enabled"] == "auto"


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (None, "'zero22' is no JSON file and none of zero1, zero2, zero3 (did you mean 'zero2'?)"),
        ("{", "is no JSON object"),
        ("[]", "is no JSON object"),
        ({"zero_optimization": {"stage": 0}}, "does not say which stage"),
        ({"optimizer": {"type": "Lamb"}}, "has its own optimizer"),
        ({"fp16": {"enabled": True}}, "has its own fp16"),
        ({"train_batch_size": 32}, "sets train_batch_size"),
        ({"bf16": {"enabled": True}}, "sets bf16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "sets data_types"),
    ],
)
def test_configurations_that_do_not_hold_are_refused(written: Any, sentence: str, tmp_path: Path) -> None:
    name = "zero22"
    if written is not None:
        path = tmp_path / "ds.json"
        whole = {"zero_optimization": {"stage": 2}} | written if isinstance(written, dict) else written
        path.write_text(whole if isinstance(whole, str) else json.dumps(whole))
        name = str(path)
    with pytest.raises(UserError) as error:
        zero_config(name)
    assert sentence in str(error.value)
