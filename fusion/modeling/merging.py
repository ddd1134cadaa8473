"""Merging of models that were trained from one base, tensor by tensor (FuseChat, arXiv 2402.16107 and 2408.07990).

A model's change is the difference of its tensor from the base's. mergekit has more such methods; these are computed
here because its SCE is another than the paper's, and it has no VaRM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["matrix", "module", "layer", "model"]
Change = Literal["square", "absolute"]
_MODULE = re.compile(r".*?\.\d+\.[^.]+")
_LAYER = re.compile(r".*?\.\d+(?=\.)")


def mean_change(model: Tensor, base: Tensor, change: Change) -> float:
    """The mean over a tensor's elements of the squared or absolute difference from the base, in float64."""
    difference = model.double() - base.double()
    return float((difference.square() if change == "square" else difference.abs()).mean())


def varm_weights(
    changes: Mapping[str, Sequence[float]], sizes: Mapping[str, int], granularity: Granularity
) -> dict[str, list[float]]:
    """The weights of J models in each tensor, in proportion to how much they changed (arXiv 2402.16107, equation 7).

    `changes[name]` holds the J models' `mean_change` of a tensor and `sizes[name]` its number of elements. A unit of
    parameters has one set of weights: the tensor (`matrix`, the paper's); a module of a layer, such as its attention,
    or a whole `layer`, by the sum of their tensors' means; or the `model`, by the mean over all elements. Tensors
    outside of layers are units by themselves with `module` and have equal weights with `layer`. Where no model
    changed, the weights are equal.
    """
    total: dict[str, list[float]] = {}
    units = {name: _unit(name, granularity) for name in changes}
    for name, of_tensor in changes.items():
        factor = sizes[name] if granularity == "model" else 1
        so_far = total.setdefault(units[name], [0.0] * len(of_tensor))
        total[units[name]] = [a + factor * b for a, b in zip(so_far, of_tensor, strict=True)]
    weights = {}
    for name, of_tensor in changes.items():
        of_unit = total[units[name]]
        none = not sum(of_unit) > 0 or (granularity == "layer" and not _LAYER.match(name))
        weights[name] = [1 / len(of_tensor) if none else change / sum(of_unit) for change in of_unit]
    return weights


def _unit(name: str, granularity: Granularity) -> str:
    """What has one set of weights with the tensor of that name."""
    if granularity == "model":
        return ""
    if granularity == "matrix":
        return name
    found = (_MODULE if granularity == "module" else _LAYER).match(name)
    return found[0] if found else name


def sce(base: Tensor, models: Sequence[Tensor], *, select_topk: float, published: bool) -> Tensor:
    """Select, calculate, erase: a tensor of the merged model, in float32 (arXiv 2408.07990, algorithm 1).

    Of the J changes d_j the elements with the greatest variance over the models are selected, `select_topk` of those
    that vary at all; eta_j is the share of d_j^2 in the sum of all over the selected elements. In an element those d_j
    are erased whose sign is not that of the sum over the models (0 counts as positive). The paper adds sum_j eta_j d_j
    of the selected elements to the base. The published code takes the selection for eta only, merges all elements, and
    divides by the sum of the eta_j that are not erased. Where nothing is selected, as in a vector of fewer than
    1 / `select_topk` elements, the paper's definition leaves the base, and the published code takes equal eta_j.
    """
    origin = base.float()
    changes = torch.stack([model.float() - origin for model in models])
    selected = torch.zeros_like(origin)
    variance = changes.var(0, unbiased=False).flatten()
    k = int(select_topk * int(variance.count_nonzero()))
    selected.view(-1)[variance.topk(k).indices] = 1
    if select_topk == 1:
        selected.fill_(1)
    squares = (changes * selected).square().flatten(1).sum(1)
    if not squares.sum() > 0:
        if not published:
            return origin
        squares = torch.ones_like(squares)
    eta = (squares / squares.sum()).reshape(-1, *[1] * origin.ndim)
    if not published:
        changes = changes * selected
    majority = torch.where(changes.sum(0) >= 0, 1.0, -1.0)
    kept = eta * (changes.sign() == majority)
    merged = (kept * changes).sum(0)
    if published:
        survived = kept.sum(0)
        merged = merged / torch.where(survived > 0, survived, 1)
    return origin + merged
