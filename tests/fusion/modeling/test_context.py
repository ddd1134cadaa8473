"""How long a text a model reads is found whatever its configuration calls it."""

from typing import Any

import pytest
from transformers import (
    BloomConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PreTrainedConfig,
)

from fusion.modeling.context import context_length


class OwnConfig(PreTrainedConfig):
    """A configuration that comes as code with its model, so that transformers maps no name of it."""

    def __init__(self, n_positions: int = 32, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n_positions = n_positions


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=48), 48),
        (GPT2Config(n_positions=24), 24),
        (OwnConfig(), 32),
        (MptConfig(max_seq_len=16), 16),
        (Gemma3Config(text_config=Gemma3TextConfig(max_position_embeddings=96)), 96),
        (BloomConfig(), None),
        (MambaConfig(), None),
    ],
    ids=["llama", "gpt2", "own code", "mpt", "gemma3 composite", "bloom", "mamba"],
)
def test_context_is_found_under_every_name(config: Any, expected: int | None) -> None:
    assert context_length(config) == expected
