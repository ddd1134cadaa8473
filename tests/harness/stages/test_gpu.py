"""What needs a CUDA device: run by `fusellm doctor --gpu`, skipped where there is none."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusion.losses.objective import Head, Objective, mixed_loss
from fusion.losses.sparse_cross_entropy import SparseCrossEntropy
from harness.config.loading import load
from harness.config.schema import Config
from tests.harness import ranks_worker
from tests.harness.runtime.test_distributed import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_the_objective_is_the_cpus() -> None:
    torch.manual_seed(0)
    n, d, v, k = 300, 32, 1000, 6
    kept = torch.rand(n, k)
    gold = torch.randint(v, (n,))
    ids = torch.stack([torch.randperm(v)[:k] for _ in range(n)])
    arrays = [ids, 0.8 * kept / kept.sum(1, keepdim=True), torch.full((n,), 0.2), torch.ones(n)]
    hidden, weight = torch.randn(n, d), torch.randn(v, d) / 4

    def on(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        h, w = (x.detach().to(device, dtype).requires_grad_() for x in (hidden, weight))
        term = SparseCrossEntropy(*(x.to(device) for x in arrays))
        objective = Objective(gold.to(device), torch.ones(n, device=device), 0.7, term)
        loss = mixed_loss(h, Head(w), objective)
        loss.total.backward()
        assert h.grad is not None and w.grad is not None
        return [x.detach().cpu().double() for x in (loss.clm, loss.fusion, h.grad, w.grad)]

    for found, expected in zip(on("cuda", torch.float32), on("cpu", torch.float64), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def small(experiment_file: Path, device: str, dtype: str) -> Config:
    """The small experiment with everything but the training in float32, so that devices can be compared."""
    roles = [f"roles.{role}.dtype=float32" for role in ("target", "sources.neox")]
    settings = [*roles, f"device={device}", f"training.dtype={dtype}", "training.global_batch_size=4"]
    return load(str(experiment_file), overrides=settings)


@pytest.fixture(scope="module")
def on_the_cpu(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ranks_worker.Gradients:
    """The gradients of FuseLLM's first step, in float32."""
    config = small(experiment_file, "cpu", "float32")
    return ranks_worker.train(config, tmp_path_factory.mktemp("cpu"), "FuseLLM")[1]


def apart(found: ranks_worker.Gradients, expected: ranks_worker.Gradients) -> float:
    """The distance of all gradients, relative to their size."""
    one, two = (torch.cat([g[name].flatten().double().cpu() for name in sorted(g)]) for g in (found, expected))
    return float((one - two).norm() / two.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_a_training_step_is_the_cpus(
    on_the_cpu: ranks_worker.Gradients,
    experiment_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    tolerance: float,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a process refuses to choose among several
    candidate, found = ranks_worker.train(small(experiment_file, "cuda", dtype), tmp_path, "FuseLLM")
    assert apart(found, on_the_cpu) <= tolerance
    saved = load_file(candidate.folder / "model.safetensors")
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in saved.values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_two_gpus_under_zero2_train_as_the_cpu(
    on_the_cpu: ranks_worker.Gradients, experiment_file: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    config = small(experiment_file, "cuda", dtype)
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    launch("-m", "tests.harness.ranks_worker", file, tmp_path, "zero2:FuseLLM")
    assert apart(load_file(tmp_path / "zero2-FuseLLM.safetensors"), on_the_cpu) <= tolerance
