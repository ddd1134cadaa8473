"""How tokens are drawn and how models are decoded whose attention cannot be shared."""

import random
from typing import Any

import pytest
import torch
from transformers import BloomConfig, FalconConfig, Gemma2Config, MptConfig

from fusion.inference import prefix_cache
from fusion.inference.decoding import Sampling, draw
from fusion.inference.padded_decoding import decode_padded, padded_row_bytes
from tests.fusion.inference.test_prefix_cache import greedy, make, text

SETTINGS = [(1.0, 0, 0.9), (0.2, 0, 0.95), (0.5, 5, 0.8), (2.0, 0, 1.0), (3.0, 100, 0.99)]
FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "bloom": (BloomConfig, {"n_layer": 3, "n_head": 4}),
    "falcon": (FalconConfig, {"alibi": True, "new_decoder_architecture": False, "multi_query": False}),
    "gemma2": (Gemma2Config, {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "pad_token_id": 0}),
    "mpt": (MptConfig, {"d_model": 16, "n_heads": 4, "n_layers": 3, "max_seq_len": 128}),
}


def one_by_one(settings: Sampling, logits: torch.Tensor) -> int:
    """A token by the definition, over the whole vocabulary."""
    values, order = (logits.double() / settings.temperature).sort(descending=True, stable=True)
    p = (values[: settings.top_k] if settings.top_k else values).softmax(-1)
    p = p[p.cumsum(-1) - p < settings.top_p]
    at = torch.searchsorted(p.cumsum(-1), settings.generator.random() * float(p.sum()), right=True)
    return int(order[min(int(at), len(p) - 1)])


def test_a_draw_depends_on_its_own_row_alone() -> None:
    logits = torch.randn(40, 2000, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 6, 40)[:, None]
    settings = [SETTINGS[n % len(SETTINGS)] for n in range(40)]
    rows = [[Sampling(*s, random.Random(n)) for n, s in enumerate(settings)] for _ in range(3)]
    together = draw(rows[0], logits)
    assert together == [draw([row], logits[n : n + 1])[0] for n, row in enumerate(rows[1])]
    assert together == [one_by_one(row, logits[n]) for n, row in enumerate(rows[2])]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_padded_decoding_is_decoding_each(name: str, rows: int) -> None:
    config, settings = FAMILIES[name]
    model = make(config, **settings)
    model.generation_config.repetition_penalty = 3.0  # what a checkpoint asks for is the caller's matter
    prompts = [text(n, n) for n in (3, 9, 1, 20, 9)]
    found: list[list[int]] = [[] for _ in prompts]

    def choose(numbers: Any, logits: torch.Tensor) -> list[int | None]:
        chosen: list[int | None] = []
        for number, row in zip(numbers, logits, strict=True):
            found[number].append(int(row.argmax()))
            over = len(found[number]) == 12 or not found[number][-1] % 7
            chosen.append(None if over else found[number][-1])
        return chosen

    decode_padded(model, prompts, choose, rows=rows, limit=12, pad=0)
    assert found == [greedy(model, prompt, 12) for prompt in prompts]
    assert model.generation_config.repetition_penalty == 3.0
    assert padded_row_bytes(model, 100) > 100 * 60 * 8


def test_scores_of_short_types_are_float32_without_a_copy_of_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys = torch.randn(6, 3, 8), torch.randn(6, 5, 8)
    expected = q.bfloat16().float() @ keys.bfloat16().float().transpose(1, 2)
    for copied in (1, 80, 10**6):
        monkeypatch.setattr(prefix_cache, "_COPIED", copied)
        found = prefix_cache._scores(q.bfloat16(), keys.bfloat16())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
