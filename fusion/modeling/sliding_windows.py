"""The sliding windows of a model's attention layers: what its configuration states, and what its layers ask for."""

from collections.abc import Mapping
from typing import Any

LONGEST_TRIAL = 1024
"""Tokens: a window that reaches further is looked at where a model is tried, not tried."""


def wrong_windows(config: Any, found: Mapping[int, int | None]) -> str | None:
    """How the windows that the layers hand to their attention function differ from the configuration's; else None.

    found: the window by the number of the layer, None for full attention. A model that keeps its window in the mask
    that it makes does not hand it on, and would see through no window under an attention function of another's.
    """
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * len(found)
    if strange := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        return f"it has layers of {', '.join(strange)}"
    window = getattr(text, "sliding_window", None)
    if {i: window if kind == "sliding_attention" else None for i, kind in enumerate(kinds)} != found:
        return "its attention layers do not say what window they see through"
    return None


def longest_window(config: Any, limit: int) -> int:
    """The longest window of at most `limit` tokens that the configuration states under any name; 0 for none."""
    values = config.get_text_config().to_dict()
    windows = [v for name, v in values.items() if "window" in name and type(v) is int and 0 < v <= limit]
    return max(windows, default=0)
