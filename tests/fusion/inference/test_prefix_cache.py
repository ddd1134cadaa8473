"""What is read in parts, with what is common kept once, is what the model says of each whole text."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from fusion.inference import prefix_cache
from fusion.inference.decoding import MIN_SHARED_TOKENS, decode, group_by_prefix, pack_consecutive
from fusion.inference.prefix_cache import DecodingBatch, PrefixCachedModel, UnsupportedModel
from fusion.inference.prefix_tree import Branching

_SMALL = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
_SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0}
_KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 2}),
    "neox": (GPTNeoXConfig, {}),
    # Windows shorter than the texts, so that what has left a window matters.
    "gemma3": (
        Gemma3TextConfig,
        {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 5, "layer_types": _KINDS, "pad_token_id": 0},
    ),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 7}),
}


def make(config: type[PreTrainedConfig], **settings: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{**_SMALL, **settings})).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)  # else every token says nearly the same
    return model


def whole(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def text(length: int, seed: int) -> list[int]:
    return torch.randint(60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    config, settings = FAMILIES[request.param]
    return make(config, **settings)


def test_branches_are_read_as_if_alone(model: Any) -> None:
    reader = PrefixCachedModel(model)
    cached, trunk, branches = text(9, 1), text(6, 2), [text(7, 3), text(1, 4), []]
    other = text(11, 5)
    with reader.patched_attention():
        _, (kept,) = reader.prefill([Branching(cached)])
        branchings = [Branching(trunk, kept, branches), Branching(other), Branching(other[:4], kept)]
        found = reader.read(branchings, [range(len(branching.tokens)) for branching in branchings]).clone()
    expected = [whole(model, [*cached, *trunk])[9:]]
    expected += [whole(model, [*cached, *trunk, *branch])[15:] for branch in branches]
    expected += [whole(model, other), whole(model, [*cached, *other[:4]])[9:]]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_rows_come_and_go(model: Any) -> None:
    """Two stems, rows of different lengths, one that leaves and one that comes: every step is the whole text's."""
    reader = PrefixCachedModel(model)
    cached_prefixes, texts = [text(12, 1), []], [[text(30, 2), text(20, 3), text(25, 4)], [text(26, 5)]]
    own = [
        [whole(model, [*cached, *t])[len(cached) :] for t in some]
        for cached, some in zip(cached_prefixes, texts, strict=True)
    ]
    with reader.patched_attention():
        groups = [DecodingBatch(reader.prefill([Branching(cached_prefixes[0])])[1][0], 3), DecodingBatch(None, 1)]
        under_way = [[(0, 4), (1, 3)], [(0, 6)]]  # number of the text, tokens read
        for group, cached, some, members in zip(groups, cached_prefixes, texts, under_way, strict=True):
            for number, n in members:
                group.add(reader.prefill([Branching(some[number][:n], group.cached)])[1][0])
            assert group.start == len(cached)
        for step in range(12):
            if step == 5:
                groups[0].drop(0)
                under_way[0] = under_way[0][1:]
                groups[0].add(reader.prefill([Branching(texts[0][2][:2], groups[0].cached)])[1][0])
                under_way[0].append((2, 2))
            tokens = [some[i][n] for some, members in zip(texts, under_way, strict=True) for i, n in members]
            found = reader.step(groups, tokens).clone()
            expected = [logits[i][n] for logits, members in zip(own, under_way, strict=True) for i, n in members]
            torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-4)
            under_way = [[(i, n + 1) for i, n in members] for members in under_way]


def greedy(model: Any, prompt: list[int], length: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + length and (len(tokens) == len(prompt) or tokens[-1] % 7):
        tokens.append(int(whole(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(("rows", "batch_tokens"), [(1, 1), (3, 40), (50, 1000)])
def test_decoding_many_is_decoding_each(model: Any, rows: int, batch_tokens: int) -> None:
    common = text(MIN_SHARED_TOKENS + 4, 1)
    prompts = [[*common, *text(n, n)] for n in (3, 9, 1)] + [text(5, 50), text(8, 51)] + [[*common, 7]] * 2
    found: list[list[int]] = [[] for _ in prompts]

    def choose(numbers: Any, logits: torch.Tensor) -> list[int | None]:
        chosen: list[int | None] = []
        for number, token in zip(numbers, logits.argmax(-1).tolist(), strict=True):
            found[number].append(token)
            chosen.append(token if token % 7 and len(found[number]) < 12 else None)
        return chosen

    decode(PrefixCachedModel(model), prompts, choose, rows=rows, batch_tokens=batch_tokens)
    assert found == [greedy(model, prompt, 12) for prompt in prompts]


def test_attention_is_the_models_own_afterwards(model: Any) -> None:
    before, tokens = model.config._attn_implementation, text(9, 1)
    expected = whole(model, tokens)
    with PrefixCachedModel(model).patched_attention():
        pass
    assert model.config._attn_implementation == before
    assert torch.equal(whole(model, tokens), expected)


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        (Gemma2Config, {"num_key_value_heads": 1, "head_dim": 8}, "softcap"),
        (BloomConfig, {"n_layer": 2, "n_head": 4}, "not all of its layers"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "longest sequence",
        ),
    ],
)
def test_what_cannot_be_read_in_parts_says_why(
    config: type[PreTrainedConfig], settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        PrefixCachedModel(make(config, **settings))


def test_great_scores_are_not_rounded() -> None:
    """As in Qwen2.5: its keys have a great bias, which all scores share; bfloat16 would round them to whole units."""
    model = make(LlamaConfig, attention_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    for layer in model.model.layers:
        # In each head of four the second number is one that hardly rotates.
        layer.self_attn.k_proj.bias.data[1::4] = 200
        layer.self_attn.q_proj.bias.data[1::4] = 2
    model = model.to(torch.bfloat16)
    tokens = text(12, 1)
    reader = PrefixCachedModel(model)
    with reader.patched_attention():
        _, (kept,) = reader.prefill([Branching(tokens[:8])])
        rows = DecodingBatch(None, 4)
        rows.add(kept)
        steps = torch.cat([reader.step([rows], [token]) for token in tokens[8:]])
    expected = whole(model, tokens)[8:]
    torch.testing.assert_close(steps, expected, rtol=0, atol=float(expected.abs().max()) / 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["positions", "last keys", "other branch", "window"])
def test_the_trial_finds_faults_that_rounding_might_hide(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "window":
        model = make(FAMILIES["gemma3"][0], **FAMILIES["gemma3"][1] | {"sliding_window": 20})
    else:
        model = make(LlamaConfig)
    model = model.to(dtype)
    assert PrefixCachedModel(model).positions  # without the fault there is nothing to find
    read, attend = PrefixCachedModel._read, prefix_cache._PrefillAttention.attend

    def faulty_read(self: Any, attention: Any, branchings: Any, wanted: Any) -> torch.Tensor:
        for branching in branchings:
            if branching.cached is not None and fault == "positions":
                object.__setattr__(branching, "positions", [p + 1 for p in branching.positions])
            if branching.cached is not None and fault == "last keys":
                for keys in branching.cached.keys:
                    keys[:, -6:] = 0
            if fault == "other branch":
                object.__setattr__(branching, "branch", [min(b, 1) for b in branching.branch])
        return read(self, attention, branchings, wanted)

    def without_window(self: Any, *given: Any) -> torch.Tensor:
        return attend(self, *given[:-1], None)

    monkeypatch.setattr(PrefixCachedModel, "_read", faulty_read)
    if fault == "window":
        monkeypatch.setattr(prefix_cache._PrefillAttention, "attend", without_window)
    with pytest.raises(UnsupportedModel, match="not its own when read in parts"):
        PrefixCachedModel(model)


def test_a_window_that_attention_does_not_name_is_refused() -> None:
    model = make(LlamaConfig)
    model.config.sliding_window = 4  # as of a model that keeps its window in the mask alone
    with pytest.raises(UnsupportedModel, match="window"):
        PrefixCachedModel(model)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=12))
def test_families_share_what_they_say(sequences: list[list[int]]) -> None:
    found = group_by_prefix(sequences)
    assert sorted(member for _, members in found for member in members) == list(range(len(sequences)))
    for common, members in found:
        assert common == 0 or (common >= MIN_SHARED_TOKENS and len(members) > 1)
        assert len({tuple(sequences[m][:common]) for m in members}) == 1
        assert all(common < len(sequences[m]) for m in members)


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 12))
def test_packs_are_within_their_limit(sizes: list[int], limit: int) -> None:
    found = pack_consecutive(sizes, limit)
    assert [index for pack in found for index in pack] == list(range(len(sizes)))
    assert all(len(pack) == 1 or sum(sizes[i] for i in pack) <= limit for pack in found)
