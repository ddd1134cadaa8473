"""Any causal language model as a backbone and an output projection, so that the loss can be fused with the projection.

What a model does between its hidden states and its logits is not written down anywhere in one form: Gemma caps logits,
Cohere multiplies them, Granite divides them. The known names are read from its configuration, and the result is held
against the model's own logits before it is believed; a model that disagrees is trained on its own logits, with a
warning, at the cost of memory.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fusion.losses.objective import (
    Head,
    MixedLoss,
    Objective,
    float32_logits_of,
    logits_of,
    mixed_loss,
    mixed_loss_from_logits,
)
from fusion.modeling.packing import Packing, device_of, dtype_of, own_forward, packed_inputs, trial_tokens, trying


@dataclass(frozen=True)
class Split:
    """How to get the loss of a model; `fused` says whether logits are avoided, `reason` why they are not.

    `scale` and `softcap` are those of `objective.Head`.
    """

    fused: bool
    reason: str = ""
    scale: float = 1.0
    softcap: float | None = None


_splits: WeakKeyDictionary[nn.Module, Split] = WeakKeyDictionary()


def split(model: nn.Module) -> Split:
    """Finds backbone and head of a Hugging Face causal LM and proves them on a few random tokens; done once a model.

    The proof compares with the model's own logits, twice: on its hidden states as they are, and stretched until the
    logits reach 100, where a cap or a multiplier of an unknown name shows however small the weights are. Agreement
    means 1e-4 of the greatest logit in float32, and the same up to rounding in shorter types. On disagreement warns,
    and the answer is `fused=False`. Partitioned parameters must be reachable: under ZeRO-3 call it inside the engine's
    forward, as `fused_forward` does.
    """
    if model not in _splits:
        found = _find(model)
        if not found.fused:
            warnings.warn(
                f"{type(model).__name__}: {found.reason}, so every position's logits will be held in memory; the loss "
                "is the same",
                stacklevel=2,
            )
        _splits[model] = found
    return _splits[model]


def split_as(model: nn.Module, proven: nn.Module) -> None:
    """Takes over for `model` what `split` finds of a model of the same class and configuration.

    For a model whose weights are in parts, so that it cannot be tried itself (see `fusion.modeling.shallow_copy`).
    """
    _splits[model] = split(proven)


def find_head(model: nn.Module) -> Head | None:
    """The proven output projection of `model`, holding its own parameters; None where `split` found none."""
    found = split(model)
    return _head(_output(model), found) if found.fused else None


def float32_logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The float32 logits[N, V] of hidden[N, D] by a proven head, through its own call as in `fused_forward`.

    They are not rounded to the model's dtype (see `fusion.losses.objective.float32_logits_of`).
    """
    output, found = _output(model), split(model)
    with _instead(output, lambda h: float32_logits_of(h, _head(output, found))):
        logits: Tensor = output(hidden)
    return logits


def fused_forward(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    objective: Objective,
    *,
    packing: Packing = "positions",
    passage_lengths: Sequence[Sequence[int]] | None = None,
) -> MixedLoss:
    """The objective at the B * T positions of input_ids[B, T], packed passages with position_ids[B, T] that restart.

    The objective's arrays are [B * T]; gold is the token that follows each position, nothing is shifted here.
    `packing` is the result of `check_packing`; `passage_lengths` are as in `packed_inputs`. See
    `fusion.losses.objective.mixed_loss` for what is raised. To be called inside the model's replaced forward, so that
    the hooks of whatever wraps the model run: it calls the backbone and the head as modules, never `model` itself.
    """
    found = split(model)
    inputs = packed_inputs(packing, input_ids, position_ids, dtype_of(model), passage_lengths)
    if not found.fused:
        return mixed_loss_from_logits(own_forward(model, **inputs).logits.flatten(0, 1), objective)
    hidden = _backbone(model)(**inputs).last_hidden_state.flatten(0, 1)
    output = _output(model)

    def loss(hidden: Tensor) -> tuple[Tensor, ...]:
        return tuple(mixed_loss(hidden, _head(output, found), objective))

    # Through the head's own call, as the model would: parameters that ZeRO-3 or FSDP has partitioned are gathered by
    # the hooks on it, again before its backward, so that the gradient reaches them whole.
    with _instead(output, loss):
        return MixedLoss(*output(hidden))


def _find(model: nn.Module) -> Split:
    output = _output(model)
    if (
        type(output) is not nn.Linear
    ):  # a subclass or a wrapper (adapter, quantisation) may do more than weight and bias
        return Split(False, f"its output projection is {type(output).__name__}, not a plain Linear")
    if _backbone(model) is model:
        return Split(False, "it has no backbone of its own")
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= _number(config, name) or 1.0
    scale /= _number(config, "logits_scaling") or 1.0
    softcap = _number(config, "final_logit_softcapping") or _number(config, "logits_soft_cap")
    found = Split(True, scale=scale, softcap=softcap)
    disagreement = _disagreement(model, output, found)
    return found if disagreement is None else Split(False, disagreement)


def _disagreement(model: nn.Module, output: nn.Linear, found: Split) -> str | None:
    """How the model's own logits differ from those of backbone and head, or None."""
    with trying(model) as generator:
        tokens = trial_tokens(model, (2, 8), generator).to(device_of(model))
        inputs = {"input_ids": tokens, "use_cache": False}
        hidden = getattr(_backbone(model)(**inputs), "last_hidden_state", None)
        if hidden is None or hidden.ndim != 3:
            return "its backbone gives no last hidden state"
        stretch = 1.0
        for _ in range(2):
            own = _stretched(model, output, inputs, stretch)
            ours = _projected(output, found, hidden * stretch)
            if ours.shape != own.shape:
                return f"its logits are {list(own.shape)}, those of its output projection {list(ours.shape)}"
            tolerance = max(1e-4, 4 * torch.finfo(ours.dtype).eps)
            size = float(own.abs().max())
            if not 0 < size < math.inf:
                return "its logits are zero or not finite"
            apart = float((ours.float() - own.float()).abs().max()) / size
            if not apart <= tolerance:
                return f"its logits are not those of its output projection (apart by {apart:.2g} of the greatest)"
            stretch = 100 / size
    return None


def _stretched(model: nn.Module, output: nn.Linear, inputs: dict[str, Any], stretch: float) -> Tensor:
    """The model's own logits [B, T, V] with the input of its output projection multiplied by `stretch`."""
    hook = output.register_forward_pre_hook(lambda _, args: (args[0] * stretch, *args[1:]))
    try:
        return own_forward(model, **inputs).logits
    finally:
        hook.remove()


def _output(model: nn.Module) -> Any:
    return model.get_output_embeddings()  # type: ignore[operator]


def _backbone(model: nn.Module) -> Any:
    return model.base_model


def _head(output: nn.Linear, found: Split) -> Head:
    return Head(output.weight, output.bias, softcap=found.softcap, scale=found.scale)


def _projected(output: nn.Linear, found: Split, hidden: Tensor) -> Tensor:
    with _instead(output, lambda h: logits_of(h, _head(output, found))):
        return output(hidden)


def _number(config: Any, name: str) -> float | None:
    value = getattr(config, name, None)
    return None if value is None else float(value)


@contextmanager
def _instead(module: nn.Module, forward: Callable[[Tensor], Any]) -> Iterator[None]:
    """Calls of `module` run `forward` in place of its own, between the module's hooks."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:  # the training loop's wrapper had replaced it on the instance
            module.forward = before
