"""Two models of one short text, and what fusing them gives: for tests that work numbers out by hand."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusion.alignment.fuse import FusedSequence, Source, fuse_sequence
from fusion.switches import Switches
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary

# The target spells "abcd" in two tokens, the source in one, three or four; id 0 is the prefix of both.
TARGET = Vocabulary.from_tokens(["<s>", "a", "b", "c", "d", "ab", "cd"], space=" ", control={0})
OTHER = Vocabulary.from_tokens(["<s>", "cd", "d", "c", "b", "a", "ab", "x", "y"], space=" ", control={0})
MAP = np.array([0, 6, 4, 3, 2, 1, 5, -1, 3], np.int32)  # x maps to nothing, y to c as well as c itself
TOKEN_BY_TOKEN: Any = {"projection": "token", "inside": "none", "true_token": "top_k"}


def predictions(
    vocabulary: Vocabulary,
    tokens: Sequence[str],
    entries: Sequence[Mapping[str, float]],
    nll: Sequence[float] | float = 1.0,
    byte_ends: Sequence[int] | None = None,
) -> Predictions:
    """Predictions of the text that `tokens` spell; `entries[j]` token -> probability at position j (equally many)."""
    ids = np.array([[vocabulary.tokens.index(t) for t in e] for e in entries], np.int32).reshape(len(entries), -1)
    p = np.array([list(e.values()) for e in entries], np.float64).reshape(ids.shape)
    m = len(tokens) + 1
    loss = np.array([*([nll] * (m - 1) if isinstance(nll, float) else nll), 0.0], np.float32)
    with np.errstate(divide="ignore"):
        return Predictions(
            tokens=np.array([0, *(vocabulary.tokens.index(t) for t in tokens)], np.int32),
            byte_ends=np.cumsum([0, *map(len, tokens)], dtype=np.int32)
            if byte_ends is None
            else np.array(byte_ends, np.int32),
            ids=ids,
            log_p=np.log(p).astype(np.float32),
            tail=(1 - p.sum(axis=1)).astype(np.float32),
            nll=loss,
        )


OWN = predictions(TARGET, ["ab", "cd"], [{"ab": 0.5, "a": 0.25}, {"cd": 0.5, "c": 0.25}, {"a": 0.5, "b": 0.25}])
# Position 2 (after "abc") serves none of the target's; position 0 loses .25 to x, position 1 lands twice on c.
READ = predictions(
    OTHER,
    ["ab", "c", "d"],
    [
        {"ab": 0.5, "x": 0.25, "a": 0.125},
        {"c": 0.25, "cd": 0.25, "y": 0.25},
        {"d": 0.5, "x": 0.25, "y": 0.125},
        {"x": 0.5, "a": 0.25, "b": 0.125},
    ],
)


def fuse(
    *others: tuple[str, Predictions],
    own: Predictions = OWN,
    size: int = 4,
    max_entries: int | None = None,
    **switches: Any,
) -> FusedSequence:
    return fuse_sequence(
        [{"target": own, **dict(others)}],
        [size],
        target="target",
        sources=[Source(name, OTHER, MAP) for name, _ in others],
        target_vocabulary=TARGET,
        switches=Switches(**{**TOKEN_BY_TOKEN, "include_target": False, **switches}),
        max_entries=max_entries,
    )


def at(row: FusedSequence, i: int) -> dict[str, float]:
    """Token -> probability at a position, the tail under "tail" where there is one."""
    entries = zip(row.targets.ids[i].tolist(), row.targets.p[i].tolist(), strict=True)
    found = {TARGET.tokens[t]: round(p, 6) for t, p in entries if t >= 0}
    return found | ({"tail": round(float(row.targets.tail[i]), 6)} if row.targets.tail[i] > 0 else {})
