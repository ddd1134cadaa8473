"""One trainer for every trained method, on the Hugging Face Trainer.

What is ours: the objective inside the model's forward (so that data-parallel wrappers see it), one denominator over
the whole global batch, the same rows in every step for any number of ranks, whole checkpoints, the held-out curve, the
best checkpoint.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from fusion.losses.loss import Balance, Loss
from fusion.modeling.heads import split_as
from fusion.modeling.packing import attending_by_passage, check_packing
from fusion.modeling.shallow_copy import shallow_copy
from fusion.modeling.teacher import Teacher
from harness.config.schema import TrainingConfig
from harness.data.sequences import PackedSequences, collate
from harness.runtime import distributed
from harness.runtime.device import compute_dtype
from harness.runtime.progress import notify, track
from harness.stages.trainer import fsdp
from harness.stages.trainer.fusion_trainer import FusionTrainer, Order, replace_forward
from harness.stages.trainer.held_out import BestCheckpoint, Curve, Diverged, Follow, selected
from harness.stages.trainer.resources import loader_workers, recomputes
from harness.stages.trainer.sealing import check_seal, is_sealed, last_checkpoint, layout_of, seal
from harness.stages.trainer.sharding import release, whole_weights, without_own_ops, zero_config
from harness.stages.training_log import LOG_FILE
from harness.store.files import write_atomically
from harness.store.paths import MODEL_FOLDER

_MARGIN = 60
"""Seconds that a collective operation waits longer than `Heartbeat`, which says who hangs."""


def steps_of(config: TrainingConfig, rows: int) -> int:
    """Optimiser steps of a whole training on so many rows."""
    return max(1, math.ceil(math.ceil(rows / config.global_batch_size) * config.epochs))


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
    constants: Mapping[str, np.ndarray] = {},
    seed: int,
    device: str,
    folder: Path,
    label: str,
    card: str,
    beat: Callable[[str], None],
    curve: Curve | None = None,
    validation: Curve | None = None,
) -> dict[str, Any]:
    """Trains `model` on `rows` and leaves `folder/model`, which plain `AutoModelForCausalLM.from_pretrained` loads.

    Goes on from the last complete checkpoint in `folder`: bit for bit on a CPU, up to rounding on CUDA, where
    backward passes add in no fixed order. `lam` and `balance` are those of `Objective`, the latter over a micro
    batch; `loss` is the other term, whose features `rows` hold; `teachers` are the models that it requires, on
    `device`, and `constants` its arrays that are the same at all positions. Both terms are divided by the labels of
    the global batch. `beat` is called with what is done now, by all ranks equally often (see
    `harness.runtime.heartbeat`). `curve` is measured along the way. With `validation` the model is the checkpoint,
    of those that this text is measured with, that it likes best, else the last one; returns which it is (see
    `selected`), on the main process, or nothing. Called by all ranks. Raises UserError when packed passages would
    see each other, the loss diverges, or the ranks do not fit the configuration or the checkpoint.
    """
    final = folder / MODEL_FOLDER
    if distributed.broadcast(is_sealed(final)):  # killed before the artifact's rename
        if distributed.is_main_process():
            check_seal(final, f"remove {final} to train again")
        return _finish(folder, validation)
    if config.deepspeed and device == "cpu":
        without_own_ops()
    # The proof of packing and head. What FSDP2 divides is whole on no rank but the first, nor on its device.
    proven = shallow_copy(model, device) if config.fsdp2 else model
    packing = check_packing(proven)
    rows = rows.one_passage_each() if packing == "single" else rows
    split_as(model, proven)  # says before the training starts when the fused objective cannot serve this model
    del proven
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    recompute = recomputes(config, model.config, model.num_parameters(), device)
    arguments = _arguments(config, folder / "checkpoints", seed=seed, device=device, recompute=recompute)
    distributed.check_world(arguments.world_size, "accelerate")
    replace_forward(
        model,
        packing,
        loss,
        {name: Teacher(teacher) for name, teacher in teachers.items()},
        {name: torch.from_numpy(array).to(device) for name, array in constants.items()},
        lam=lam,
        balance=balance,
    )
    layout = layout_of(config)
    checkpoint = last_checkpoint(folder / "checkpoints", layout)
    done = 0.0
    if checkpoint is not None:
        history = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        done = next((e["tokens"] for e in reversed(history) if "tokens" in e), 0.0)
        notify(f"{label}: going on from {checkpoint.name}")

    def write(place: Path, **about: Any) -> None:
        weights = None
        if config.deepspeed:
            weights = whole_weights(model, keep=distributed.is_main_process())
        elif config.fsdp2:
            weights = fsdp.whole_weights(model)
        if distributed.is_main_process():
            model.save_pretrained(place, state_dict=weights)
            tokenizer.save_pretrained(place)
            (place / "README.md").write_text(card, encoding="utf-8")
        del weights
        seal(place, {**layout, **about})

    best = None if validation is None else BestCheckpoint(folder, validation, write)
    with track(f"train {label}", rows.n_tokens * config.epochs, "tokens", done=done) as advance:
        curves = [one for one in (curve, validation) if one is not None]
        follow = Follow(folder, curves, steps_of(config, len(rows)), best, advance)
        trainer = FusionTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            order=Order(len(rows), seed, config.micro_batch_size * distributed.world_size()),
            layout=layout,
            beat=beat,
            data_collator=collate,
            callbacks=[follow],
        )
        follow.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        try:
            with attending_by_passage(model, packing):
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except Diverged:
            _release(trainer, config)
            raise
    beat("the writing of the trained model")
    del model.forward  # the class's own again
    if distributed.is_main_process():
        write_atomically(folder / LOG_FILE, json.dumps(trainer.state.log_history, indent=1))
    if best is None:
        write(final)
    elif distributed.is_main_process():
        best.finish(final)
    _release(trainer, config)
    return _finish(folder, validation)


def _release(trainer: FusionTrainer, config: TrainingConfig) -> None:
    """Lets go of what shards the model, so that the next training has its memory and begins anew."""
    if config.deepspeed:
        release(trainer.accelerator)
    if config.fsdp2:
        fsdp.release()


def _arguments(config: TrainingConfig, folder: Path, *, seed: int, device: str, recompute: bool) -> TrainingArguments:
    """The settings in the words of the Hugging Face Trainer, which leaves its checkpoints in `folder`."""
    workers = loader_workers(config, device)
    sharded: dict[str, Any] = {}
    if config.fsdp2:
        sharded = fsdp.fsdp_arguments(recompute=recompute)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.micro_batch_size,
        gradient_accumulation_steps=distributed.micro_batches(config.global_batch_size, config.micro_batch_size),
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
        activation_checkpointing=recompute and not config.fsdp2,
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
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        ddp_find_unused_parameters=False,
        ddp_timeout=round(60 * config.timeout_minutes) + _MARGIN,
        deepspeed=zero_config(config.deepspeed) if config.deepspeed else None,
        **sharded,
    )
    if config.fsdp2:
        fsdp.keep_precision(arguments)
    return arguments


def _finish(folder: Path, validation: Curve | None) -> dict[str, Any]:
    """Removes the checkpoints of the finished training; which of them it is, on the main process."""
    if not distributed.is_main_process():
        return {}
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {} if validation is None else selected(folder / MODEL_FOLDER, validation)
