"""lm-eval's HFLM with common prefixes read once gives HFLM's answers, and answers that depend on nothing else."""

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fusion.errors import UserError
from fusion.inference.prefix_cache import UnsupportedModel
from fusion.inference.prefix_tree import common_prefix_length
from harness.evaluation import shared_prefix_lm
from harness.evaluation.shared_prefix_lm import SharedPrefixLM
from tests.harness.tiny_models import save_model, sentences
from tests.tokenizer_zoo import ZOO

_KINDS = ["sliding_attention", "full_attention"]
_GEMMA = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 20, "layer_types": _KINDS, "pad_token_id": 0}
_SHOTS = "".join(sentences(4, 1))
CONTEXTS = [_SHOTS + line.strip() for line in sentences(4, 2)] + [_SHOTS] * 2 + sentences(3, 5) + [""]
ENDINGS = [" fox", " the quick dogs", " ale and ale and the lazy"]


@pytest.fixture(
    scope="module",
    params=[
        (LlamaConfig, 1, 6, {"num_key_value_heads": 1}),
        (GPTNeoXConfig, 1, 6, {}),
        (Gemma3TextConfig, 2, 3, _GEMMA),
    ],
    ids=["llama", "neox", "gemma3"],
)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and its tokenizer."""
    config, seed, spread, settings = request.param
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder, config, 300, seed, spread, max_position_embeddings=512, **settings)


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def parts(saved: Path) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    return load(saved, torch.float32)


@pytest.fixture(scope="module")
def short_parts(saved: Path) -> tuple[Any, Any]:
    """The model in bfloat16 and its tokenizer."""
    return load(saved, torch.bfloat16)


def ours(parts: tuple[Any, Any], **options: Any) -> SharedPrefixLM:
    return SharedPrefixLM(*parts, label="m", **options)


def theirs(parts: tuple[Any, Any], batch_size: int) -> HFLM:
    return HFLM(parts[0], tokenizer=parts[1], backend="causal", batch_size=batch_size)


def asked(contexts: Sequence[str], **kwargs: Any) -> list[Instance]:
    return [Instance("generate_until", {}, (context, kwargs), 0) for context in contexts]


def test_likelihoods_are_hflms(parts: tuple[Any, Any]) -> None:
    requests = [Instance("loglikelihood", {}, (c, e), i) for c in CONTEXTS for i, e in enumerate(ENDINGS)]
    random.Random(0).shuffle(requests)
    expected = theirs(parts, 3).loglikelihood(requests, disable_tqdm=True)
    for batch_tokens in (1, 200, 4000):
        found = ours(parts, batch_tokens=batch_tokens).loglikelihood(requests, disable_tqdm=True)
        assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], abs=1e-4)
        assert [f[1] for f in found] == [e[1] for e in expected]


def test_ties_of_bfloat16_are_broken_as_hflm_breaks_them(short_parts: tuple[Any, Any]) -> None:
    """Of several tokens with the greatest log-probability the first is greedy, and no other."""
    model, tokens = short_parts
    requests, tied = [], 0
    for text in CONTEXTS[4:-1]:
        ids = tokens.encode(text)
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for n in range(max(1, len(ids) - 12), len(ids)):
            top = log_p[n - 1].topk(3)
            tied += bool(top.values[0] == top.values[1])
            requests += [(None, ids[:n], [token]) for token in top.indices.tolist()]
    assert tied > 2
    expected = theirs(short_parts, 1)._loglikelihood_tokens(requests, disable_tqdm=True)
    for batch_tokens in (1, 2048):
        found = ours(short_parts, batch_tokens=batch_tokens)._loglikelihood_tokens(requests)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_likelihoods_in_bfloat16_are_hflms_before_it_rounds(short_parts: tuple[Any, Any]) -> None:
    requests = [Instance("loglikelihood", {}, (c, e), i) for c in CONTEXTS for i, e in enumerate(ENDINGS)]
    expected = theirs(short_parts, 1).loglikelihood(requests, disable_tqdm=True)
    found = ours(short_parts).loglikelihood(requests, disable_tqdm=True)
    assert [f[1] for f in found] == [e[1] for e in expected]
    # HFLM rounds every token's log-probability, and then their sum.
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=2 * torch.finfo(torch.bfloat16).eps)


def test_answers_in_bfloat16_leave_hflms_only_where_two_tokens_are_as_good(short_parts: tuple[Any, Any]) -> None:
    model, tokens = short_parts
    requests = asked(CONTEXTS[:-1], until=["\0"], max_gen_toks=24, do_sample=False, temperature=0.0)
    both = theirs(short_parts, 1), ours(short_parts)
    for lm in both:  # a character a token, whatever the tokens spell
        lm.tok_decode = lambda ids, *_, **__: "".join(chr(0x4E00 + i) for i in ([ids] if isinstance(ids, int) else ids))
    expected, found = (lm.generate_until(requests, disable_tqdm=True) for lm in both)
    same = 0
    for request, one, other in zip(requests, found, expected, strict=True):
        n = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)
        if n is None:
            same += 1
            continue
        with torch.no_grad():
            ids = [*tokens.encode(request.args[0]), *(ord(c) - 0x4E00 for c in one[:n])]
            logits = model(torch.tensor([ids])).logits[0, -1].float()
        chosen = logits[[ord(one[n]) - 0x4E00, ord(other[n]) - 0x4E00]]
        assert float(logits.max() - chosen.min()) <= 4 * torch.finfo(torch.bfloat16).eps * float(logits.abs().max())
    assert same >= len(requests) // 2


def test_greedy_continuations_are_greedy(parts: tuple[Any, Any]) -> None:
    model, tokens = parts
    prompt = tokens.encode(_SHOTS)
    following = model.generate(torch.tensor([prompt]), max_new_tokens=3, do_sample=False)[0, len(prompt) :].tolist()
    found = ours(parts)._loglikelihood_tokens([(None, prompt, following), (None, prompt, [following[0], 5])])
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_likelihoods_are_hflms(parts: tuple[Any, Any]) -> None:
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("".join(sentences(60, 3)), "a fox")]
    expected = theirs(parts, 1).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours(parts).loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_answers_are_hflms(parts: tuple[Any, Any], penalty: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what a checkpoint's generation_config.json asks for, too."""
    monkeypatch.setattr(parts[0].generation_config, "repetition_penalty", penalty)
    settings = {"max_gen_toks": 30, "do_sample": False, "temperature": 0.0}
    (endless,) = theirs(parts, 1).generate_until(asked(CONTEXTS[:1], until=["\0"], **settings), disable_tqdm=True)
    (stop,) = re.findall(r"[ -~]{3}", endless[8:])[:1]
    requests = asked(CONTEXTS[:-1], until=[stop, "\n"], **settings)
    expected = theirs(parts, 1).generate_until(requests, disable_tqdm=True)
    assert len(set(expected)) > 3 and expected[0] == endless[: endless.index(stop)]
    for batch_size in (1, 4):
        assert ours(parts, batch_size=batch_size).generate_until(requests) == expected


def test_a_sample_depends_on_itself_alone(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HFLM, "generate_until")  # no answer is left to it
    settings = {"until": ["fox"], "max_gen_toks": 10, "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
    requests = [Instance("generate_until", {}, (c, settings), n) for c in CONTEXTS[3:7] for n in range(3)]
    expected = ours(parts).generate_until(requests)
    assert len(set(expected)) > 8
    order = random.Random(0).sample(range(len(requests)), 7)
    assert ours(parts, batch_size=2).generate_until([requests[i] for i in order]) == [expected[i] for i in order]
    assert ours(parts, seed=1).generate_until(requests) != expected
    # A request that lm-eval repeats is answered anew each time.
    assert len(set(ours(parts).generate_until([requests[0]] * 4))) > 1


def test_sampling_is_transformers_distribution() -> None:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from fusion.inference.decoding import Sampling, draw

    logits = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 2
    for temperature, top_k, top_p in [(1.0, 0, 0.9), (0.5, 5, 0.8), (2.0, 0, 1.0), (3.0, 100, 0.99)]:
        warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            warpers.append(TopPLogitsWarper(top_p))
        expected = warpers(None, logits[None])[0].softmax(-1)  # type: ignore[arg-type]
        n = 2000
        drawing = [Sampling(temperature, top_k, top_p, random.Random(0))] * n
        counts = torch.bincount(torch.tensor(draw(drawing, logits.expand(n, -1))), minlength=300)
        assert not counts[expected == 0].any()
        error = (counts / n - expected).abs() / (expected * (1 - expected) / n).sqrt().clamp(min=1 / n)
        assert error.max() < 5  # standard deviations


def test_what_cannot_share_is_answered_by_hflm(
    parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import harness.evaluation.shared_prefix_lm
    from fusion.inference.prefix_cache import UnsupportedModel

    def refuse(model: Any) -> None:
        raise UnsupportedModel("it is a test")

    greedy = asked(CONTEXTS[:4], until=["\n"], max_gen_toks=10)
    sampled = asked(CONTEXTS[:4], until=["\n"], max_gen_toks=10, do_sample=True, temperature=0.7)
    expected = ours(parts).generate_until(greedy)
    monkeypatch.setattr(harness.evaluation.shared_prefix_lm, "PrefixCachedModel", refuse)
    slow = ours(parts)
    assert "it is a test" in " ".join(capsys.readouterr().err.split())
    assert slow.generate_until(greedy) == expected
    first = slow.generate_until(sampled)
    assert slow.generate_until(sampled[::-1])[::-1] == first  # each on its own, whatever came before


def test_beams_are_left_to_transformers(parts: tuple[Any, Any]) -> None:
    requests = asked(CONTEXTS[:2], until=["\n"], max_gen_toks=6, num_beams=2)
    assert ours(parts).generate_until(requests) == theirs(parts, 1).generate_until(requests, disable_tqdm=True)


def test_nothing_is_cut(parts: tuple[Any, Any]) -> None:
    long = "".join(sentences(200, 1))
    with pytest.raises(UserError, match="does not fit the context of m, 512"):
        ours(parts).generate_until(asked([long], until=["\n"], max_gen_toks=4))
    with pytest.raises(UserError, match="does not fit the context"):
        ours(parts).loglikelihood([Instance("loglikelihood", {}, (long, " fox"), 0)], disable_tqdm=True)


@pytest.mark.parametrize("shared", [True, False])
def test_prompts_that_do_not_fit_are_cut_as_hflm_cuts_them(
    parts: tuple[Any, Any], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generated and scored; by our own LM and by HFLM's."""
    if not shared:
        monkeypatch.setattr("harness.evaluation.shared_prefix_lm.PrefixCachedModel", _unsupported)
    texts = ["".join(sentences(n, n)) for n in (1, 40, 60)]
    lm = ours(parts, overflow="truncate_left")
    generated = asked(texts, until=["\n"], max_gen_toks=6, do_sample=False)
    scored = [Instance("loglikelihood", {}, (text, ending), 0) for text in texts for ending in ENDINGS]
    overflows = [lm.overflow(request) for request in generated]
    assert overflows[0] is None and [o and (o.read, o.new, o.context) for o in overflows[1:]] == [(506, 6, 512)] * 2
    assert sum(lm.overflow(request) is not None for request in scored) == 2 * len(ENDINGS)
    assert lm.generate_until(generated) == theirs(parts, 1).generate_until(generated, disable_tqdm=True)
    expected = theirs(parts, 1).loglikelihood(scored, disable_tqdm=True)
    found = lm.loglikelihood(scored, disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_an_answer_is_shrunk_before_a_prompt_is_cut(parts: tuple[Any, Any]) -> None:
    tokens = parts[1]("".join(sentences(60, 1)))["input_ids"]
    prompts = [parts[1].decode(tokens[:n]) for n in (500, 700)]
    requests = asked(prompts, until=["\0"], max_gen_toks=20, do_sample=False)
    lm = ours(parts, overflow="shrink_answer")
    lengths = [len(parts[1](prompt)["input_ids"]) for prompt in prompts]
    found = [over for request in requests if (over := lm.overflow(request))]
    assert [(o.read, o.new) for o in found] == [(lengths[0], 512 - lengths[0]), (511, 1)]
    limited = [
        asked([p], until=["\0"], max_gen_toks=o.new, do_sample=False) for p, o in zip(prompts, found, strict=True)
    ]
    assert lm.generate_until(requests) == [
        theirs(parts, 1).generate_until(one, disable_tqdm=True)[0] for one in limited
    ]
    assert [o and o.read for o in map(ours(parts, overflow="skip").overflow, requests)] == [0, 0]


def _unsupported(model: Any) -> None:
    from fusion.inference.prefix_cache import UnsupportedModel

    raise UnsupportedModel("it is a test")


def test_a_tokenizer_without_an_end_is_refused(parts: tuple[Any, Any]) -> None:
    endless = PreTrainedTokenizerFast(tokenizer_object=parts[1].backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token"):
        SharedPrefixLM(parts[0], endless, label="m")


def test_logits_that_are_no_numbers_are_refused(parts: tuple[Any, Any]) -> None:
    lm = ours(parts)
    head = parts[0].get_output_embeddings().weight
    kept = head.data.clone()
    try:
        head.data[3] = torch.nan
        for ask in (
            lambda: lm.generate_until(asked(["a"], until=["\n"], max_gen_toks=4)),
            lambda: lm.loglikelihood([Instance("loglikelihood", {}, ("a", " fox"), 0)], disable_tqdm=True),
        ):
            with pytest.raises(UserError, match="not finite"):
                ask()
    finally:
        head.data.copy_(kept)


def test_memory_bounds_the_rows(parts: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    lm = ours(parts)
    assert lm._room(100) == 64
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    assert lm._room(100) == 1


def _forced(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> LlamaForCausalLM:
    """A Llama that says `ids` one after the other, each of which occurs once."""
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for layer in (model.lm_head, model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
            layer.weight.zero_()
        for before, after in pairwise([*ids, tokenizer.eos_token_id]):
            model.lm_head.weight[after, before] = 9.0
    return model


@pytest.mark.parametrize("shared", [True, False], ids=["shared prefixes", "HFLM's own"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "prefix_space", "t5"])
def test_an_answer_after_its_prompt_keeps_its_first_space(
    name: str, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 2's decoder strips a space: every indented completion of a program would be one short."""
    tokenizer = ZOO[name]()
    prompt, answer = "def half(x):\n", " the"
    before, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]
    n = common_prefix_length(before, whole)
    prompt = tokenizer.decode(before[:n], skip_special_tokens=True)
    assert tokenizer(prompt)["input_ids"] == whole[:n], f"{name} does not split there"
    if not shared:
        monkeypatch.setattr(shared_prefix_lm, "PrefixCachedModel", _unsupported)
    model = _forced(tokenizer, whole[n - 1 :])
    request = asked([prompt], until=["\n\n"], max_gen_toks=20, do_sample=False)
    found = {
        after: ours((model, tokenizer), batch_size=1, after_prompt=after).generate_until(request)[0]
        for after in (True, False)
    }
    assert prompt + found[True] == tokenizer.decode(whole, skip_special_tokens=True)
    # lm-eval's tasks keep HFLM's way.
    assert found[False] == theirs((model, tokenizer), 1).generate_until(request, disable_tqdm=True)[0]
    assert (found[False] != found[True]) == (name in ("llama", "t5"))


def _unsupported(model: Any) -> Any:
    raise UnsupportedModel("it is not")
