"""Two ranks under FSDP2 on the CPU: the training of one process, which another number of ranks can continue."""

import errno
import json
import shutil
from pathlib import Path
from traceback import StackSummary

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MptConfig, Trainer

from fusion.errors import UserError
from fusion.modeling.heads import find_head, split, split_as
from fusion.modeling.packing import check_packing
from fusion.modeling.shallow_copy import shallow_copy
from harness.config.schema import TrainingConfig
from harness.models.checkpoints import load_model, load_without_weights
from harness.models.resolution import ModelSpec, resolve
from harness.runtime.user_errors import sentence_about
from harness.stages.trainer.fusion_trainer import FusionTrainer
from harness.stages.trainer.sealing import last_checkpoint, layout_of, seal
from tests.harness import ranks_worker
from tests.harness.ranks_worker import place
from tests.harness.runtime.test_distributed import STEPS, curve, launch, trained, weights
from tests.harness.tiny_models import save_model

LEARNING_RATE = 0.01


@pytest.fixture(scope="module")
def experiment_file(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small experiment in twenty steps, on a target whose head is its embedding."""
    folder = tmp_path_factory.mktemp("fsdp")
    raw = yaml.safe_load(experiment_file.read_text())
    raw["training"] |= {"global_batch_size": 4, "epochs": 4}
    raw["roles"]["target"]["model"] = str(save_model(folder / "llama", LlamaConfig, 300, 0, tie_word_embeddings=True))
    path = folder / "small-experiment.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def alone(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FuseLLM trained by one process."""
    root = tmp_path_factory.mktemp("alone")
    ranks_worker.main(str(experiment_file), root, "-:FuseLLM")
    return root


@pytest.fixture(scope="module")
def together(experiment_file: Path, alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two ranks, once to the end and once until after a checkpoint."""
    root = tmp_path_factory.mktemp("together")
    for kind in ("passages", "predictions", "map"):
        for folder in (root, root / "again"):
            shutil.copytree(alone / "artifacts" / kind, place(folder, "fsdp2") / "artifacts" / kind)
    launch("-m", "tests.harness.ranks_worker", experiment_file, root, "fsdp2:FuseLLM", "fsdp2:FuseLLM:stop:7")
    return root


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Whether weights are the same up to the order of sums, after as many steps of Adam."""
    assert expected.keys() == found.keys()
    assert all(value.dtype == torch.float32 for value in found.values())
    return all((found[n] - value).abs().max() <= LEARNING_RATE * STEPS * 1e-2 for n, value in expected.items())


@pytest.mark.slow
def test_two_ranks_train_as_one(alone: Path, together: Path) -> None:
    one, two = load_file(alone / "--FuseLLM.safetensors"), load_file(together / "fsdp2-FuseLLM.safetensors")
    assert one.keys() == two.keys() and len(one) > 10
    for name, expected in one.items():
        assert (two[name] - expected).norm() <= 1e-6 * expected.norm(), name
    before, after = trained(alone, "FuseLLM"), place(together, "fsdp2") / "artifacts" / "train"
    (after,) = after.glob("FuseLLM-*")
    assert close(weights(after), weights(before))
    assert (after / "model" / "config.json").read_text() == (before / "model" / "config.json").read_text()
    nats = [
        [record["nats"] for point in curve(root, "FuseLLM") for record in point["records"]]
        for root in (alone, place(together, "fsdp2"))
    ]
    assert nats[1] == pytest.approx(nats[0], rel=1e-3)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(alone: Path, together: Path, experiment_file: Path) -> None:
    again = together / "again"
    done = launch("-m", "tests.harness.ranks_worker", experiment_file, again, "fsdp2:FuseLLM", n=1)
    assert "FuseLLM (seed 0): going on from checkpoint-6" in done.stderr
    (after,) = (place(again, "fsdp2") / "artifacts" / "train").glob("FuseLLM-*")
    assert json.loads((after / "manifest.json").read_text())["resumed"]
    assert close(weights(after), weights(trained(alone, "FuseLLM")))


@pytest.mark.slow
def test_it_computes_in_bfloat16_as_plain_data_parallelism_does(experiment_file: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(experiment_file.read_text())
    raw["training"] |= {"dtype": "bfloat16", "gradient_checkpointing": True, "epochs": 1}
    file = tmp_path / "bfloat16.yaml"
    file.write_text(yaml.safe_dump(raw))
    launch("-m", "tests.harness.ranks_worker", file, tmp_path, "-:CLM", "fsdp2:CLM")
    one, two = (load_file(tmp_path / f"{kind}-CLM.safetensors") for kind in ("-", "fsdp2"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        assert (two[name] - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize(
    ("wrote", "now", "sentence"),
    [
        ({"ranks": 2, "sharding": "ZeRO-2"}, {"ranks": 1, "sharding": "ZeRO-2"}, "the checkpoint of 2 ranks"),
        ({"ranks": 2, "sharding": "ZeRO-2"}, {"ranks": 2, "sharding": "FSDP2"}, "was written under ZeRO-2"),
        ({"ranks": 2, "sharding": "FSDP2"}, {"ranks": 2, "sharding": "no sharding"}, "was written under FSDP2"),
        ({"ranks": 2, "sharding": "FSDP2"}, {"ranks": 8, "sharding": "FSDP2"}, None),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    wrote: dict[str, int | str], now: dict[str, int | str], sentence: str | None, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    seal(checkpoint, wrote)
    if sentence is None:
        assert last_checkpoint(tmp_path, now) == checkpoint
        return
    with pytest.raises(UserError, match=sentence):
        last_checkpoint(tmp_path, now)


def test_a_disk_that_is_full_at_a_checkpoint_is_an_error_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: object) -> None:
        raise CheckpointException("save", {1: (OSError(errno.ENOSPC, "No space left on device"), StackSummary())})

    monkeypatch.setattr(Trainer, "_save_checkpoint", save)
    trainer = object.__new__(FusionTrainer)
    trainer.beat = lambda doing: None
    with pytest.raises(OSError, match="No space left") as raised:
        trainer._save_checkpoint(nn.Linear(1, 1), None)
    assert "does not fit on the disk" in (sentence_about(raised.value) or "")


def test_a_full_gpu_is_one_sentence() -> None:
    assert "training.micro_batch_size" in (sentence_about(torch.OutOfMemoryError("CUDA out of memory")) or "")


def test_the_layout_says_how_a_checkpoint_is_divided() -> None:
    assert layout_of(TrainingConfig(fsdp2=True))["sharding"] == "FSDP2"
    assert layout_of(TrainingConfig(deepspeed="zero3"))["sharding"] == "ZeRO-3"


def test_a_model_without_weights_is_the_model_but_for_them(tmp_path: Path) -> None:
    resolved = resolve(ModelSpec(name=str(save_model(tmp_path / "m", LlamaConfig, 300, 0))), tmp_path)
    whole, empty = load_model(resolved, "float32"), load_without_weights(resolved)
    assert type(empty) is type(whole)
    shapes = [{name: (p.shape, p.dtype) for name, p in model.named_parameters()} for model in (whole, empty)]
    assert shapes[0] == shapes[1]
    buffers = [dict(model.named_buffers()) for model in (whole, empty)]
    assert buffers[0].keys() == buffers[1].keys()
    assert all(torch.equal(buffers[1][name], value) for name, value in buffers[0].items())


_SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 300}
KINDS = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (LlamaConfig(**_SIZES, num_hidden_layers=5), 2),
        (LlamaConfig(**_SIZES, num_hidden_layers=1), 1),
        (MptConfig(d_model=16, n_heads=2, n_layers=5, vocab_size=300), 2),
        (
            Gemma3TextConfig(
                **_SIZES, num_hidden_layers=5, head_dim=8, num_key_value_heads=1, layer_types=KINDS, sliding_window=4
            ),
            4,
        ),
    ],
    ids=["llama", "one layer", "mpt", "gemma3"],
)
def test_a_shallow_copy_proves_what_the_model_proves(config: object, layers: int) -> None:
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    state = torch.get_rng_state()
    copied = shallow_copy(model, "cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert copied.config.num_hidden_layers == layers
    assert check_packing(copied) == check_packing(model)
    assert split(copied) == split(model)
    other: nn.Module = AutoModelForCausalLM.from_config(config)
    split_as(other, copied)
    assert (find_head(other) is None) == (find_head(model) is None)
