"""Decoding and scoring by models whose attention the prefix cache cannot compute (ALiBi, capped scores, other states).

Batches are padded, and the model's own cache and attention are used, whatever they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fusion.inference.decoding import Choose
from fusion.modeling.packing import device_of, dtype_of


def decode_padded(
    model: Any, prompts: Sequence[Sequence[int]], choose: Choose, *, rows: int, limit: int, pad: int
) -> None:
    """Continues every prompt until `choose` ends it (as `decode` does), by at most `limit` tokens.

    At most `rows` prompts, of similar lengths, are padded with `pad` and decoded together until all of them have ended.
    A sequence's logits do not depend on the others, except for rounding.
    """
    order = sorted(range(len(prompts)), key=lambda n: (-len(prompts[n]), n))
    before = model.generation_config
    # The choice is the caller's alone.
    model.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=None, bos_token_id=None)
    try:
        for start in range(0, len(order), rows):
            numbers = order[start : start + rows]
            length = len(prompts[numbers[0]])
            tokens = torch.tensor([[pad] * (length - len(prompts[n])) + list(prompts[n]) for n in numbers])
            mask = torch.tensor([[0] * (length - len(prompts[n])) + [1] * len(prompts[n]) for n in numbers])
            batch = _Batch(numbers, choose)
            with torch.inference_mode():
                model.generate(
                    tokens.to(device_of(model)),
                    attention_mask=mask.to(device_of(model)),
                    max_new_tokens=limit,
                    do_sample=False,
                    use_cache=True,
                    logits_processor=LogitsProcessorList([_Forced(batch)]),
                    stopping_criteria=StoppingCriteriaList([_Ended(batch)]),
                )
    finally:
        model.generation_config = before


def padded_row_bytes(model: Any, length: int) -> int:
    """What one sequence of `length` tokens of a padded batch needs at most, in bytes.

    That is keys and values of all layers, the scores of one layer that are computed whole, and all logits.
    """
    config = model.config.get_text_config()
    size = dtype_of(model).itemsize
    cache = 2 * int(config.num_hidden_layers) * int(config.hidden_size) * size
    scores = int(config.num_attention_heads) * length * (8 + size)
    return length * (cache + scores + int(config.vocab_size) * (8 + size))


class _Batch:
    """The rows of a batch that are still decoded."""

    def __init__(self, numbers: Sequence[int], choose: Choose) -> None:
        self.numbers = numbers
        self.choose = choose
        self.under_way = list(range(len(numbers)))


class _Forced(LogitsProcessor):
    """Leaves `generate` the token that was chosen for each row."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        batch = self._batch
        chosen = batch.choose([batch.numbers[row] for row in batch.under_way], scores[batch.under_way])
        tokens = [0] * len(scores)  # of a row that has ended any will do
        for row, token in zip(batch.under_way, chosen, strict=True):
            tokens[row] = token or 0
        batch.under_way = [row for row, token in zip(batch.under_way, chosen, strict=True) if token is not None]
        at = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter(1, at, 0.0)


class _Ended(StoppingCriteria):
    """Says which rows have ended."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        ended = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ended[self._batch.under_way] = False
        return ended
