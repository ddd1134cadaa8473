"""What is extracted equals what the model's own logits say."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fusion.errors import UserError
from fusion.inference import top_k
from fusion.inference.top_k import BytePrefixes, batches_by_length, predict_top_k, reader
from fusion.vocabulary.token_bytes import Vocabulary

CPU = torch.device("cpu")


def _llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def _gemma() -> PreTrainedModel:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=5.0,
    )
    return Gemma3ForCausalLM(config).eval()


@pytest.mark.parametrize("chunk", [3, 256])
def test_the_mass_of_all_tokens_that_begin_with_the_first_bytes_of_the_next_one(chunk: int) -> None:
    spellings = [b"", b"a", b"ab", b"abc", b"b", b"\xff", b"\xff\xff", b"\xffa", b"ba", b"bab"]
    tokens = [*(s.decode("latin-1") or "<s>" for s in spellings), *(f"x{i}" for i in range(40))]
    vocabulary = Vocabulary.from_tokens(tokens, space=" ", control=[0])
    vocabulary = replace(vocabulary, token_bytes=(None, *spellings[1:], *(t.encode() for t in tokens[10:])))
    sequences = [[0, 3, 6, 1, 9, 7], [0], [0, 2, 0, 12]]
    model = _llama()
    read = predict_top_k(*reader(model), sequences, k=7, device=CPU, prefixes=BytePrefixes(vocabulary), chunk=chunk)
    for sequence, got in zip(sequences, read, strict=True):
        with torch.no_grad():
            p = model(torch.tensor([sequence])).logits[0].double().softmax(-1).numpy()
        expected = [
            sum(p[j, u] for u, spelling in enumerate(vocabulary.token_bytes) if (spelling or b"").startswith(begin))
            for j, token in enumerate(sequence[1:])
            for begin in [(vocabulary.token_bytes[token] or b"")[:n] for n in range(1, len(tokens[token].encode()))]
            if begin and len(begin) < len(vocabulary.token_bytes[token] or b"")
        ]
        assert got.prefix_nll is not None
        np.testing.assert_allclose(np.exp(-got.prefix_nll), expected, rtol=1e-5)


@pytest.mark.parametrize("make", [_llama, _gemma])
@pytest.mark.parametrize("chunk", [3, 256])
def test_equals_the_models_own_distribution(make: Callable[[], PreTrainedModel], chunk: int) -> None:
    model = make()
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(50, (n,), generator=generator).tolist() for n in (9, 2, 6)]
    backbone, project = reader(model)
    read = predict_top_k(backbone, project, sequences, k=7, device=CPU, chunk=chunk)
    for sequence, got in zip(sequences, read, strict=True):
        with torch.no_grad():
            log_q = model(torch.tensor([sequence])).logits[0].double().log_softmax(-1)
        top = log_q.topk(7, -1)
        np.testing.assert_allclose(got.log_p, top.values.numpy(), atol=1e-5)
        np.testing.assert_array_equal(got.ids, top.indices.numpy())
        np.testing.assert_allclose(got.tail, 1 - top.values.exp().sum(-1).numpy(), atol=1e-6)
        following = torch.tensor(sequence[1:])
        np.testing.assert_allclose(got.nll[:-1], -log_q[:-1].gather(-1, following[:, None])[:, 0].numpy(), atol=1e-5)
        assert got.nll[-1] == 0


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_sequence_once_and_fit(lengths: list[int], limit: int) -> None:
    batches = batches_by_length(lengths, limit)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit


def test_too_large_a_k_is_refused() -> None:
    with pytest.raises(UserError, match="k = 51 exceeds the source's vocabulary of 50"):
        predict_top_k(*reader(_llama()), [[1, 2]], k=51, device=CPU)


def test_nothing_is_said_of_a_sequence_with_logits_that_are_not_finite() -> None:
    model = _llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    sound, spoilt = predict_top_k(*reader(model), [[1, 2, 3], [1, 7, 3, 4]], k=5, device=CPU)
    assert spoilt.ids.shape == (0, 5) and not len(spoilt.nll)
    (alone,) = predict_top_k(*reader(model), [[1, 2, 3]], k=5, device=CPU)
    np.testing.assert_allclose(sound.log_p, alone.log_p, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_summed_up_at_once_changes_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, project = reader(_llama().to(dtype))
    sequences = [[1, 2, 3, 4, 5], [6, 7, 8]]
    (whole, apart) = ([], [])
    for found, cached in ((whole, 10**9), (apart, 1)):
        monkeypatch.setattr(top_k, "_CACHED", cached)
        found += predict_top_k(backbone, project, sequences, k=5, device=CPU)
    for one, other in zip(whole, apart, strict=True):
        for field in ("ids", "log_p", "tail", "nll"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
