"""Held-out text that is measured while a training goes on, and the checkpoint that validation text likes best."""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, TrainerCallback

from fusion.errors import NotFinite, UserError
from harness.runtime import distributed
from harness.stages.trainer.fusion_trainer import FusionTrainer
from harness.stages.trainer.sealing import check_seal, is_sealed, read_seal
from harness.stages.training_log import curve_files, nats_per_byte
from harness.store.files import intact_lines, rename_durably


class Diverged(UserError):
    """A training whose loss, its gradient, or the loss of validation text with it, is not finite."""


@dataclass(frozen=True)
class Curve:
    """Held-out text measured before the first step and at `points` steps: `measure(model)` gives a record a document.

    `name` tells it from other curves by which the same training may have been begun.
    """

    points: int
    name: str
    measure: Callable[[PreTrainedModel], list[dict[str, Any]]]

    def steps(self, steps: int) -> list[int]:
        """The steps at which it is measured, of a training of so many."""
        return sorted({0, *(round(steps * i / self.points) for i in range(1, self.points + 1))})

    def file(self, folder: Path) -> Path:
        """The measurements so far, in the folder of the training or of one of its checkpoints."""
        return folder / f"curve-{self.name}.jsonl"

    def measured(self, folder: Path) -> list[dict[str, Any]]:
        """The measurements so far: step, tokens trained on, and a record a document."""
        return [json.loads(line) for line in intact_lines(self.file(folder))]


class Write(Protocol):
    """Writes the model as it is to `place` and seals it with what is said `about` it; called by all ranks."""

    def __call__(self, place: Path, **about: Any) -> None: ...


class BestCheckpoint:
    """The checkpoint so far with which the text of `curve` has the fewest nats per byte, in `folder`/best-STEP.

    The one before the first step does not count. There is one copy of the weights; a training that goes on after an
    interruption finds it, whatever it has to do again. Raises UserError where that copy is damaged.
    """

    def __init__(self, folder: Path, curve: Curve, write: Write) -> None:
        self.curve = curve
        self._folder, self._write = folder, write
        self._step, self._nll = 0, math.inf
        if distributed.is_main_process() and (kept := self._tidy()) is not None:
            check_seal(kept, f"remove {folder} to train again")
            self._step, self._nll = _about(kept)["step"], _about(kept)["nats_per_byte"]

    def consider(self, point: Mapping[str, Any]) -> None:
        """Keeps the model as it is if it is the best so far, given its measurement; called by all ranks."""
        nll = nats_per_byte(point["records"])
        # Measured again after an interruption it differs by rounding at most.
        if not distributed.broadcast(0 < point["step"] != self._step and nll < self._nll):
            return
        self._step, self._nll = point["step"], nll
        about = {"step": self._step, "tokens": int(point["tokens"]), "nats_per_byte": nll}
        self._write(self._folder / f"best-{self._step}", **about)
        if distributed.is_main_process():
            self._tidy()

    def finish(self, final: Path) -> None:
        """Gives it its final place. Raises UserError where there is none; called by the main process."""
        kept = self._tidy()
        if kept is None:
            raise Diverged(
                "No checkpoint has a finite likelihood of the validation text: lower training.learning_rate."
            )
        rename_durably(kept, final)

    def _tidy(self) -> Path | None:
        """The best complete copy, if there is any; others are removed."""
        copies = list(self._folder.glob("best-*"))
        kept = min(filter(is_sealed, copies), key=lambda copy: float(_about(copy)["nats_per_byte"]), default=None)
        for copy in copies:
            if copy != kept:
                shutil.rmtree(copy)
        return kept


def _about(folder: Path) -> dict[str, Any]:
    return read_seal(folder, f"remove {folder.parent} to train again")


def selected(final: Path, curve: Curve) -> dict[str, Any]:
    """Which checkpoint became the finished model: its step, tokens and nats per byte of validation text.

    With the tokens and nats per byte at all `points` that it was chosen among, the one before the first step included.
    """
    points = [[int(point["tokens"]), nats_per_byte(point["records"])] for point in curve.measured(final.parent)]
    about = _about(final)
    return {name: about[name] for name in ("step", "tokens", "nats_per_byte")} | {"points": points}


class Follow(TrainerCallback):
    """Progress, TensorBoard values, the held-out curve and the best checkpoint."""

    def __init__(
        self,
        folder: Path,
        curves: Sequence[Curve],
        steps: int,
        best: BestCheckpoint | None,
        advance: Callable[[float], None],
    ) -> None:
        self.trainer: FusionTrainer | None = None
        self._folder, self._best, self._advance = folder, best, advance
        self._curves = [(curve, curve.steps(steps)) for curve in curves]
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        distributed.limit_collectives(args.ddp_timeout)
        self._tokens = next((e["tokens"] for e in reversed(state.log_history) if "tokens" in e), 0.0)
        if distributed.is_main_process():
            # What was measured after the checkpoint is measured again; without one the curve starts again, too.
            for measured in curve_files(self._folder):
                measured.unlink()
            for kept in curve_files(self._folder / "checkpoints" / f"checkpoint-{state.global_step}"):
                shutil.copy(kept, self._folder)
        if state.global_step == 0:
            self._measure(args, state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Resumed in a later epoch on several ranks, the loader that skips batches does not pass the epoch on.
        assert self.trainer is not None
        self.trainer.order.set_epoch(int(state.epoch))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        sums = self.trainer.global_sums()
        self._tokens += sums["tokens"]
        self._advance(sums["tokens"])
        per_token = {name: sums[name] / sums["tokens"] for name in ("clm", "fusion")}
        is_finite = all(math.isfinite(value) for value in per_token.values())
        if not (is_finite and self.trainer.has_finite_gradient):  # before a checkpoint keeps it
            what = "gradient" if is_finite else "loss"
            raise Diverged(f"the {what} is not finite at step {state.global_step}: lower training.learning_rate.")
        self.trainer.log({"tokens": self._tokens, **{f"{n}_nats_per_token": v for n, v in per_token.items()}})
        self._measure(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        if not self.trainer.has_finite_loss():
            raise Diverged("the loss is not finite after the last step: lower training.learning_rate.")
        if not distributed.is_main_process():
            return
        for curve, steps in self._curves:
            if [point["step"] for point in curve.measured(self._folder)] != steps:  # begun under another curve
                curve.file(self._folder).unlink(missing_ok=True)

    def _measure(self, args: Any, state: Any) -> None:
        assert self.trainer is not None
        for curve, steps in self._curves:
            if state.global_step not in steps:
                continue
            model = self.trainer.model_wrapped
            training = model.training
            model.eval()
            self.trainer.beat("the measurement of held-out text")
            # On all ranks, and through what wraps the model: ZeRO-3 gathers weights there, and with all of them.
            with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                try:
                    records = model(measure=curve.measure)
                except NotFinite as error:
                    if state.global_step == 0:  # of the model as it was given
                        raise
                    raise Diverged(f"at step {state.global_step} {error}: lower training.learning_rate.") from None
            model.train(training)
            point = {"step": state.global_step, "tokens": self._tokens, "records": records}
            if distributed.is_main_process():
                with curve.file(self._folder).open("a", encoding="utf-8") as file:
                    file.write(json.dumps(point) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
            if self._best is not None and curve is self._best.curve:
                self._best.consider(point)
