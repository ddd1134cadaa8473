"""One trainer for every trained method, on the Hugging Face Trainer.

What is ours: the objective inside the model's forward (so that data-parallel wrappers see it), one denominator over
the whole global batch, the same rows in every step for any number of ranks, whole checkpoints, the held-out curve.
"""

import json
import math
import os
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from fusion.errors import UserError
from fusion.losses.loss import Balance, Loss
from fusion.losses.objective import Objective
from fusion.modeling.heads import fused_forward, split
from fusion.modeling.packing import Packing, attending_by_passage, check_packing
from fusion.modeling.teacher import Teacher
from harness.config.schema import TrainingConfig
from harness.data.sequences import PackedSequences, collate
from harness.runtime import distributed
from harness.runtime.device import compute_dtype
from harness.runtime.progress import notify, track
from harness.stages.sharding import release, whole_weights, without_own_ops, zero_config, zero_stage
from harness.stages.training_log import LOG_FILE, curve_files
from harness.store.files import intact_lines, read_json, sync_all, write_atomically, write_json
from harness.store.fingerprint import file_sha256
from harness.store.paths import MODEL_FOLDER

_COMPLETE = "complete"
_SEED_DISTANCE = 1_000_003  # more than the epochs of any training


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


def steps_of(config: TrainingConfig, rows: int) -> int:
    """Optimiser steps of a whole training on so many rows."""
    return max(1, math.ceil(math.ceil(rows / config.global_batch_size) * config.epochs))


class Order(Sampler[int]):
    """Rows in random order, the same on every rank, then empty ones until the ranks' batches are equal in number.

    accelerate deals batches out to the ranks in turn, so that a step has the rows it has on one rank. Without the empty
    rows it would even out the last step with rows of the first one, and they would count twice.
    """

    def __init__(self, rows: int, seed: int, multiple: int) -> None:
        self._rows = rows
        self._empty = -rows % multiple
        # The sampler draws by data_seed + epoch: far apart, lest epoch 1 of seed 0 be epoch 0 of seed 1.
        self._random = SeedableRandomSampler(range(rows), data_seed=_SEED_DISTANCE * seed)

    def set_epoch(self, epoch: int) -> None:
        self._random.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        yield from self._random
        yield from range(self._rows, self._rows + self._empty)

    def __len__(self) -> int:
        return self._rows + self._empty


class FusionTrainer(Trainer):
    """The Trainer with a loss that is a sum over tokens divided by the tokens of the whole global batch."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, order: Order, layout: Mapping[str, int | None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.order = order
        self._layout = layout
        self.model_accepts_loss_kwargs = True  # have the tokens of the accumulated batch counted
        self._loss_shifts_labels = False  # labels stand at the position that predicts them
        self.sums = {"clm": 0.0, "fusion": 0.0, "tokens": 0.0}

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Order:
        return self.order

    def _prepare_input(self, data: Any) -> Any:
        # Not in the model's dtype, as the base class has it under DeepSpeed: probabilities would be rounded.
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

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

    def global_sums(self) -> dict[str, float]:
        """What all ranks have summed up since the last call."""
        mine = torch.tensor(list(self.sums.values()), dtype=torch.float64, device=self.args.device)
        total = dict(zip(self.sums, self.accelerator.reduce(mine, "sum").tolist(), strict=True))
        self.sums = dict.fromkeys(self.sums, 0.0)
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The Trainer's own mean loss is that of the first rank's share; our sums are of all.
        super().log({name: value for name, value in logs.items() if name != "train_loss"}, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_deepspeed_enabled:  # its own checkpoint has the weights
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each rank writes a part
        folder = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            for curve in curve_files(folder.parents[1]):
                shutil.copy(curve, folder)
            _seal(folder, self._layout)


class _Follow(TrainerCallback):
    """Progress, TensorBoard values and the held-out curve."""

    def __init__(self, folder: Path, curve: Curve | None, at: list[int], advance: Callable[[float], None]) -> None:
        self.trainer: FusionTrainer | None = None
        self._folder, self._curve, self._at, self._advance = folder, curve, at, advance
        self._tokens = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
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
        if not all(math.isfinite(value) for value in per_token.values()):  # before a checkpoint keeps it
            raise UserError(f"the loss is not finite at step {state.global_step}: lower training.learning_rate.")
        self.trainer.log({"tokens": self._tokens, **{f"{n}_nats_per_token": v for n, v in per_token.items()}})
        if state.global_step in self._at:
            self._measure(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._curve is None or not distributed.is_main_process():
            return
        file = self._curve.file(self._folder)
        measured = [json.loads(line)["step"] for line in intact_lines(file)]
        if measured != self._at:  # begun under another curve
            file.unlink(missing_ok=True)

    def _measure(self, args: Any, state: Any) -> None:
        if self._curve is None:
            return
        assert self.trainer is not None
        model = self.trainer.model_wrapped
        training = model.training
        model.eval()
        # On all ranks, and through what wraps the model: ZeRO-3 gathers weights there, and with all of them.
        with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            records = model(measure=self._curve.measure)
        model.train(training)
        if not distributed.is_main_process():
            return
        with self._curve.file(self._folder).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, "tokens": self._tokens, "records": records}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _replace_forward(
    model: PreTrainedModel, packing: Packing, loss: Loss | None, teachers: Mapping[str, Teacher], **weighing: Any
) -> None:
    """Puts the objective, weighed as given, inside the model's forward, where data parallel wrappers call it."""

    def forward(self: PreTrainedModel, measure: Callable[..., Any] | None = None, **batch: Tensor) -> Any:
        if measure is not None:
            return measure(self)
        labels = batch["labels"].flatten()
        objective = Objective(
            gold=labels.clamp(min=-1),
            clm_weight=(labels >= 0).float(),
            term=None if loss is None else loss.term(batch, teachers),
            **weighing,
        )
        return tuple(fused_forward(self, batch["input_ids"], batch["position_ids"], objective, packing=packing))

    model.forward = types.MethodType(forward, model)


def _seal(folder: Path, layout: Mapping[str, int | None]) -> None:
    """Marks a folder as complete, its files as they are now, and how its content is divided (see `layout_of`)."""
    files = {str(f.relative_to(folder)): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    sync_all(folder)
    write_json(folder / _COMPLETE, {"files": files, **layout})


def layout_of(config: TrainingConfig) -> dict[str, int | None]:
    """How the files of a checkpoint are divided: the number of ranks, and the stage of ZeRO (None without)."""
    return {"ranks": distributed.world_size(), "zero": zero_stage(config.deepspeed)}


def _check_seal(folder: Path, remedy: str) -> None:
    """Raises UserError, ending in `remedy`, where a file of a complete folder is not as it was."""
    for name, sha256 in read_json(folder / _COMPLETE, remedy)["files"].items():
        if not (folder / name).exists() or file_sha256(folder / name) != sha256:
            raise UserError(f"{folder / name} is damaged: {remedy}.")


def last_checkpoint(folder: Path, layout: Mapping[str, int | None]) -> Path | None:
    """The newest complete checkpoint, the same on all ranks; half-written ones are removed.

    Raises UserError where it has been damaged, and when it was written under another `layout`: by another number of
    ranks, of which each has its part of it, or under another stage of ZeRO.
    """
    step = 0
    if distributed.is_main_process():
        for path in folder.glob("checkpoint-*"):
            if (path / _COMPLETE).exists():
                step = max(step, int(path.name.split("-")[1]))
            else:
                shutil.rmtree(path)
        if step:
            last = folder / f"checkpoint-{step}"
            _check_seal(last, f"remove {last} to go on from the checkpoint before it")
    step = distributed.broadcast(step)
    if not step:
        return None
    checkpoint = folder / f"checkpoint-{step}"
    remedy = f"remove {folder} to begin the training again"
    wrote = read_json(checkpoint / _COMPLETE, remedy)
    if wrote["ranks"] != layout["ranks"]:
        raise UserError(
            f"{checkpoint} is the checkpoint of {wrote['ranks']} ranks and cannot be continued by {layout['ranks']}: "
            f"start as many as before, or {remedy}."
        )
    if wrote["zero"] != layout["zero"]:
        before, now = (f"ZeRO-{stage}" if stage else "no DeepSpeed" for stage in (wrote["zero"], layout["zero"]))
        raise UserError(
            f"{checkpoint} was written under {before} and cannot be continued under {now}: set training.deepspeed as "
            f"before, or {remedy}."
        )
    return checkpoint


def train(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: PackedSequences,
    config: TrainingConfig,
    *,
    lam: float,
    loss: Loss | None = None,
    balance: Balance = "none",
    teachers: Mapping[str, PreTrainedModel] = {},
    seed: int,
    device: str,
    folder: Path,
    label: str,
    card: str,
    curve: Curve | None = None,
) -> None:
    """Trains `model` on `rows` and leaves `folder/model`, which plain `AutoModelForCausalLM.from_pretrained` loads.

    Goes on from the last complete checkpoint in `folder`: bit for bit on a CPU, up to rounding on CUDA, where backward
    passes add in no fixed order. `lam` and `balance` are those of `Objective`, the latter over a micro batch; `loss` is
    the other term, whose features `rows` hold, and `teachers` are the models that it requires, on `device`. Both terms
    are divided by the labels of the global batch. Called by all ranks. Raises UserError when packed passages would see
    each other, the loss diverges, or the ranks do not fit the configuration or the checkpoint.
    """
    final = folder / MODEL_FOLDER
    if distributed.broadcast((final / _COMPLETE).exists()):  # killed before the artifact's rename
        if distributed.is_main_process():
            _check_seal(final, f"remove {final} to train again")
        _finish(folder)
        return
    accumulation = distributed.micro_batches(config.global_batch_size, config.micro_batch_size)
    if config.deepspeed and device == "cpu":
        without_own_ops()
    packing = check_packing(model)
    rows = rows.one_passage_each() if packing == "single" else rows
    split(model)  # says before the training starts when the fused objective cannot serve this model
    steps = steps_of(config, len(rows))
    at = curve.steps(steps) if curve else []
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=accumulation,
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
        ddp_find_unused_parameters=False,
        deepspeed=zero_config(config.deepspeed) if config.deepspeed else None,
    )
    distributed.check_world(arguments.world_size, "accelerate")
    _replace_forward(model, packing, loss, {n: Teacher(t) for n, t in teachers.items()}, lam=lam, balance=balance)
    layout = layout_of(config)
    checkpoint = last_checkpoint(folder / "checkpoints", layout)
    done = 0.0
    if checkpoint is not None:
        history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        done = next((e["tokens"] for e in reversed(history) if "tokens" in e), 0.0)
        notify(f"{label}: going on from {checkpoint.name}")
    with track(f"train {label}", rows.n_tokens * config.epochs, "tokens", done=done) as advance:
        follow = _Follow(folder, curve, at, advance)
        trainer = FusionTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            order=Order(len(rows), seed, config.micro_batch_size * distributed.world_size()),
            layout=layout,
            data_collator=collate,
            callbacks=[follow],
        )
        follow.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        with attending_by_passage(model, packing):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    weights = whole_weights(model, keep=distributed.is_main_process()) if config.deepspeed else None
    del model.forward  # the class's own again
    if distributed.is_main_process():
        model.save_pretrained(final, state_dict=weights)
        tokenizer.save_pretrained(final)
        (final / "README.md").write_text(card, encoding="utf-8")
        write_atomically(folder / LOG_FILE, json.dumps(trainer.state.log_history, indent=1))
        _seal(final, layout)
    if config.deepspeed:
        release(trainer.accelerator)
    _finish(folder)


def _finish(folder: Path) -> None:
    if distributed.is_main_process():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
