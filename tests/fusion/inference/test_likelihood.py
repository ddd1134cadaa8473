"""Perplexity of whole documents against lm-eval's own code, and the promises of the strided mode."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusion.errors import UserError
from fusion.inference.likelihood import document_nats
from fusion.inference.windows import window_stride, windows

WINDOW = 16
BOS, EOS = 256, 257
LENGTHS = (0, 1, 2, 15, 16, 17, 23, 31, 32, 33, 47, 48, 49, 100)


def build_llama(**changes: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**sizes, "vocab_size": 258, "max_position_embeddings": 64, "initializer_range": 0.5, **changes}
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    return build_llama()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """One text of each length; a letter is a token."""
    generator = np.random.default_rng(0)
    return ["".join(map(chr, generator.integers(32, 127, length))) for length in LENGTHS]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and like many a family's it puts a bos before the text unless told otherwise."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def lm_eval_nats(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: list[str], window: int, **options: object
) -> list[float]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, max_length=window, batch_size=3, **options)
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    return [-float(value) for value in lm.loglikelihood_rolling(requests, disable_tqdm=True)]


@pytest.mark.parametrize("window", [1, 5, WINDOW])
def test_rolling_is_lm_evals_number(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, texts: list[str], window: int
) -> None:
    theirs = lm_eval_nats(llama, byte_tokenizer, texts, window, add_bos_token=False)
    ours = document_nats(
        llama, encode(byte_tokenizer, texts), prefix=BOS, window=window, mode="rolling", batch_tokens=64
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


def test_prefix_is_eos_where_there_is_no_bos(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    ids = encode(byte_tokenizer, texts)
    without = copy.deepcopy(byte_tokenizer)
    without.bos_token = None
    theirs = lm_eval_nats(llama, without, texts, WINDOW, add_bos_token=False)
    ours = document_nats(llama, ids, prefix=EOS, window=WINDOW, mode="rolling", batch_tokens=64)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


def test_where_lm_eval_differs_by_default(
    llama: LlamaForCausalLM, byte_tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    """A tokenizer that adds a bos of its own makes lm-eval read two of them and score the second."""
    theirs = lm_eval_nats(llama, byte_tokenizer, texts, WINDOW)
    twice = [[BOS, *ids] for ids in encode(byte_tokenizer, texts)]
    ours = document_nats(llama, twice, prefix=BOS, window=WINDOW, mode="rolling", batch_tokens=64)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


@pytest.mark.parametrize("mode", ["rolling", "strided"])
def test_equals_one_forward_pass_a_token(llama: LlamaForCausalLM, mode: str) -> None:
    """A short window against the definition: each token from the context that its window gives it."""
    tokens = torch.randint(0, 256, (41,), generator=torch.Generator().manual_seed(3)).tolist()
    sequence = [BOS, *tokens]
    expected = 0.0
    stride = window_stride(mode, WINDOW, None)
    for part in windows(len(tokens), window=WINDOW, stride=stride):
        for position in range(part.scored_from, part.end):
            first = BOS if mode == "strided" else sequence[part.start]
            context = torch.tensor([[first, *sequence[part.start + 1 : position + 1]]])
            log_p = llama(context).logits[0, -1].double().log_softmax(-1)
            expected -= log_p[sequence[position + 1]].item()
    nats = document_nats(llama, [tokens], prefix=BOS, window=WINDOW, mode=mode, batch_tokens=32)  # type: ignore[arg-type]
    assert nats.dtype == np.float64
    np.testing.assert_allclose(nats, [expected], rtol=1e-6)


@given(length=st.integers(0, 400), window=st.integers(2, 64), data=st.data())
def test_strided_scores_every_token_once_with_half_a_window_before_it(
    length: int, window: int, data: st.DataObject
) -> None:
    stride = data.draw(st.one_of(st.none(), st.integers(1, window // 2)))
    parts = windows(length, window=window, stride=window_stride("strided", window, stride))
    scored = [token for part in parts for token in range(part.scored_from, part.end)]
    assert scored == list(range(length))
    for number, part in enumerate(parts):
        assert 0 <= part.start <= part.scored_from < part.end
        assert part.end - part.start <= window
        if number:
            assert part.end - part.start == window
            # The position that predicts the first new token is itself read: context counts it.
            assert part.scored_from - part.start + 1 >= window / 2


@given(length=st.integers(0, 300), window=st.integers(1, 40))
def test_rolling_windows_are_lm_evals(length: int, window: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = list(range(length))
    sequence = [-1, *tokens]
    theirs = [
        ((context + scored)[:-1], scored)
        for context, scored in map(make_disjoint_window, get_rolling_token_windows(tokens, -1, window, 1))
    ]
    parts = windows(length, window=window, stride=window_stride("rolling", window, None))
    ours = [(sequence[part.start : part.end], sequence[part.scored_from + 1 : part.end + 1]) for part in parts]
    assert ours == theirs


@pytest.fixture(scope="module")
def scored_alone(llama: LlamaForCausalLM) -> tuple[list[list[int]], np.ndarray]:
    generator = np.random.default_rng(1)
    ids = [generator.integers(0, 256, length).tolist() for length in (0, 1, 5, 16, 17, 33, 40)]
    return ids, document_nats(llama, ids, prefix=BOS, window=WINDOW, mode="strided", batch_tokens=1)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(7)), batch_tokens=st.integers(1, 200))
def test_order_and_batches_do_not_matter(
    llama: LlamaForCausalLM, scored_alone: tuple[list[list[int]], np.ndarray], order: list[int], batch_tokens: int
) -> None:
    ids, alone = scored_alone
    shuffled = [ids[i] for i in order]
    together = document_nats(llama, shuffled, prefix=BOS, window=WINDOW, mode="strided", batch_tokens=batch_tokens)
    np.testing.assert_allclose(together, alone[order], rtol=1e-5)


def test_a_head_that_is_not_understood_gives_the_same_numbers(
    scored_alone: tuple[list[list[int]], np.ndarray],
) -> None:
    class OwnLinear(torch.nn.Linear):
        pass

    model = build_llama()
    head = OwnLinear(32, 258, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    ids, alone = scored_alone
    with pytest.warns(UserWarning, match="OwnLinear"):
        dense = document_nats(model, ids, prefix=BOS, window=WINDOW, mode="strided", batch_tokens=64)
    np.testing.assert_allclose(dense, alone, rtol=1e-5)


def test_softmax_is_float32_in_a_bfloat16_model() -> None:
    """The nats are those of the bfloat16 model's logits, with no further rounding; and a capped head is heeded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, vocab_size=258, final_logit_softcapping=2.0, sliding_window=8
    )
    model = Gemma2ForCausalLM(config).to(torch.bfloat16).eval()
    tokens = list(range(60, 60 + WINDOW))
    logits = model(torch.tensor([[BOS, *tokens[:-1]]])).logits[0].double()
    expected = -logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).sum()
    nats = document_nats(model, [tokens], prefix=BOS, window=WINDOW, mode="rolling", batch_tokens=64)
    np.testing.assert_allclose(nats, [float(expected)], rtol=1e-3)
    # A sum of float32 numbers is no multiple of a bfloat16 step.
    assert float(torch.tensor(nats[0]).bfloat16()) != nats[0]


def test_progress_counts_scored_tokens_and_training_mode_comes_back(llama: LlamaForCausalLM) -> None:
    seen: list[float] = []
    ids = [[1] * length for length in LENGTHS]
    llama.train()
    document_nats(llama, ids, prefix=BOS, window=WINDOW, mode="strided", batch_tokens=64, progress=seen.append)
    assert llama.training
    llama.eval()
    assert sum(seen) == sum(LENGTHS)


def test_dropout_does_not_touch_the_numbers() -> None:
    model = build_llama(attention_dropout=0.5).train()
    first, second = (
        document_nats(model, [[1, 2, 3]], prefix=BOS, window=WINDOW, mode="rolling", batch_tokens=64) for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_the_document(value: float) -> None:
    model = build_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = value
    with pytest.raises(UserError, match="document 2 are not finite"):
        document_nats(model, [[1, 2], [3], [5, 200, 7], []], prefix=BOS, window=WINDOW, mode="rolling", batch_tokens=64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "rolling", "stride": 8}, "has no stride of its own"),
        ({"mode": "strided", "stride": 9}, "between 1 and half the window of 16 tokens, but it is 9"),
        ({"mode": "strided", "window": 1}, "half the window of 1 tokens"),
        ({"mode": "slow"}, "mode 'slow' is unknown"),
        ({"window": 65}, "exceeds the 64 positions"),
        ({"prefix": 258}, "prefix token 258"),
        ({"texts_ids": [[1], [258]]}, "document 1 has a token outside"),
    ],
)
def test_mistakes(llama: LlamaForCausalLM, options: dict[str, object], message: str) -> None:
    usual = {"texts_ids": [[1]], "prefix": BOS, "window": WINDOW, "mode": "rolling", "batch_tokens": 64}
    with pytest.raises(UserError, match=message):
        document_nats(llama, **{**usual, **options})  # type: ignore[arg-type]


def test_every_strided_window_begins_with_the_prefix(llama: LlamaForCausalLM) -> None:
    """As every text that the model was trained on; only lm-eval's own number reads a document's middle without."""
    read: list[list[int]] = []
    hook = llama.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.extend(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    tokens = list(range(50))
    beginnings = {}
    for mode in ("rolling", "strided"):
        read.clear()
        document_nats(llama, [tokens], prefix=BOS, window=WINDOW, mode=mode, batch_tokens=1)  # type: ignore[arg-type]
        beginnings[mode] = [row[0] for row in read]
    hook.remove()
    assert beginnings["strided"] == [BOS] * 6  # 16 tokens, then 8 more a window
    assert beginnings["rolling"] == [BOS, 15, 31, 33]
