"""Passages packed in a row give what they give alone, and a model under which they would not is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen3NextConfig,
)

from fusion.errors import UserError
from fusion.losses.objective import Objective
from fusion.modeling.heads import fused_forward
from fusion.modeling.packing import (
    PACKINGS,
    attending_by_passage,
    check_packing,
    packed_inputs,
    passage_mask,
    trial_tokens,
)
from fusion.modeling.teacher import Teacher

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

    def forward(self, input_ids: Tensor, position_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("passage_lengths", None)
        flat = len(input_ids) == 1 and self.helped == "flat"
        if not flat and (attention_mask is None or self.helped != "mask"):
            attention_mask = torch.ones_like(input_ids)
        return super().forward(input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, **kwargs)


class Bidirectional(LlamaForCausalLM):
    """Sees what follows, too, so that even padding changes it."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        n = input_ids.shape[1]
        return super().forward(input_ids=input_ids, attention_mask=torch.zeros(len(input_ids), 1, n, n))


@pytest.mark.parametrize("helped", ["flat", "mask", "single"])
def test_check_finds_the_way_that_works_and_says_so(helped: str) -> None:
    model = Blind(tiny_model("llama").config)
    model.helped = helped
    with pytest.warns(UserWarning, match=f"packing is done with '{helped}'"):
        assert check_packing(model) == helped


def test_check_refuses_what_leaks_whatever_it_is_given() -> None:
    model = Bidirectional(tiny_model("llama").config)
    with pytest.raises(UserError, match="see each other") as error:
        check_packing(model)
    assert all(f"{packing}: " in str(error.value) for packing in PACKINGS)
    assert "attn_implementation" in str(error.value)


def test_check_offers_no_single_mask_to_sliding_windows() -> None:
    class BlindGemma(Gemma3ForCausalLM):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            kwargs.pop("passage_lengths", None)
            if kwargs.get("attention_mask") is None:
                kwargs["attention_mask"] = torch.ones_like(input_ids)
            return super().forward(input_ids=input_ids, **kwargs)

    with pytest.warns(UserWarning, match="layers of sliding_attention, for which one mask does not serve"):
        assert check_packing(BlindGemma(tiny_model("gemma3").config)) == "single"


_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2}
_EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
_EXPERTS |= {"shared_expert_intermediate_size": 16, "output_router_logits": False}
_HYBRID = {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
UNPACKED: dict[str, PreTrainedConfig] = {
    "bloom": BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2),
    "falcon_alibi": FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        alibi=True,
        initializer_range=0.2,
    ),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, initializer_range=0.2),
    "lfm2": Lfm2Config(**_SMALL, layer_types=["conv", "full_attention"]),
    "qwen3_next": Qwen3NextConfig(**_SMALL, **_EXPERTS, **_HYBRID, layer_types=["linear_attention", "full_attention"]),
    "gpt_oss": GptOssConfig(**_SMALL, **_EXPERTS, sliding_window=WINDOW),
}


@pytest.fixture(params=UNPACKED)
def unpacked(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A model under which nothing keeps packed passages apart."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(UNPACKED[request.param])


def test_what_cannot_be_packed_reads_one_passage_a_sequence(unpacked: PreTrainedModel) -> None:
    """Recurrent and convolutional layers, biases by distance alone: the objective on right-padded sequences."""
    with pytest.warns(UserWarning, match="packing is done with 'single': one passage a sequence, padded on the right"):
        assert check_packing(unpacked) == "single"
    tokens = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -1)], 1)
    labels[0, 5:] = -1  # padding
    objective = Objective(gold=labels.flatten(), clm_weight=(labels >= 0).flatten().float(), lam=1.0, term=None)
    found = fused_forward(unpacked.eval(), tokens, torch.arange(9).expand(2, 9), objective, packing="single")
    expected = torch.zeros(())
    for row, n in ((0, 6), (1, 9)):
        logits = unpacked(tokens[row : row + 1, :n], use_cache=False).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, tokens[row, 1:n], reduction="sum")
    torch.testing.assert_close(found.total, expected, rtol=1e-4, atol=1e-4)


def test_a_teacher_that_cannot_be_packed_reads_packed_passages_apart(unpacked: PreTrainedModel) -> None:
    with pytest.warns(UserWarning, match="one passage a sequence"):
        teacher = Teacher(unpacked)
    tokens, positions = rows((7, 1, 9, 3), (12, 8))
    logits = teacher.logits(teacher.hidden(tokens, positions)).reshape(*tokens.shape, -1)
    with torch.no_grad():
        alone = unpacked(tokens[1:, 12:], use_cache=False).logits[0]
    torch.testing.assert_close(logits[1, 12:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [PhimoeConfig, Qwen2MoeConfig])
@pytest.mark.parametrize("window", [8, 4096])
def test_a_window_that_a_model_keeps_in_its_mask_is_found(config: type[PreTrainedConfig], window: int) -> None:
    """An attention of our own would see through no window there: the short one shows, the long one is not stated."""
    torch.manual_seed(0)
    kinds = {"layer_types": ["sliding_attention"] * 2} if config is Qwen2MoeConfig else {}
    given = {**_SMALL, **_EXPERTS, **kinds, "sliding_window": window, "use_sliding_window": True}
    model = AutoModelForCausalLM.from_config(config(**given, max_window_layers=0)).eval()
    packing = check_packing(model)
    assert packing != "passages"
    tokens, positions = rows((20, 4))
    with torch.no_grad(), attending_by_passage(model, packing):
        packed = model(**packed_inputs(packing, tokens, positions, torch.float)).logits[0]
        alone = model(tokens[:, :20], use_cache=False).logits[0]
    torch.testing.assert_close(packed[:20], alone, rtol=1e-4, atol=1e-4)


def test_trials_read_text_alone() -> None:
    """No id that the configuration names: a placeholder of an image is no token to such a model."""
    model = tiny_model("llama", vocab_size=8, bos_token_id=0, eos_token_id=[1, 2], pad_token_id=3)
    model.config.image_token_index = 4
    drawn = trial_tokens(model, (50,), torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == {5, 6, 7}
