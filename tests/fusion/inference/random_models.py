"""Random models, ensembles of them, and how a token is chosen: for tests of inference."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from fusion.inference.ensembles import PrefixCachedEnsemble
from fusion.inference.prefix_cache import PrefixCachedModel

_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL |= {"max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 0}
GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 20, "pad_token_id": 0}
GEMMA |= {"layer_types": ["sliding_attention", "full_attention"]}


def model(kind: type[PreTrainedConfig], vocabulary: int, seed: int, **settings: Any) -> Any:
    """A random model with opinions."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(kind(vocab_size=vocabulary, **{**_SMALL, **settings})).eval()
    for parameter in made.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return made


def joint(members: Sequence[Any], weights: Sequence[float], combine: Any = "probabilities") -> PrefixCachedEnsemble:
    return PrefixCachedEnsemble(
        [(PrefixCachedModel(m), w) for m, w in zip(members, weights, strict=True)], combine=combine
    )


def pick(row: Tensor, number: int, step: int, seed: int | None) -> int:
    if seed is None:
        return int(row.argmax())
    p = row.double().softmax(-1).cumsum(-1)
    return int(torch.searchsorted(p, random.Random(f"{seed} {number} {step}").random()))
