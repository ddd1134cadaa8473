"""An ensemble is the mean of what its members say: greedy, sampled and scored, in one tokenizer."""

import random
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
)

from fusion.inference.decoding import decode
from fusion.inference.ensembles import mean
from fusion.inference.likelihood import document_nats
from fusion.inference.prefix_cache import PrefixCachedModel
from fusion.inference.prefix_tree import Branching, PrefixTree
from fusion.inference.windows import read_tokens
from tests.fusion.inference.random_models import GEMMA, joint, model, pick


@pytest.fixture(scope="module")
def trio() -> list[Any]:
    """Three architectures with one vocabulary; the last has rows without a token."""
    return [
        model(LlamaConfig, 60, 1, num_key_value_heads=1),
        model(GPTNeoXConfig, 60, 2),
        model(Gemma3TextConfig, 64, 3, **GEMMA),
    ]


WEIGHTS = [0.5, 0.2, 0.3]


def naive(members: Sequence[Any], weights: Sequence[float], combine: str, tokens: Sequence[int]) -> Tensor:
    """float64[T, 60] by the definition, without any cache."""
    with torch.no_grad():
        logits = [m(torch.tensor([list(tokens)]), use_cache=False).logits[0, :, :60].double() for m in members]
    if combine == "logits":
        return sum(w * x.log_softmax(-1) for w, x in zip(weights, logits, strict=True)).log_softmax(-1)  # type: ignore[union-attr]
    return sum(w * x.softmax(-1) for w, x in zip(weights, logits, strict=True)).log()  # type: ignore[union-attr]


def prompts(n: int, low: int = 1, high: int = 40) -> list[list[int]]:
    drawn = random.Random(n)
    shared = [drawn.randrange(60) for _ in range(20)]
    return [
        shared[: drawn.randrange(21)] + [drawn.randrange(60) for _ in range(drawn.randint(low, high))] for _ in range(n)
    ]


@given(st.integers(1, 4), st.sampled_from(["probabilities", "logits"]), st.integers(0, 99))
def test_a_mean_is_its_formula(n: int, combine: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(3, 7 + i, generator=generator) * 5 for i in range(n)]
    weights = torch.rand(n, generator=generator).add(0.01)
    weights /= weights.sum()
    found = mean(parts, weights.tolist(), combine)
    cut = [part[:, :7].double() for part in parts]
    if combine == "probabilities":
        expected = sum(w * x.softmax(-1) for w, x in zip(weights, cut, strict=True)).log()  # type: ignore[union-attr]
    else:
        expected = sum(w * x for w, x in zip(weights, cut, strict=True)).log_softmax(-1)  # type: ignore[union-attr]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    order = random.Random(seed).sample(range(n), n)
    shuffled = mean([cut[i] for i in order], [float(weights[i]) for i in order], combine)
    torch.testing.assert_close(shuffled, found, atol=1e-5, rtol=1e-5)


def test_who_knows_nothing_does_not_count() -> None:
    some = torch.randn(2, 5)
    silent = torch.full((2, 5), -torch.inf)
    torch.testing.assert_close(mean([some, silent], [0.3, 0.7]), some.log_softmax(-1))


def test_one_models_logits_exist_at_a_time(trio: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the mean of those before."""
    forward = PrefixCachedModel._forward
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def watched(self: PrefixCachedModel, *given: Any) -> Tensor:
        alive.append(sum(ref() is not None for ref in made))
        memory = forward(self, *given).numpy().copy()
        made.append(weakref.ref(memory))
        return torch.from_numpy(memory)  # keeps it as long as any view of it is there

    reader = joint(trio, WEIGHTS)
    monkeypatch.setattr(PrefixCachedModel, "_forward", watched)
    texts = prompts(4)
    with reader.patched_attention():
        reader.read([Branching(t) for t in texts], [range(len(t)) for t in texts])
    assert generate(reader, texts, 3)
    assert len(alive) > 3 and set(alive) == {0}


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_reading_is_the_naive_mean(trio: list[Any], combine: Any) -> None:
    reader = joint(trio, WEIGHTS, combine)
    texts = prompts(4)
    with reader.patched_attention():
        found = reader.read([Branching(t) for t in texts], [range(len(t)) for t in texts])
        _, (cached,) = reader.prefill([Branching(texts[0][:5])])
        branches = [texts[0][5:], texts[1]]
        tree = reader.read([Branching([7, 8], cached, branches)], [range(2 + sum(map(len, branches)))])
    expected = torch.cat([naive(trio, WEIGHTS, combine, t) for t in texts])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    whole = [naive(trio, WEIGHTS, combine, [*texts[0][:5], 7, 8, *b]) for b in branches]
    torch.testing.assert_close(tree.double(), torch.cat([whole[0][5:], whole[1][7:]]), atol=1e-4, rtol=1e-4)


def generate(
    reader: PrefixCachedModel, given: Sequence[Sequence[int]], n: int, seed: int | None = None
) -> list[list[int]]:
    """Greedy, or drawn with a number of its own for every sequence and step."""
    new: list[list[int]] = [[] for _ in given]

    def choose(numbers: Sequence[int], logits: Tensor) -> list[int | None]:
        for number, row in zip(numbers, logits, strict=True):
            new[number].append(pick(row, number, len(new[number]), seed))
        return [None if len(new[number]) == n else new[number][-1] for number in numbers]

    decode(reader, given, choose, rows=3, batch_tokens=50)
    return new


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_generation_is_the_naive_loops(trio: list[Any], combine: Any, seed: int | None) -> None:
    given = prompts(5)
    expected = []
    for number, prompt in enumerate(given):
        text = list(prompt)
        for step in range(6):
            text.append(pick(naive(trio, WEIGHTS, combine, text)[-1], number, step, seed))
        expected.append(text[len(prompt) :])
    order = [2, 0, 1]
    assert generate(joint(trio, WEIGHTS, combine), given, 6, seed) == expected
    shuffled = joint([trio[i] for i in order], [WEIGHTS[i] for i in order], combine)
    assert generate(shuffled, given, 6, seed) == expected
    assert generate(joint(trio[:1], [1], combine), given, 6, seed) != expected


@pytest.mark.parametrize("combine", ["probabilities", "logits"])
def test_a_model_with_itself_is_the_model(trio: list[Any], combine: Any) -> None:
    twice, given = joint([trio[2], trio[2]], [0.3, 0.7], combine), prompts(4)
    assert generate(twice, given, 8) == generate(PrefixCachedModel(trio[2]), given, 8)
    for window in (16, 200):
        settings: Any = {"prefix": 0, "window": window, "batch_tokens": 100}
        np.testing.assert_allclose(
            document_nats(twice, given, **settings), document_nats(trio[2], given, **settings), rtol=1e-5
        )


@pytest.mark.parametrize("mode", ["rolling", "strided"])
def test_perplexity_is_the_naive_means(trio: list[Any], mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import fusion.inference.likelihood

    given = [*prompts(4), []]
    found = {}
    for logits in (2**20, 64 * 7):  # windows in one part, and seven positions at one time
        monkeypatch.setattr(fusion.inference.likelihood, "LOGITS_PER_CHUNK", logits)
        found[logits] = document_nats(joint(trio, WEIGHTS), given, prefix=0, window=24, mode=mode, batch_tokens=100)
    expected = [
        sum(
            -float(naive(trio, WEIGHTS, "probabilities", read_tokens([0, *t], w, mode))[i - w.start, t[i]])
            for w in fusion.inference.likelihood.windows(len(t), window=24, stride=24 if mode == "rolling" else 12)
            for i in range(w.scored_from, w.end)
        )
        for t in given
    ]
    for one in found.values():
        np.testing.assert_allclose(one, expected, rtol=1e-5)


def test_a_tree_is_its_sequences(trio: list[Any]) -> None:
    texts = [[1, 2, 3], [1, 2], [1, 2, 3, 4, 5], [1, 9, 3], [8], [1, 2, 3]]
    for member in (trio[0], trio[2]):
        reader = PrefixCachedModel(member)
        tree = PrefixTree(texts)
        assert len(tree.tokens) == 8
        with reader.patched_attention():
            found = reader.read([tree], [tree.ends])
            _, (cached,) = reader.prefill([Branching([5, 6] * 12)])
            later = PrefixTree(texts, cached)
            continued = reader.read([later], [later.ends])
            alone = reader.read([Branching(t) for t in texts], [[len(t) - 1] for t in texts])
            after = reader.read([Branching([5, 6] * 12 + t) for t in texts], [[23 + len(t)] for t in texts])
        torch.testing.assert_close(found, alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(continued, after, atol=1e-4, rtol=1e-4)
