"""Causal attention within the passages of a packed row, for models whose attention transformers dispatches."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_SHORT = 640  # positions; below, on a CPU, whole products in bfloat16 beat the blocks of its flash attention


def attend_by_passage(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    passage_lengths: list[list[int]] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention [B, T, H, D] of query[B, H, T, D], key and value[B, Hkv, T, D] within each passage.

    Without `passage_lengths` every row of the batch is one passage. transformers passes no mask to an attention
    function that it does not know, so causality and the sliding window are applied here.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        raise ValueError("attention by passage serves whole rows without a mask or a cache")
    rows = []
    for row, parts in enumerate(zip(*(x.split(1) for x in (query, key, value)), strict=True)):
        lengths = [query.shape[2]] if passage_lengths is None else passage_lengths[row]
        passages = []
        for q, k, v in zip(*(part.split(lengths, dim=2) for part in parts), strict=True):
            n, mask = q.shape[2], None
            if sliding_window is not None and n > sliding_window:
                mask = torch.ones(n, n, dtype=torch.bool, device=q.device).tril().triu(1 - sliding_window)[None, None]
            if mask is None and _is_plain(v, n, options):
                scale = options.get("scaling") or q.shape[-1] ** -0.5
                # Rotated positions may have widened the two; sdpa under autocast would narrow them, too.
                passages.append(_Short.apply(q.to(v.dtype), k.to(v.dtype), v, scale).transpose(1, 2))
            else:
                passages.append(sdpa_attention_forward(module, q, k, v, mask, **options)[0])
        rows.append(torch.cat(passages, dim=1))
    return torch.cat(rows), None


def _is_plain(value: Tensor, n: int, options: dict[str, Any]) -> bool:
    """True if `_Short` computes what these options ask for, and faster."""
    extra = ("dropout", "softcap", "position_bias", "s_aux")
    short = value.device.type == "cpu" and value.dtype == torch.bfloat16 and n <= _SHORT
    return short and not any(_given(options.get(name)) for name in extra)


def _given(option: Any) -> bool:
    return option is not None and not (isinstance(option, float | int) and option == 0)


class _Short(torch.autograd.Function):
    """Causal attention of one short passage whose probabilities are kept, so that the backward pass does not recompute
    them.

    As in flash attention the scores are float32 whatever the dtype of query and key, and rounded afterwards.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """out[1, H, n, D] of query[1, H, n, D], key and value[1, Hkv, n, D]."""
        heads, n = key.shape[1], query.shape[2]
        # Query heads that share keys are stacked as more queries: nothing is repeated.
        q, k, v = query.reshape(heads, -1, query.shape[3]), key[0], value[0]
        with torch.autocast("cpu", enabled=False):  # it would have the scores rounded
            scores = torch.bmm(q.float() * scale, k.float().transpose(1, 2))
            future = torch.ones(n, n, dtype=torch.bool).triu(1)
            scores.view(heads, -1, n, n).masked_fill_(future, float("-inf"))
            p = scores.softmax(-1).to(v.dtype)
            out = torch.bmm(p, v)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return out.view(1, -1, n, v.shape[2])

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        d_out = upstream[0].reshape(len(v), -1, v.shape[2])
        d_value = torch.bmm(p.transpose(1, 2), d_out)
        d_p, exact = torch.bmm(d_out, v.transpose(1, 2)).float(), p.float()
        mean = (d_p * exact).sum(-1, keepdim=True)
        d_scores = d_p.sub_(mean).mul_(exact).mul_(ctx.scale).to(q.dtype)
        d_query = torch.bmm(d_scores, k).view(1, -1, k.shape[1], k.shape[2])
        d_key = torch.bmm(d_scores.transpose(1, 2), q)
        return d_query, d_key[None], d_value[None], None
