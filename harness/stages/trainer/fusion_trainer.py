"""The Hugging Face Trainer with the objective inside the model's forward and one denominator for the global batch."""

import math
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedModel, Trainer

from fusion.losses.loss import Loss
from fusion.losses.objective import Objective
from fusion.losses.term import LossTerm
from fusion.modeling.heads import fused_forward
from fusion.modeling.packing import Packing
from fusion.modeling.teacher import Teacher
from harness.data.sequences import collate
from harness.stages.trainer.sealing import seal
from harness.stages.training_log import curve_files

_SEED_DISTANCE = 1_000_003  # more than the epochs of any training


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

    def __init__(
        self, *args: Any, order: Order, layout: Mapping[str, int | str], beat: Callable[[str], None], **kwargs: Any
    ) -> None:
        """`layout` is that of its checkpoints (see `layout_of`), `beat` is told what it does now (see `Heartbeat`)."""
        super().__init__(*args, **kwargs)
        self.order = order
        self._layout = layout
        self.beat = beat
        self.model_accepts_loss_kwargs = True  # have the tokens of the accumulated batch counted
        self._loss_shifts_labels = False  # labels stand at the position that predicts them
        self.sums = self._no_sums()
        self.grad_norm: float | None = None
        """Norm of the last step's gradient before it was clipped, of all ranks; None where it is not known."""

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
        self.beat(f"the forward pass of {self._step}")
        total, clm, fusion = model(**inputs)
        self.sums += torch.stack([clm.double(), fusion.double(), inputs["labels"].ne(-100).sum().double()])
        self.beat(f"the backward pass of {self._step}")
        # Ranks' gradients are averaged afterwards, so each gives its share of the global sum times their number.
        return total * self.accelerator.num_processes / num_items_in_batch

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP2 has it in parts
        self.grad_norm = None if whole is None else float(whole)
        return norm

    @property
    def has_finite_gradient(self) -> bool:
        """False where the last step's gradient, or its norm, was not finite, so that the step was void or harmful.

        Clipping by an infinite norm makes a gradient zero; DeepSpeed leaves such steps out, and for some of them still
        has the norm of the step before, or -1. The same on all ranks.
        """
        norm_is_finite = self.grad_norm is None or 0 <= self.grad_norm < math.inf
        return norm_is_finite and not self.accelerator.optimizer_step_was_skipped

    def has_finite_loss(self) -> bool:
        """Whether the loss of the first row is finite with the model as it is; called by all ranks."""
        model = self.model_wrapped
        model.eval()
        with torch.no_grad():
            total, *_ = model(**self._prepare_inputs(collate([self.train_dataset[0]])))  # type: ignore[index]
        model.train()
        return bool(torch.isfinite(total))

    def global_sums(self) -> dict[str, float]:
        """What all ranks have summed up since the last call."""
        total = self.accelerator.reduce(self.sums, "sum").tolist()
        self.sums = self._no_sums()
        return dict(zip(("clm", "fusion", "tokens"), total, strict=True))

    def _no_sums(self) -> Tensor:
        """Sums of CLM, of the other loss and of tokens; on the device, which none of them has to be waited for."""
        return torch.zeros(3, dtype=torch.float64, device=self.args.device)

    @property
    def _step(self) -> str:
        return f"step {self.state.global_step + 1}"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # The Trainer's own mean loss is that of the first rank's share; our sums are of all.
        super().log({name: value for name, value in logs.items() if name != "train_loss"}, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_deepspeed_enabled:  # its own checkpoint has the weights
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.beat("the writing of a checkpoint")
        try:
            super()._save_checkpoint(model, trial)
        except CheckpointException as error:  # of FSDP2, and no Exception: what failed on a rank is inside
            raise next(iter(error.failures.values()))[0] from None
        folder = Path(self.args.output_dir or "") / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            for curve in curve_files(folder.parents[1]):
                shutil.copy(curve, folder)
        seal(folder, self._layout)
        self.beat(self._step)


def replace_forward(
    model: PreTrainedModel,
    packing: Packing,
    loss: Loss | None,
    teachers: Mapping[str, Teacher],
    constants: Mapping[str, Tensor],
    **weighing: Any,
) -> None:
    """Puts the objective, weighed as given, inside the model's forward, where data parallel wrappers call it.

    `constants` are the loss's, on the model's device.
    """

    def forward(self: PreTrainedModel, measure: Callable[..., Any] | None = None, **batch: Any) -> Any:
        if measure is not None:
            return measure(self)
        passage_lengths = batch.pop("passage_lengths")  # lists, where a loss is given tensors
        labels = batch["labels"].flatten()
        term = None if loss is None else loss.term(batch, teachers)
        if isinstance(term, LossTerm):
            term = replace(term, constants=constants)
        objective = Objective(
            gold=labels.clamp(min=-1),
            clm_weight=(labels >= 0).float(),
            term=term,
            **weighing,
        )
        return tuple(
            fused_forward(
                self,
                batch["input_ids"],
                batch["position_ids"],
                objective,
                packing=packing,
                passage_lengths=passage_lengths,
            )
        )

    model.forward = types.MethodType(forward, model)
