"""What the tests of several ranks run, in one process or under a launcher: trainings whose first gradient is kept."""

import gc
import os
import signal
import sys
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from baselines.method import Candidate
from harness.config.loading import load
from harness.config.schema import Config
from harness.experiment.candidates import candidates
from harness.experiment.pipeline import open_experiment, start
from harness.runtime import distributed
from harness.stages.trainer.fusion_trainer import FusionTrainer
from harness.stages.trainer.held_out import Follow

Gradients = dict[str, torch.Tensor]


def first_gradients(trainer: FusionTrainer) -> Gradients:
    """Of the first step, from Adam's first moment after it: the one place where every kind of training keeps it."""
    found = {}
    assert trainer.is_deepspeed_enabled == bool(trainer.args.deepspeed)
    if trainer.is_deepspeed_enabled and trainer.model_wrapped.zero_optimization_stage() < 3:
        # DeepSpeed 0.19 looks for all groups' moments when it has stepped the first group, and never again.
        trainer.model_wrapped.optimizer._hp_optimizer_states_linked = False
        trainer.model_wrapped.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_optimizer_state

            moment = safe_get_full_optimizer_state(parameter, "exp_avg")
        else:
            moment = trainer.optimizer.state[parameter]["exp_avg"]
            moment = moment.full_tensor() if isinstance(moment, DTensor) else moment
        found[name] = moment.clone() / (1 - trainer.args.adam_beta1)
    return found


class Watched:
    """While it lasts, trainings leave the gradients of their first step in `gradients`, and can be made to fail."""

    def __init__(self, at_step: Mapping[int, Any] = {}) -> None:
        self.gradients: Gradients = {}
        self.model: Any = lambda: None
        self._at_step = at_step

    def __enter__(self) -> "Watched":
        self._original = original = Follow.on_step_end

        def on_step_end(follow: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                self.model = weakref.ref(follow.trainer.accelerator.unwrap_model(follow.trainer.model))
                self.gradients = first_gradients(follow.trainer)
            original(follow, args, state, control, **kwargs)
            if act := self._at_step.get(state.global_step):
                act()

        Follow.on_step_end = on_step_end  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Follow.on_step_end = self._original  # type: ignore[method-assign]


def train(config: Config, root: Path, label: str, at_step: Mapping[int, Any] = {}) -> tuple[Candidate, Gradients]:
    """The row's candidate, and the gradients of its training's first step."""
    only = config.model_copy(update={"methods": {label: config.methods[label]}})
    experiment = open_experiment(only, root)
    start(experiment)
    with Watched(at_step) as watched:
        (row,) = candidates(experiment)
    gc.collect()
    assert watched.model() is None, "a finished training holds its model's memory"
    return row.candidate, watched.gradients


class Interrupted(BaseException):
    """Stands for a kill of all ranks at once: nothing catches it."""


def _interrupt() -> None:
    raise Interrupted


def _kill_the_last() -> None:
    if distributed.local_rank() == distributed.world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)


def place(root: Path, zero: str) -> Path:
    """The folder of the artifacts of trainings under a stage of ZeRO, which are the same artifacts under another."""
    return root if zero == "-" else root / zero


def main(experiment: str, root: Path, *jobs: str) -> None:
    """Each job is ZERO:ROW, ZERO:ROW:interrupt:STEP (all ranks fail after that step, then start again),
    ZERO:ROW:stop:STEP (they fail and do not) or ZERO:ROW:kill:STEP (one rank is killed); ZERO may be - or fsdp2.
    Artifacts lie in `root` and `root/ZERO`, those of trainings that start again in `root/again` and `root/again/ZERO`.
    """
    for job in jobs:
        zero, label, *fault = job.split(":")
        setting = {"-": [], "fsdp2": ["training.fsdp2=true"]}.get(zero, [f"training.deepspeed={zero}"])
        config = load(experiment, overrides=setting)
        if not fault:
            _, gradients = train(config, place(root, zero), label)
            if distributed.is_main_process():
                save_file(gradients, root / f"{zero}-{label}.safetensors")
            continue
        act = _kill_the_last if fault[0] == "kill" else _interrupt
        with suppress(Interrupted):
            train(config, place(root / "again", zero), label, {int(fault[1]): act})
        torch.distributed.barrier()  # the first rank has let the lock go
        if fault[0] != "stop":
            train(config, place(root / "again", zero), label)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
