"""A teacher in memory: it predicts packed sequences with the target and is not trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusion.modeling.heads import find_head, float32_logits
from fusion.modeling.packing import attending_by_passage, check_packing, device_of, dtype_of, own_forward, packed_inputs


class Teacher:
    """A causal language model without gradients, in its own precision (`fusion.losses.loss.TeacherModel`)."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._packing = check_packing(model)
        self._dense = find_head(model) is None  # its head is unknown, so that its own forward gives the logits

    @torch.no_grad()
    def hidden(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Hidden states [B * L, D] of packed sequences [B, L], from which `logits` computes logits."""
        if self._packing == "single":  # each packed passage by itself
            passages = input_ids.flatten().tensor_split(position_ids.flatten().eq(0).nonzero()[1:, 0].cpu())
            return torch.cat([self._hidden({"input_ids": one[None], "use_cache": False}) for one in passages])
        return self._hidden(packed_inputs(self._packing, input_ids, position_ids, dtype_of(self.model)))

    def _hidden(self, inputs: dict[str, Any]) -> Tensor:
        backbone: Any = self.model.base_model
        # In its own precision, as when its predictions are extracted, whatever the target is trained in.
        with attending_by_passage(self.model, self._packing), torch.autocast(device_of(self.model).type, enabled=False):
            if self._dense:
                hidden: Tensor = own_forward(self.model, **inputs).logits
            else:
                hidden = backbone(**inputs).last_hidden_state
        return hidden.flatten(0, 1)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [C, V] of hidden[C, D], in float32 where the form of the head is known."""
        return hidden if self._dense else float32_logits(self.model, hidden)
