"""One trainer for every trained method, on the Hugging Face Trainer.

What is ours: the objective inside the model's forward (so that data-parallel wrappers see it), one denominator over
the whole global batch, checkpoints that are complete or not there, and the held-out curve.
"""

import json
import math
import os
import shutil
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fusion.errors import UserError
from fusion.heads import fused_forward, split
from fusion.packing import Packing, attending_by_piece, check_packing
from harness.artifacts import file_sha256, read_json, write_atomically, write_json
from harness.config import TrainingSection
from harness.models import compute_dtype
from harness.progress import say, track
from harness.rows import Rows, collate
from harness.training_log import CURVE_FILE

MODEL_FOLDER = "model"
_COMPLETE = "complete"


@dataclass(frozen=True)
class Curve:
    """Held-out text measured during training, at `points` steps: `measure(model)` gives one record a document."""

    points: int
    measure: Callable[[PreTrainedModel], list[dict[str, Any]]]


def steps_of(config: TrainingSection, rows: int) -> int:
    """Optimiser steps of a whole training on so many rows."""
    return max(1, math.ceil(math.ceil(rows / config.rows_per_step) * config.epochs))


class FusionTrainer(Trainer):
    """The Trainer with a loss that is a sum over tokens divided by the tokens of the whole global batch."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # have the tokens of the accumulated batch counted
        self._loss_shifts_labels = False  # labels stand at the position that predicts them
        self.sums = {"clm": 0.0, "fusion": 0.0, "tokens": 0.0}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if num_items_in_batch is None:
            raise RuntimeError("the Trainer did not count the tokens of the batch; the loss would be scaled wrongly")
        total, clm, fusion = model(**inputs)
        for name, value in (("clm", clm), ("fusion", fusion), ("tokens", inputs["labels"].ne(-100).sum())):
            self.sums[name] += float(value)
        # Ranks' gradients are averaged afterwards, so each gives its share of the global sum times their number.
        return total * self.accelerator.num_processes / num_items_in_batch

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.copy(folder.parents[1] / CURVE_FILE, folder)
            _seal(folder)


class _Follow(TrainerCallback):
    """Progress, TensorBoard values and the held-out curve."""

    def __init__(self, folder: Path, curve: Curve | None, at: set[int], advance: Callable[[float], None]) -> None:
        self.trainer: FusionTrainer | None = None
        self._folder, self._curve, self._at, self._advance = folder, curve, at, advance
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tokens = next((e["tokens"] for e in reversed(state.log_history) if "tokens" in e), 0.0)
        # What was measured after the checkpoint is measured again; without one the curve starts again, too.
        kept = self._folder / "checkpoints" / f"checkpoint-{state.global_step}" / CURVE_FILE
        write_atomically(self._folder / CURVE_FILE, kept.read_text(encoding="utf-8") if state.global_step else "")
        if state.global_step == 0:
            self._measure(args, state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        sums = self.trainer.sums
        self.trainer.sums = dict.fromkeys(sums, 0.0)
        self._tokens += sums["tokens"]
        self._advance(sums["tokens"])
        per_token = {name: sums[name] / sums["tokens"] for name in ("clm", "fusion")}
        if not all(math.isfinite(value) for value in per_token.values()):  # before a checkpoint keeps it
            raise UserError(f"the loss is not finite at step {state.global_step}: lower training.learning_rate.")
        self.trainer.log({"tokens": self._tokens, **{f"{n}_nats_per_token": v for n, v in per_token.items()}})
        if state.global_step in self._at:
            self._measure(args, state, kwargs["model"])

    def _measure(self, args: Any, state: Any, model: PreTrainedModel) -> None:
        if self._curve is None or not state.is_world_process_zero:
            return
        training = model.training
        model.eval()
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            records = self._curve.measure(model)
        model.train(training)
        with (self._folder / CURVE_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "tokens": self._tokens, "records": records}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _replace_forward(model: PreTrainedModel, packing: Packing, lam: float) -> None:
    """Puts the objective inside the model's forward, where wrappers for data parallel training call it."""

    def forward(self: PreTrainedModel, **inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        labels = inputs["labels"]
        loss = fused_forward(
            self,
            inputs["input_ids"],
            inputs["position_ids"],
            gold=labels.clamp(min=-1),
            clm_weight=(labels >= 0).float(),
            ids=inputs.get("fused_ids"),
            p=inputs.get("fused_p"),
            tail=inputs.get("fused_tail"),
            fusion_weight=inputs.get("fusion_weight"),
            lam=lam,
            packing=packing,
        )
        return loss.total, loss.clm, loss.fusion

    model.forward = types.MethodType(forward, model)


def _seal(folder: Path) -> None:
    """Marks a folder as complete and its files as they are now."""
    files = {str(f.relative_to(folder)): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    write_json(folder / _COMPLETE, {"files": files})


def _check_seal(folder: Path, remedy: str) -> None:
    """Raises UserError, ending in `remedy`, where a file of a complete folder is not as it was."""
    for name, sha256 in read_json(folder / _COMPLETE, remedy)["files"].items():
        if not (folder / name).exists() or file_sha256(folder / name) != sha256:
            raise UserError(f"{folder / name} is damaged: {remedy}.")


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; half-written ones are removed. Raises UserError where it has been damaged."""
    complete = []
    for path in folder.glob("checkpoint-*"):
        if (path / _COMPLETE).exists():
            complete.append(path)
        else:
            shutil.rmtree(path)
    last = max(complete, key=lambda p: int(p.name.split("-")[1]), default=None)
    if last is not None:
        _check_seal(last, f"remove {last} to go on from the checkpoint before it")
    return last


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Rows,
    config: TrainingSection,
    *,
    lam: float,
    seed: int,
    device: str,
    folder: Path,
    label: str,
    card: str,
    curve: Curve | None = None,
) -> None:
    """Trains `model` on `rows` and leaves `folder/model`, which plain `AutoModelForCausalLM.from_pretrained` loads.

    Goes on from the last complete checkpoint in `folder`, bit for bit. `lam` is the weight of the CLM term
    (paper section 3.3, equation 5). Raises UserError when packed pieces would see each other or the loss diverges.
    """
    final = folder / MODEL_FOLDER
    if (final / _COMPLETE).exists():  # killed between the end of training and the artifact's rename
        _check_seal(final, f"remove {final} to train again")
        _finish(folder)
        return
    packing = check_packing(model)
    split(model)  # says before the training starts when the fused objective cannot serve this model
    steps = steps_of(config, len(rows))
    at = {round(steps * i / curve.points) for i in range(1, curve.points + 1)} if curve else set()
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=config.micro_rows,
        gradient_accumulation_steps=config.rows_per_step // config.micro_rows,
        learning_rate=config.learning_rate,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        weight_decay=config.weight_decay,
        max_grad_norm=config.gradient_clip,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.warmup_ratio,
        num_train_epochs=config.epochs,
        bf16=compute_dtype(config.dtype, device) == "bfloat16",
        use_cpu=device == "cpu",
        activation_checkpointing=config.gradient_checkpointing,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,
        logging_strategy="no",
        report_to=["tensorboard"],
        seed=seed,
        data_seed=seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=config.workers,
        dataloader_persistent_workers=config.workers > 0,
        deepspeed=config.deepspeed,
    )
    _replace_forward(model, packing, lam)
    checkpoint = last_checkpoint(folder / "checkpoints")
    done = 0.0
    if checkpoint is not None:
        history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        done = next((e["tokens"] for e in reversed(history) if "tokens" in e), 0.0)
        say(f"{label}: going on from {checkpoint.name}")
    with track(f"train {label}", rows.n_tokens * config.epochs, "tokens", done=done) as advance:
        follow = _Follow(folder, curve, at, advance)
        trainer = FusionTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[follow]
        )
        follow.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        with attending_by_piece(model, packing):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    del model.forward  # the class's own again
    model.save_pretrained(final)
    tokenizer.save_pretrained(final)
    (final / "README.md").write_text(card, encoding="utf-8")
    write_atomically(folder / "log.json", json.dumps(trainer.state.log_history, indent=1))
    _seal(final)
    _finish(folder)


def _finish(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
