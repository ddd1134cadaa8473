"""Passages packed in a row give what they give alone, and a model under which they would not is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fusion.errors import UserError
from fusion.modeling.packing import PACKINGS, attending_by_passage, check_packing, packed_inputs, passage_mask

ARCHITECTURES = ("llama", "qwen2", "gemma3", "gpt_neox")
VOCABULARY = 61
WINDOW = 4  # of Gemma 3's sliding layers: shorter than the passages below, so that it must restart with them


def tiny_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """A random model of four layers whose hidden states depend clearly on what they attend to."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
        "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**{**shape, "num_key_value_heads": 1, **changes}))
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**{**shape, "num_key_value_heads": 1, **changes}))
    if architecture == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**{**shape, **changes}))
    layers = ["sliding_attention", "full_attention"] * 2
    sliding = {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": WINDOW, "layer_types": layers}
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **sliding, **changes}))


def rows(*lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random input_ids[B, T] and position_ids[B, T] of rows of passages."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    return torch.randint(VOCABULARY, positions.shape, generator=torch.Generator().manual_seed(1)), positions


def hidden_states(model: PreTrainedModel, inputs: dict[str, Any], shape: torch.Size) -> Tensor:
    return model.base_model(**inputs).last_hidden_state.reshape(*shape, -1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_in_a_row_are_those_of_the_passages_alone(
    architecture: str, attention: str, training: bool
) -> None:
    """Also of a passage of one token, with right padding as a passage of its own, and with several rows."""
    model = tiny_model(architecture, attn_implementation=attention).train(training)
    lengths = ((7, 1, 9, 3), (12, 8))
    tokens, positions = rows(*lengths)
    tokens[0, -3:] = 0  # padding
    with torch.no_grad():
        packed = hidden_states(model, packed_inputs("positions", tokens, positions, torch.float), tokens.shape)
        joined = hidden_states(model, packed_inputs("flat", tokens, positions, torch.float), tokens.shape)
        for row, passages in enumerate(lengths):
            start = 0
            for n in passages:
                part = slice(start, start + n)
                alone = hidden_states(model, {"input_ids": tokens[row : row + 1, part], "use_cache": False}, (1, n))[0]
                assert torch.allclose(packed[row, part], alone, atol=1e-5, rtol=1e-5)
                assert torch.allclose(joined[row, part], alone, atol=1e-5, rtol=1e-5)
                start += n


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_or_a_mask_of_ones_lets_passages_see_each_other(architecture: str) -> None:
    """Why `packed_inputs` says use_cache=False and gives no attention_mask: the library's own conditions."""
    model = tiny_model(architecture).eval()
    tokens, positions = rows((8, 9))
    with torch.no_grad():
        good = hidden_states(model, packed_inputs("positions", tokens, positions, torch.float), tokens.shape)
        inputs = {"input_ids": tokens, "position_ids": positions}
        for bad in ({"use_cache": True}, {"use_cache": False, "attention_mask": torch.ones_like(tokens)}):
            leaky = hidden_states(model, {**inputs, **bad}, tokens.shape)
            assert torch.allclose(good[:, :8], leaky[:, :8], atol=1e-5)
            assert not torch.allclose(good[:, 8:], leaky[:, 8:], atol=1e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "gemma3"])
def test_explicit_mask_equals_detection(architecture: str, attention: str) -> None:
    model = tiny_model(architecture, attn_implementation=attention).eval()
    tokens, positions = rows((7, 1, 9, 3), (12, 8))
    with torch.no_grad():
        detected, masked = (
            hidden_states(model, packed_inputs(packing, tokens, positions, torch.float), tokens.shape)
            for packing in ("positions", "mask")
        )
    assert torch.allclose(detected, masked, atol=1e-5)


def test_passage_mask() -> None:
    mask = passage_mask(torch.tensor([[0, 1, 0, 0, 1]]), torch.float)
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]])
    assert mask.shape == (1, 1, 5, 5)
    assert torch.equal(mask[0, 0] == 0, expected.bool())
    assert mask.min() == torch.finfo(torch.float).min


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_passes_and_leaves_the_model_as_it_was(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).to(dtype).train()
    model.get_input_embeddings().eval()
    state = torch.get_rng_state()
    assert check_packing(model) == "passages"
    assert model.config._attn_implementation == "sdpa"
    assert model.training and not model.get_input_embeddings().training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_check_sees_through_a_replaced_forward() -> None:
    model = tiny_model("llama")
    model.forward = None  # the training loop's own, which takes other inputs
    assert check_packing(model) == "passages"


def test_an_attention_that_was_asked_for_stays() -> None:
    assert check_packing(tiny_model("llama", attn_implementation="eager")) == "positions"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_by_passage_equals_detection_and_so_do_its_gradients(architecture: str, checkpointing: bool) -> None:
    """Windows shorter than a passage, several rows, a passage of one token, layers that are run again in backward."""
    tokens, positions = rows((7, 1, 9, 3), (12, 8))
    hidden, gradients = {}, {}
    for packing in ("positions", "passages"):
        model = tiny_model(architecture).double().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with attending_by_passage(model, packing):
            inputs = packed_inputs(packing, tokens, positions, torch.float64)
            hidden[packing] = hidden_states(model, inputs, tokens.shape)
            hidden[packing].square().sum().backward()
        gradients[packing] = [p.grad for p in model.base_model.parameters()]
    assert torch.allclose(hidden["positions"], hidden["passages"], rtol=1e-10)
    assert all(torch.allclose(a, b, rtol=1e-8) for a, b in zip(*gradients.values(), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_by_passage_reads_rows_that_are_not_packed(architecture: str) -> None:
    """The held-out curve is measured on the model in training, with padding on the right and no passages named."""
    model = tiny_model(architecture).eval()
    inputs = {"input_ids": rows((20,), (20,))[0], "use_cache": False}
    with torch.no_grad():
        own = hidden_states(model, inputs, inputs["input_ids"].shape)
        with attending_by_passage(model, "passages"):
            assert torch.allclose(own, hidden_states(model, inputs, inputs["input_ids"].shape), atol=1e-5)


class Blind(LlamaForCausalLM):
    """Does not find passages in rows, as a model outside the library might not, unless `helped` by what it is given."""

    helped = ""

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("passage_lengths", None)
        flat = len(input_ids) == 1 and self.helped == "flat"
        if not flat and (attention_mask is None or self.helped != "mask"):
            attention_mask = torch.ones_like(input_ids)
        return super().forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize("helped", ["flat", "mask"])
def test_check_finds_the_way_that_works_and_says_so(helped: str) -> None:
    model = Blind(tiny_model("llama").config)
    model.helped = helped
    with pytest.warns(UserWarning, match=f"packing is done with '{helped}'"):
        assert check_packing(model) == helped


def test_check_refuses_what_leaks_whatever_it_is_given() -> None:
    model = Blind(tiny_model("llama").config)
    with pytest.raises(UserError, match="see each other") as error:
        check_packing(model)
    assert all(f"{packing}: a packed passage" in str(error.value) for packing in PACKINGS)
    assert "attn_implementation" in str(error.value)


def test_check_offers_no_single_mask_to_sliding_windows() -> None:
    class BlindGemma(Gemma3ForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            kwargs.pop("passage_lengths", None)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = torch.ones_like(input_ids)
            return super().forward(input_ids=input_ids, **kwargs)

    with pytest.raises(UserError, match="sliding-window"):
        check_packing(BlindGemma(tiny_model("gemma3").config))


def test_check_refuses_a_model_without_positions() -> None:
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(UserError, match="BloomForCausalLM"):
        check_packing(model)
