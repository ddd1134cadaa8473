"""What the real line computes, overheard: the rows that a training is given, and the gradient that it follows."""

import json
from typing import Any

import pytest
import torch

from harness.data.sequences import PackedSequences
from harness.experiment.candidates import candidates
from harness.experiment.pipeline import Experiment
from harness.stages import training
from harness.stages.trainer import loop


class _Caught(Exception):
    pass


def rows_of(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> PackedSequences:
    """The rows that the experiment's first training would be given."""

    def train(model: Any, tokenizer: Any, rows: PackedSequences, *args: Any, **kwargs: Any) -> None:
        raise _Caught(rows)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", train)
        with pytest.raises(_Caught) as caught:
            list(candidates(experiment))
    rows: PackedSequences = caught.value.args[0]
    return rows


def trained(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What the one step of the experiment's one training logged, and the gradient[name] of all its rows, unclipped."""
    gradients: dict[str, torch.Tensor] = {}
    load_model = training.load_model

    def listening(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        for name, parameter in model.named_parameters():
            # It accumulates row by row, so that what is heard last is the whole.
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: gradients.__setitem__(name, p.grad.double().clone())
            )
        return model

    with monkeypatch.context() as patch:
        patch.setattr(training, "load_model", listening)
        (row,) = candidates(experiment)
    assert row.candidate.training is not None
    (step,) = [e for e in json.loads((row.candidate.training / "log.json").read_text()) if "tokens" in e]
    return step, gradients
