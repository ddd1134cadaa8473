"""Attention within passages: what short ones give on a CPU equals what `sdpa` gives, and so do the gradients."""

import pytest
import torch
from torch import Tensor

from fusion.modeling.attention import _SHORT, _Short, attend_by_passage


def qkv(n: int, dtype: torch.dtype, heads: int = 4, shared: int = 2, width: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # As models hand them over: the heads are a view of a wider array.
    shapes = (heads, shared, shared)
    return [torch.randn(1, n, h, width, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for h in shapes]


def reference(tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out = torch.nn.functional.scaled_dot_product_attention(*exact, is_causal=True, scale=0.3, enable_gqa=True)
    return [out, *torch.autograd.grad(out, exact, upstream.double())]


@pytest.mark.parametrize("n", [1, 2, 37])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_short_passages_equal_sdpa_and_its_gradients(n: int, dtype: torch.dtype, tolerance: float) -> None:
    tensors = qkv(n, dtype)
    upstream = torch.randn(1, 4, n, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):  # scores stay float32 under it
        out = _Short.apply(*tensors, 0.3)
    found = [out, *torch.autograd.grad(out, tensors, upstream)]
    for ours, exact in zip(found, reference(tensors, upstream), strict=True):
        assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_scores_are_not_rounded_to_bfloat16() -> None:
    """Two keys whose scores differ by less than bfloat16 tells apart at their size."""
    q = torch.tensor([[1.0, 0.0], [64.0, 1.0]], dtype=torch.bfloat16)[None, None]
    k = torch.tensor([[1.0, 0.0], [1.0, 0.125]], dtype=torch.bfloat16)[None, None]
    v = torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16)[None, None]
    with torch.autocast("cpu", torch.bfloat16):
        out = _Short.apply(q, k, v, 1.0)
    assert float(out[0, 0, 1, 0]) == pytest.approx(torch.sigmoid(torch.tensor(0.125)).item(), abs=2e-3)


@pytest.mark.parametrize("lengths", [[[5, 1, 9], [15]], None])
@pytest.mark.parametrize("window", [None, 4])
def test_passages_in_bfloat16_equal_those_in_double(lengths: list[list[int]] | None, window: int | None) -> None:
    """Query and key widened by their rotation, as under autocast; a window shorter than a passage goes to sdpa."""
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    q, k, v = (torch.cat([t, t.flip(2)]).detach() for t in qkv(15, torch.bfloat16))
    options = {"passage_lengths": lengths, "sliding_window": window, "scaling": 0.3}
    with torch.autocast("cpu", torch.bfloat16):
        ours, _ = attend_by_passage(module, q.float(), k.float(), v, None, **options)
    exact, _ = attend_by_passage(module, q.double(), k.double(), v.double(), None, **options)
    assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape
    assert (ours.double() - exact).abs().max() <= 0.02 * exact.abs().max()


def test_short_ones_alone_take_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    whole = _Short.apply
    monkeypatch.setattr(_Short, "apply", lambda *a: taken.append(a[0].shape[2]) or whole(*a))
    module = torch.nn.Module()
    n = _SHORT + 1
    q, k, v = qkv(2 * n, torch.bfloat16, 1, 1, 2)
    lengths = [[n, n - 1, 1]]
    attend_by_passage(module, q, k, v, None, passage_lengths=lengths)
    assert taken == [n - 1, 1]
    attend_by_passage(module, q, k, v, None, passage_lengths=lengths, dropout=0.1)
    attend_by_passage(module, q.float(), k.float(), v.float(), None, passage_lengths=lengths)
    assert taken == [n - 1, 1]
