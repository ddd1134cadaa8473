"""The context of a model: the longest text that it reads at once, from its configuration. Imports no torch."""

from typing import Any

# `max_seq_len` is MPT's; transformers knows GPT-2's `n_positions` by the first name, code beside a model may not.
_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def context_length(config: Any) -> int | None:
    """The longest text in tokens that a model with this transformers configuration reads.

    Of a composite configuration (text and images) it is the text model's. None for a model that names no limit:
    recurrent ones, and those with attention biases for any distance (BLOOM).
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    values = (getattr(text, name, None) for name in _NAMES)
    return next((int(value) for value in values if isinstance(value, int) and value > 0), None)
