"""What the published code of other methods answers, as predictions of two models with small vocabularies."""

import gzip
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusion.losses.loss import Encodings, Loss, LossResources
from fusion.losses.term import LossTerm
from fusion.types import Predictions
from fusion.vocabulary.maps import build_map
from fusion.vocabulary.token_bytes import Vocabulary
from tests.shared import shared


def oracle(name: str) -> dict[str, Any]:
    with gzip.open(shared(f"oracle/methods/{name}.json.gz"), "rt") as file:
        found: dict[str, Any] = json.load(file)
    return found


def vocabulary(tokens: Sequence[str], n_control: int = 3, **roles: int) -> Vocabulary:
    return Vocabulary.from_tokens(tokens, space=" ", control=set(range(n_control)), roles=roles)


def predictions(vocabulary: Vocabulary, tokens: Sequence[int], logits: Any, k: int | None = None) -> Predictions:
    """The k most probable (default: all) of logits[M, V] at the M tokens; after the prefix these are the text."""
    log_p = torch.as_tensor(logits, dtype=torch.float64).log_softmax(-1)
    ids, follows = np.array(tokens, np.int32), np.array([*tokens[1:], 0])
    top = log_p.topk(log_p.shape[1] if k is None else k)
    nats = -log_p.gather(1, torch.tensor(follows, dtype=torch.long)[:, None])[:, 0].numpy()
    nats[-1] = 0
    ends = np.cumsum([0, *(len(vocabulary.token_bytes[i] or b"") for i in tokens[1:])])
    return Predictions(
        ids,
        ends.astype(np.int32),
        top.indices.numpy().astype(np.int32),
        top.values.numpy().astype(np.float32),
        np.maximum(1 - top.values.exp().sum(1).numpy(), 0).astype(np.float32),
        nats.astype(np.float32),
    )


def resources(target: Vocabulary, **teachers: Vocabulary) -> LossResources:
    """Those of teachers whose equal tokens are mapped onto the target's, and that cut text by longest match."""
    maps = {name: build_map("em", teacher, target) for name, teacher in teachers.items()}
    encodings = {
        name: Encodings(longest_match(target, one), longest_match(one, target)) for name, one in teachers.items()
    }
    return LossResources("target", {"target": target, **teachers}, maps, encodings=encodings)


def longest_match(source: Vocabulary, target: Vocabulary) -> np.ndarray:
    """int32[V_source, 4]: each token in the target's longest tokens, characters without any left out."""
    ids = {token: i for i, token in enumerate(target.token_bytes) if token}
    result = np.full((len(source), 4), -1, np.int32)
    for i, token in enumerate(source.token_bytes):
        left, pieces = token or b"", list[int]()
        while left:
            size = next((n for n in range(len(left), 0, -1) if left[:n] in ids), 0)
            pieces += [ids[left[:size]]] if size else []
            left = left[max(size, 1) :]
        result[i, : len(pieces[:4])] = pieces[:4]
    return result


def value_and_gradient(
    loss: Loss, passage: Mapping[str, Predictions], resources: LossResources, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Nats[N] of the loss at the positions of one passage, and the gradient [N, V] of their sum on logits[N, V]."""
    own = passage[resources.target]
    features = loss.features([passage], [int(own.byte_ends.max())], resources)
    batch = {name: torch.from_numpy(array)[None] for name, array in features.items()}
    tokens = torch.tensor(own.tokens, dtype=torch.long)
    batch |= {"input_ids": tokens[None], "labels": torch.cat([tokens[1:], torch.tensor([-100])])[None]}
    term = loss.term(batch, {})
    assert isinstance(term, LossTerm)
    constants = {name: torch.from_numpy(array) for name, array in loss.constants(resources).items()}
    leaf = logits.detach().double().clone().requires_grad_()
    nats = term.loss(leaf, {**term.features, **constants})
    (gradient,) = torch.autograd.grad(nats.sum(), leaf)
    assert not (nats.detach()[~term.active] != 0).any()
    return nats.detach(), gradient
