"""An answer that is being generated: its prompt, its settings, its tokens so far, and how the next one is chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from fusion.inference.decoding import Sampling, draw


@dataclass
class AnswerRow:
    """One answer that is being generated."""

    request: Any
    """What the caller knows the answer by."""
    prompt: list[int]
    until: list[str]
    ends: frozenset[int]
    limit: int
    lookback: int
    """Tokens in which a stop string that has just been completed must lie: each is a byte or more."""
    processors: LogitsProcessorList
    sampling: Sampling | None
    new: list[int] = field(default_factory=list)

    def processed(self, logits: Tensor) -> Tensor:
        """logits[V] as the model's settings of generation change them."""
        read = torch.tensor([[*self.prompt, *self.new]], device=logits.device)
        return self.processors(read, logits[None].float())[0]  # type: ignore[arg-type]  # declared a LongTensor

    def ended(self, tail: str) -> bool:
        """True if the answer is complete; `tail` is the text of its last `lookback` tokens."""
        over = self.new[-1] in self.ends or len(self.new) >= self.limit
        return over or any(stop in tail for stop in self.until)


def next_tokens(rows: Sequence[AnswerRow], logits: Tensor) -> list[int]:
    """The next token of each of n answers by logits[n, V]."""
    if any(row.processors for row in rows):
        logits = torch.stack(
            [row.processed(x) if row.processors else x.float() for row, x in zip(rows, logits, strict=True)]
        )
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [n for n, row in enumerate(rows) if row.sampling is not None]
    if drawn:
        sampled = draw([sampling for row in rows if (sampling := row.sampling)], logits[drawn])
        for n, token in zip(drawn, sampled, strict=True):
            tokens[n] = token
    return tokens
