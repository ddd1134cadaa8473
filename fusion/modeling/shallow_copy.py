"""A copy of a model with random weights and its first layers only, for trials where its own weights are in parts.

How passages are kept apart and what stands between hidden states and logits follows from a model's classes and
configuration, not from its weights, and is the same in every layer of a kind.
"""

import copy
from typing import Any

import torch
from torch import nn

_LAYERS = 2


def shallow_copy(model: nn.Module, device: torch.device | str) -> nn.Module:
    """A model of the same class and configuration, in float32 on `device`, with random weights.

    It has two layers, or as many of the first as show every kind of layer that the configuration lists. The random
    state is left as it was.
    """
    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    text.num_hidden_layers = layers = _enough(kinds) if kinds else min(_LAYERS, text.num_hidden_layers)
    if kinds:
        text.layer_types = kinds[:layers]
    device = torch.device(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"), device:
        torch.manual_seed(0)
        copied: nn.Module = type(model)._from_config(  # type: ignore[attr-defined]
            config,
            attn_implementation=config._attn_implementation,
            dtype=torch.float32,
        )
    return copied.eval()


def _enough(kinds: list[str]) -> int:
    """The number of first layers, two at least where there are as many, among which are all kinds."""
    return max(min(_LAYERS, len(kinds)), *(kinds.index(kind) + 1 for kind in set(kinds)))
