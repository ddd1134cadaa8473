"""Cases of the objective, and what it is by definition: dense, in float64."""

from typing import Any

import torch
from torch import Tensor

from fusion.losses.loss import TAIL_FLOOR
from fusion.losses.objective import CHUNK, Head, MixedLoss, Objective
from fusion.losses.sparse_cross_entropy import SparseCrossEntropy


def dense(
    logits: Tensor,
    gold: Tensor,
    clm_weight: Tensor,
    ids: Tensor,
    p: Tensor,
    tail: Tensor,
    fusion_weight: Tensor,
    lam: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, row by row over the whole vocabulary: total, CLM, fusion."""
    clm, fusion = logits.new_zeros(()), logits.new_zeros(())
    for n, log_q in enumerate(logits.log_softmax(-1)):
        if gold[n] >= 0:
            clm = clm - clm_weight[n] * log_q[gold[n]]
        kept = [k for k in range(ids.shape[1]) if ids[n, k] >= 0]
        outside = torch.ones(len(log_q), dtype=torch.bool)
        for k in kept:
            fusion = fusion - fusion_weight[n] * p[n, k] * log_q[ids[n, k]]
            outside[ids[n, k]] = False
        if tail[n] > 0:
            fusion = fusion - fusion_weight[n] * tail[n] * log_q[outside].logsumexp(0)
    return lam * clm + (1 - lam) * fusion, clm, fusion


def case(
    seed: int, n: int = 23, d: int = 6, v: int = 31, k: int = 5, bias: bool = True, spread: float = 1.0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters hidden[n, d], weight[v, d], bias[v] in float64, and loss arrays with every edge in them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * spread).requires_grad_()

    parameters = {"hidden": normal(n, d), "weight": normal(v, d), **({"bias": normal(v)} if bias else {})}
    ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(n)])
    p = torch.rand(n, k + 1, generator=g, dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    p, tail = p[:, :-1].clone(), p[:, -1].clone()
    gold = torch.randint(-1, v, (n,), generator=g)
    clm_weight = torch.randint(0, 3, (n,), generator=g).double() / 2
    fusion_weight = torch.randint(0, 3, (n,), generator=g).double() / 2
    at = torch.rand(n, generator=g)
    ids[at < 0.3, -2:] = -1  # pads, whose p is left in to be ignored
    ids[(at > 0.3) & (at < 0.4)] = -1  # nothing but a tail
    tail[at > 0.6] = 0.0  # kept mass below 1 and no tail: the factor S of the plain cross-entropy
    p[(at > 0.7) & (at < 0.8), 0] = 0.0  # an id that is kept without mass
    ids[at > 0.8, 0] = gold[at > 0.8].clamp(min=0)  # the gold token among the ids
    for row in range(n):  # not twice
        seen: set[int] = set()
        for column in range(k):
            if int(ids[row, column]) in seen:
                ids[row, column] = -1
            seen.add(int(ids[row, column]))
    return parameters, {
        "gold": gold, "clm_weight": clm_weight, "ids": ids, "p": p, "tail": tail, "fusion_weight": fusion_weight,
    }  # fmt: skip


def objective(
    gold: Tensor, clm_weight: Tensor, lam: float, chunk: int = CHUNK, floor: float = TAIL_FLOOR, **arrays: Tensor
) -> Objective:
    """The objective of the arrays of `case`; of CLM alone without ids, p, tail and fusion_weight."""
    term = None
    if arrays:
        term = SparseCrossEntropy(arrays["ids"], arrays["p"], arrays["tail"], arrays["fusion_weight"], floor)
    return Objective(gold, clm_weight, lam, term, chunk)


def head_of(parameters: dict[str, Tensor], **kwargs: Any) -> Head:
    return Head(parameters["weight"], parameters.get("bias"), **kwargs)


def relative(ours: Tensor, reference: Tensor) -> float:
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-12))


def values(loss: MixedLoss | tuple[Tensor, ...]) -> list[float]:
    return [float(x.detach()) for x in loss]
