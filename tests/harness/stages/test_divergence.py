"""A training whose step is void is said to have diverged, whatever carries the step out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from harness.experiment.candidates import candidates
from harness.stages import training
from harness.stages.trainer.held_out import Diverged
from tests.harness.bigrams import Bigrams, experiment

STEPS = 2


# The last is finite, and the sum of its squares is not, so that clipping by its norm would leave nothing of it.
@pytest.mark.parametrize("gradient", [float("inf"), float("nan"), 1e30])
def test_a_gradient_that_is_not_finite_is_a_divergence(
    gradient: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_model, steps = training.load_model, []

    def load(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)

        def spoil(parameter: torch.nn.Parameter) -> None:
            steps.append(parameter)
            if len(steps) == STEPS:  # after which no loss is computed
                assert parameter.grad is not None
                parameter.grad.fill_(gradient)

        model.lm_head.weight.register_post_accumulate_grad_hook(spoil)
        return model

    monkeypatch.setattr(training, "load_model", load)
    with pytest.raises(Diverged, match=f"the gradient is not finite at step {STEPS}: lower training.learning_rate"):
        list(candidates(_experiment(tmp_path)))


def test_a_step_that_is_left_out_is_a_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", True)
    with pytest.raises(Diverged, match="the gradient is not finite at step 1"):
        list(candidates(_experiment(tmp_path)))


def test_a_last_step_that_leaves_no_finite_loss_is_a_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step

    def explode(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", explode)
    with pytest.raises(Diverged, match="the loss is not finite after the last step"):
        list(candidates(_experiment(tmp_path, "training.epochs=1")))
    (tmp_path / "validation.txt").write_text("abcdc")
    validated = ["training.epochs=1", "training.select=best", f"validation.path={tmp_path / 'validation.txt'}"]
    with pytest.raises(Diverged, match=r"at step 1 perplexity of validation.txt .* are not finite.*: lower training"):
        list(candidates(_experiment(tmp_path, *validated)))


def _experiment(folder: Path, *settings: str) -> Any:
    clm = 'methods.X={"method": "clm"}'
    return experiment(folder, ["abcd"], {"s": Bigrams()}, clm, f"training.epochs={STEPS}", *settings)
