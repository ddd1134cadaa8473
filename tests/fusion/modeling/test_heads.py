"""The loss through backbone and head equals the loss on the model's own logits, for every known form of head."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fusion.losses.objective import CHUNK, Objective, logits_of, mixed_loss_from_logits
from fusion.losses.sparse_cross_entropy import SparseCrossEntropy
from fusion.modeling.heads import find_head, float32_logits, fused_forward, split
from fusion.modeling.packing import own_forward, packed_inputs
from tests.fusion.modeling.test_packing import ARCHITECTURES, VOCABULARY, rows, tiny_model

FORMS = (*ARCHITECTURES, "capped", "cohere", "granite", "tied")


def form(name: str) -> PreTrainedModel:
    if name in ARCHITECTURES:
        return tiny_model(name)
    if name == "capped":
        return tiny_model("gemma3", final_logit_softcapping=5.0)
    if name == "tied":
        return tiny_model("llama", tie_word_embeddings=True)
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if name == "cohere":
        return CohereForCausalLM(CohereConfig(**shape, logit_scale=0.25))
    return GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=3.0))


def objective(
    tokens: Tensor, positions: Tensor, k: int = 4, *, lam: float, fused: bool = True, chunk: int = CHUNK
) -> Objective:
    """CLM at every position with a next token, and a cross-entropy from random distributions unless `fused` is off."""
    g = torch.Generator().manual_seed(2)
    batch, width = tokens.shape
    after = positions.roll(-1, 1)
    has_next = (after == positions + 1) & (torch.arange(width) < width - 1)
    p = torch.rand(batch, width, k + 1, generator=g)
    p = p / p.sum(-1, keepdim=True)
    ids = torch.rand(batch, width, VOCABULARY, generator=g).topk(k).indices
    gold, weight = torch.where(has_next, tokens.roll(-1, 1), -1).flatten(), has_next.float().flatten()
    p = p.flatten(0, 1)
    term = SparseCrossEntropy(ids.flatten(0, 1), p[:, :-1], p[:, -1], weight)
    return Objective(gold, weight, lam, term if fused else None, chunk)


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("name", FORMS)
def test_equals_the_models_own_logits(name: str) -> None:
    model = form(name)
    tokens, positions = rows((7, 9), (12, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split(model).fused
    ours = fused_forward(model, tokens, positions, objective(tokens, positions, lam=0.6, chunk=5))
    ours.total.backward()
    mine = gradients(model)
    logits = own_forward(model, **packed_inputs("positions", tokens, positions, torch.float)).logits
    reference = mixed_loss_from_logits(logits.flatten(0, 1), objective(tokens, positions, lam=0.6))
    reference.total.backward()
    assert [float(x.detach()) for x in ours] == pytest.approx([float(x.detach()) for x in reference], rel=1e-5)
    theirs = gradients(model)
    assert mine.keys() == theirs.keys() == {n for n, _ in model.named_parameters()}
    for parameter, gradient in theirs.items():
        assert float((mine[parameter] - gradient).norm()) <= 1e-4 * float(gradient.norm()) + 1e-6, parameter


@pytest.mark.parametrize(
    ("name", "scale", "softcap"), [("capped", 1.0, 5.0), ("cohere", 0.25, None), ("granite", 1 / 3, None)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_find_head(name: str, scale: float, softcap: float | None, dtype: torch.dtype) -> None:
    model = form(name).to(dtype)
    head = find_head(model)
    assert head is not None
    assert (head.scale, head.softcap) == (pytest.approx(scale), softcap)
    assert head.weight is model.lm_head.weight
    tokens, _ = rows((6,))
    hidden = model.base_model(input_ids=tokens).last_hidden_state
    own = model(input_ids=tokens).logits
    assert torch.allclose(logits_of(hidden, head), own, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


class Odd(LlamaForCausalLM):
    """Does something to its logits under a name nobody knows, too little to show on small ones."""

    def forward(self, **kwargs: Any) -> Any:
        out = super().forward(**kwargs)
        out.logits = 30 * torch.tanh(out.logits / 30)
        return out


class Biased(nn.Linear):
    """A projection that is more than its weight and bias."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + hidden.sum(-1, keepdim=True)


def wrapped_head() -> PreTrainedModel:
    model = tiny_model("llama")
    old, model.lm_head = model.lm_head, Biased(32, VOCABULARY, bias=False)
    model.lm_head.weight = old.weight
    return model


def odd() -> PreTrainedModel:
    return Odd(tiny_model("llama", initializer_range=0.002).config)


def zero() -> PreTrainedModel:
    """What a training that diverged may leave."""
    model = tiny_model("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.mark.parametrize(
    ("make", "reason"), [(odd, "apart by"), (zero, "zero or not finite"), (wrapped_head, "Biased, not a plain Linear")]
)
def test_an_unknown_head_is_trained_on_its_own_logits_and_said_loudly(make: Any, reason: str) -> None:
    model = make()
    tokens, positions = rows((7, 9), (12, 4))
    with pytest.warns(UserWarning, match=reason):
        found = split(model)
    assert not found.fused and reason in found.reason
    assert find_head(model) is None
    ours = fused_forward(model, tokens, positions, objective(tokens, positions, lam=0.6))
    logits = own_forward(model, **packed_inputs("positions", tokens, positions, torch.float)).logits
    reference = mixed_loss_from_logits(logits.flatten(0, 1), objective(tokens, positions, lam=0.6))
    assert [float(x.detach()) for x in ours] == [float(x.detach()) for x in reference]
    ours.total.backward()
    assert model.lm_head.weight.grad is not None


def test_inside_the_replaced_forward_with_the_heads_hooks() -> None:
    """What wraps a model (DDP, ZeRO, FSDP) sees the model, its backbone and its head called, forward and backward."""
    model = form("tied")
    tokens, positions = rows((7, 9), (12, 4))
    called: list[str] = []
    model.lm_head.register_forward_pre_hook(lambda *_: called.append("before"))
    model.lm_head.register_forward_hook(lambda *_: called.append("after"))
    model.lm_head.register_full_backward_hook(lambda *_: called.append("backward"))
    split(model)
    called.clear()
    model.forward = lambda **batch: tuple(fused_forward(model, **batch))
    total, *_ = model(input_ids=tokens, position_ids=positions, objective=objective(tokens, positions, lam=0.9))
    total.backward()
    assert called == ["before", "after", "backward"]
    assert "forward" not in vars(model.lm_head)
    assert model.lm_head.weight.grad is not None


def test_clm_alone_and_packings() -> None:
    model = form("llama")
    tokens, positions = rows((7, 9), (12, 4))
    clm = objective(tokens, positions, lam=1.0, fused=False)
    loss = [
        float(fused_forward(model, tokens, positions, clm, packing=packing).total.detach())
        for packing in ("positions", "flat", "mask")
    ]
    assert loss == pytest.approx([loss[0]] * 3, rel=1e-5)


def test_proof_is_made_once_and_leaves_no_trace() -> None:
    model = form("llama").train()
    state = torch.get_rng_state()
    assert split(model) is split(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert not model.lm_head._forward_pre_hooks


@pytest.mark.parametrize("name", FORMS)
def test_float32_logits_are_not_rounded_to_the_models_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is stored and scored: float32 of the hidden states of a bfloat16 model, whatever the form of its head."""
    monkeypatch.setattr("fusion.losses.objective.CAST", 32 * 7)  # in parts of seven tokens
    model = form(name).to(torch.bfloat16)
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        found = float32_logits(model, hidden)
        assert found.dtype == torch.float32
        wide = model.float()
        torch.testing.assert_close(float32_logits(wide, hidden.float()), found)
        own = wide.get_output_embeddings()(hidden.float())  # type: ignore[operator]
    if name not in ("capped", "cohere", "granite"):
        torch.testing.assert_close(found, own)
