"""The published algorithm as simply as it can be written: loops over tokens and positions, dense targets, one
compiled Levenshtein distance a pair, as the published code has. What is measured is held against these, and checked.

Source: arXiv 2401.10491, section 3, and its published code as the preset `published` describes it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rapidfuzz.distance import Levenshtein
from torch import Tensor
from torch.nn import functional as F

from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary

Entries = list[tuple[list[int], list[float]]]  # for each position its ids and scores


def mined(texts: Sequence[str] | Sequence[bytes], candidates: Sequence[str] | Sequence[bytes]) -> list[int]:
    """For each text the place of the equal candidate, else of the first one at the least distance."""
    place: dict[Any, int] = {}
    for i, candidate in enumerate(candidates):
        place.setdefault(candidate, i)
    result = []
    for text in texts:
        if text in place:
            result.append(place[text])
            continue
        best, least = -1, float("inf")
        for i, candidate in enumerate(candidates):
            distance = Levenshtein.distance(text, candidate)
            if distance < least:
                best, least = i, distance
        result.append(best)
    return result


def same_end(source_ends: Sequence[int], target_ends: Sequence[int]) -> list[int]:
    """For each target position the last source position with its byte end, -1 for none."""
    by_end = {end: position for position, end in enumerate(source_ends)}
    return [by_end.get(end, -1) if end >= 0 else -1 for end in target_ends]


def warping_path(source: Sequence[str], target: Sequence[str]) -> list[list[int]]:
    """For each target position the source positions on the cheapest warping path, cost the distance of the strings."""
    far = float("inf")
    total = [[far] * (len(target) + 1) for _ in range(len(source) + 1)]
    total[0][0] = 0
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            total[i + 1][j + 1] = Levenshtein.distance(a, b) + min(total[i][j + 1], total[i + 1][j], total[i][j])
    paired: list[list[int]] = [[] for _ in target]
    i, j = len(source) - 1, len(target) - 1
    while i > 0 or j > 0:
        paired[j].append(i)
        options = (
            total[i][j] if i > 0 and j > 0 else far,
            total[i][j + 1] if i > 0 else far,
            total[i + 1][j] if j > 0 else far,
        )
        move = options.index(min(options))
        i -= int(move != 2)
        j -= int(move != 1)
    paired[0].append(0)
    return [positions[::-1] for positions in paired]


def partners(
    source: Predictions,
    target: Predictions,
    source_vocabulary: Vocabulary,
    target_vocabulary: Vocabulary,
    image: np.ndarray,
) -> list[int]:
    """The source position for each target position of a passage, -1 for none; prefix tokens pair with each other."""
    space, other = source_vocabulary.space, target_vocabulary.space
    strings = [source_vocabulary.tokens[i] for i in source.tokens[1:].tolist()]
    targets = [target_vocabulary.tokens[i] for i in target.tokens[1:].tolist()]
    paired = warping_path([s.replace(space, "") for s in strings], [t.replace(other, "") for t in targets])
    result = [0]
    for i, candidates in enumerate(paired):
        j = candidates[0]
        equal = strings[j].replace(space, other) == targets[i] or image[source.tokens[1 + j]] == target.tokens[1 + i]
        result.append(1 + j if len(candidates) == 1 and equal else -1)
    return result


def project(source: Predictions, target: Predictions, partner: Sequence[int], image: np.ndarray) -> Entries:
    """The partner's entries through the map, the first of duplicates; a one-hot on the current token without one."""
    mapped = {i: int(m) for i, m in enumerate(image.tolist()) if m >= 0}
    entries: Entries = []
    for i, j in enumerate(partner):
        if j < 0:
            entries.append(([int(target.tokens[i])], [1.0]))
            continue
        ids: list[int] = []
        scores: list[float] = []
        for token, score in zip(source.ids[j].tolist(), source.log_p[j].tolist(), strict=True):
            if token in mapped and mapped[token] not in ids:
                ids.append(mapped[token])
                scores.append(score)
        entries.append((ids, scores))
    return entries


def dense(entries: Entries, own: Entries, vocabulary: int) -> Tensor:
    """float32[T, V]: the softmax of what is kept, at an empty list the target's own."""
    out = torch.zeros(len(entries), vocabulary)
    for row, kept, instead in zip(out, entries, own, strict=True):
        ids, scores = kept if kept[0] else instead
        row[ids] = torch.tensor(scores).softmax(-1)
    return out


def fuse(
    predictions: Sequence[Mapping[str, Predictions]],
    aligned: Mapping[str, Sequence[Sequence[int]]],
    images: Mapping[str, np.ndarray],
    target: str,
    vocabulary: int,
) -> Tensor:
    """float32[T, V] of a row of passages: project, make dense, and take the source best over the row (MinCE).

    `aligned[source]` holds `partners` of each passage; the target itself stands first.
    """
    own: Entries = [
        (ids.tolist(), scores.tolist())
        for passage in predictions
        for ids, scores in zip(passage[target].ids, passage[target].log_p, strict=True)
    ]
    members, rewards = [dense(own, own, vocabulary)], [_reward([passage[target] for passage in predictions])]
    for name, pairs in aligned.items():
        entries: Entries = []
        for passage, partner in zip(predictions, pairs, strict=True):
            entries += project(passage[name], passage[target], partner, images[name])
        members.append(dense(entries, own, vocabulary))
        rewards.append(_reward([passage[name] for passage in predictions]))
    stacked = torch.stack(members)
    return stacked[int(torch.stack(rewards).argmax())]


def _reward(predictions: Sequence[Predictions]) -> Tensor:
    nats = sum(float(r.nll.sum()) for r in predictions)
    return torch.exp(-torch.tensor(nats / sum(len(r.nll) - 1 for r in predictions), dtype=torch.bfloat16))


def objective(logits: Tensor, gold: Tensor, p: Tensor, lam: float) -> Tensor:
    """The sum over positions of lam * CLM + (1 - lam) * CE(p, softmax(logits)); logits and p [T, V]."""
    log_q = F.log_softmax(logits, dim=-1)
    return lam * F.nll_loss(log_q, gold, reduction="sum", ignore_index=-1) - (1 - lam) * (p * log_q).sum()


def predict_top_k(model: Any, batch: Sequence[Sequence[int]], k: int) -> list[list[tuple[list[int], list[float]]]]:
    """For each sequence of a batch its positions' top-k ids and logits as Python lists, from dense float32 logits."""
    width = max(map(len, batch))
    input_ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in batch])
    mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in batch])
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask).logits.float()
    result = []
    for row, sequence in zip(logits, batch, strict=True):
        top = [position.topk(k) for position in row[: len(sequence)]]
        result.append([(indices.tolist(), values.tolist()) for values, indices in top])
    return result
