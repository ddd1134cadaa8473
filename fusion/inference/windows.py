"""The windows in which a text longer than a model's context is scored. Imports no torch, so that plans are quick."""

from collections.abc import Sequence
from dataclasses import dataclass

from fusion.errors import UserError


@dataclass(frozen=True)
class Window:
    """One forward pass over `[start, end)` of a document's sequence `[prefix] + tokens`.

    The tokens at `(scored_from, end]` of the sequence are scored, each by the position before it. In the mode `strided`
    the prefix is read in place of the window's first token (see `read_tokens`).
    """

    start: int
    scored_from: int
    end: int


def windows(length: int, *, window: int, stride: int) -> list[Window]:
    """The windows in which a document of `length` tokens is scored; every token in exactly one, none for an empty
    document.

    Every window but the first scores at most `stride` new tokens after as much context as fits into `window` tokens:
    the first new token is predicted from `window - stride + 1` tokens or more. At `stride = window` these are lm-eval's
    rolling windows (`get_rolling_token_windows` with `context_len=1`, then `make_disjoint_window`), the last of which
    also has as much context as fits.
    """
    result: list[Window] = []
    scored = 0
    while scored < length:
        end = min(scored + (stride if scored else window), length)
        result.append(Window(max(0, end - window), scored, end))
        scored = end
    return result


def read_tokens(sequence: Sequence[int], window: Window, mode: str) -> list[int]:
    """The tokens that a model reads of a window of `sequence`, the document with its prefix in front.

    Every window of `strided` begins with the prefix, as every text does that the model was trained on. The windows of
    `rolling` begin with whatever token stands there, as lm-eval's do: models that need their bos are badly off.
    """
    tokens = list(sequence[window.start : window.end])
    return [sequence[0], *tokens[1:]] if mode == "strided" else tokens


def window_stride(mode: str, window: int, stride: int | None) -> int:
    """New tokens per window: `window` for `rolling`; for `strided`, `stride` (default and maximum `window // 2`).

    Raises UserError for an unknown mode and for a stride that the mode does not allow.
    """
    if mode == "rolling":
        if window < 1 or stride not in (None, window):
            raise UserError(
                f"rolling perplexity needs a window of at least 1 token and has no stride of its own, but window is "
                f"{window} and stride {stride}: leave the stride out, or choose the mode 'strided'"
            )
        return window
    if mode != "strided":
        raise UserError(f"the perplexity mode '{mode}' is unknown: choose 'rolling' or 'strided'")
    stride = window // 2 if stride is None else stride
    if not 1 <= stride <= window // 2:
        raise UserError(
            f"strided perplexity gives every token half a window of context, so that the stride must lie between 1 and "
            f"half the window of {window} tokens, but it is {stride}"
        )
    return stride
