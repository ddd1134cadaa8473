"""Top-k prediction: log-probabilities of the k most probable tokens, the tail and the nll of the next token, per
position.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fusion.errors import UserError
from fusion.modeling.heads import find_head, float32_logits
from fusion.modeling.packing import own_forward
from fusion.types import LEAST_STD
from fusion.vocabulary.token_bytes import Vocabulary

Backbone = Callable[[Tensor], Tensor]
Projection = Callable[[Tensor], Tensor]
_CACHED = 2**20  # logits that a CPU core works on at once: what lies in its cache is not fetched from memory five times


def reader(model: nn.Module) -> tuple[Backbone, Projection]:
    """A causal LM as `backbone(input_ids[B, L])` -> hidden[B, L, D] and `project(hidden[N, D])` -> logits[N, V].

    Logits are float32 also of a model in a shorter dtype. For a model whose head is not understood (`heads.split`
    warns) the backbone gives the model's own logits, dense and as the model rounds them.
    """
    if find_head(model) is None:
        # Not the instance's forward, which the training loop may have replaced by the objective.
        return lambda tokens: own_forward(model, input_ids=tokens, use_cache=False).logits, lambda logits: logits
    backbone: Any = model.base_model
    return (
        lambda tokens: backbone(input_ids=tokens, use_cache=False).last_hidden_state,
        lambda hidden: float32_logits(model, hidden),
    )


class BytePrefixes:
    """The V tokens of a vocabulary in the order of their bytes, in which those that begin alike are neighbours."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._token_bytes = vocabulary.token_bytes
        spelled = sorted((spelling, i) for i, spelling in enumerate(vocabulary.token_bytes) if spelling)
        self._sorted = [spelling for spelling, _ in spelled]
        self.order = torch.tensor([i for _, i in spelled], dtype=torch.long)
        """int64[W], the W ids that stand for bytes."""
        self._ranges: dict[int, list[tuple[int, int]]] = {}

    def ranges(self, token: int) -> list[tuple[int, int]]:
        """For 1, 2, ... but not all of the bytes of a token: where in `order` the tokens that begin with them stand."""
        if token not in self._ranges:
            spelling = (self._token_bytes[token] if 0 <= token < len(self._token_bytes) else None) or b""
            self._ranges[token] = [self.range_of(spelling[:length]) for length in range(1, len(spelling))]
        return self._ranges[token]

    def range_of(self, prefix: bytes) -> tuple[int, int]:
        """Where in `order` the tokens that begin with these bytes stand: first, and one after the last."""
        start = bisect_left(self._sorted, prefix)
        # The least string that is greater than all that begin with the prefix: its last byte below 255 raised by one.
        kept = prefix.rstrip(b"\xff")
        end = bisect_left(self._sorted, kept[:-1] + bytes([kept[-1] + 1])) if kept else len(self._sorted)
        return start, end


@dataclass(frozen=True)
class TopKPredictions:
    """Predictions of one sequence of M tokens (arXiv 2401.10491, section 3.1), in nats or probability mass.

    M is 0 where a logit of the sequence was not finite: the sequence is skipped.
    """

    ids: np.ndarray  # int32[M, k] token ids, most probable first
    log_p: np.ndarray  # float32[M, k]
    tail: np.ndarray  # float32[M], 1 - sum of the top k
    nll: np.ndarray  # float32[M], -log p(next token) in nats; 0 at M - 1
    log_z: np.ndarray | None = None  # float32[M, n], log sum over all V ids of p^(1/T) at the n temperatures asked for
    prefix_nll: np.ndarray | None = None  # float32[P], see `fusion.types.Predictions.prefix_nll`
    spread: np.ndarray | None = None  # float32[M, 2], see `fusion.types.Predictions.spread`

    @classmethod
    def none(cls, k: int, temperatures: int = 0) -> "TopKPredictions":
        """The predictions of a sequence that is skipped: no positions, k entries, so many temperatures."""
        log_p, nats = np.zeros((0, k), np.float32), np.zeros(0, np.float32)
        log_z = np.zeros((0, temperatures), np.float32) if temperatures else None
        return cls(np.zeros((0, k), np.int32), log_p, nats, nats, log_z)


def batches_by_length(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices grouped into batches of at most `max_tokens` padded tokens, sorted by length so that little is padding.

    A sequence longer than `max_tokens` gets a batch of its own. The grouping depends on the lengths alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.inference_mode()
def predict_top_k(
    backbone: Backbone,
    project: Projection,
    sequences: Sequence[Sequence[int]],
    *,
    k: int,
    device: torch.device,
    temperatures: Sequence[float] = (),
    prefixes: BytePrefixes | None = None,
    chunk: int = 256,
) -> list[TopKPredictions]:
    """Top-k predictions of one batch of sequences (prefix token first, no padding).

    `backbone(input_ids[B, L])` gives hidden states [B, L, D] and `project(hidden[N, D])` logits [N, V]; logits exist
    for `chunk` positions at a time. With `prefixes`, those of the vocabulary, there is `prefix_nll`. Sequences are
    padded on the right, which a causal model cannot attend to.

    Raises:
        UserError: k exceeds the vocabulary.
    """
    lengths = [len(s) for s in sequences]
    input_ids = torch.zeros(len(sequences), max(lengths), dtype=torch.long)
    following = torch.full_like(input_ids, -1)
    real = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        tokens = torch.tensor(sequence)
        input_ids[row, : len(sequence)] = tokens
        following[row, : len(sequence) - 1] = tokens[1:]
        real[row, : len(sequence)] = True
    hidden = backbone(input_ids.to(device))[real.to(device)]
    gold = following[real].to(device)

    parts, prefix_nll, spread = [], [], []
    for hidden_part, gold_part in zip(hidden.split(chunk), gold.split(chunk), strict=True):
        logits = project(hidden_part)
        if k > logits.shape[-1]:
            raise UserError(f"k = {k} exceeds the source's vocabulary of {logits.shape[-1]}: lower extraction.k.")
        rows = chunk
        if device.type == "cpu":
            rows = max(1, _CACHED // logits.shape[-1]) * torch.get_num_threads()
        for part in zip(logits.split(rows), gold_part.split(rows), strict=True):
            parts.append(_summary(*part, k, temperatures))
            spread.append(_spread(part[0]))
            if prefixes is not None:
                prefix_nll.append(_prefix_nll(*part, prefixes))
    columns = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    spreads = torch.cat(spread).cpu().numpy()
    ragged = None if prefixes is None else torch.cat(prefix_nll).cpu().numpy()

    results, first = [], 0
    for end, length, sequence in zip(np.cumsum(lengths), lengths, sequences, strict=True):
        here = slice(end - length, end)
        result = replace(TopKPredictions(*(column[here] for column in columns)), spread=spreads[here])
        if prefixes is not None and ragged is not None:
            last = first + sum(len(prefixes.ranges(int(token))) for token in sequence[1:])
            result, first = replace(result, prefix_nll=ragged[first:last]), last
        if not (np.isfinite(result.log_p).all() and np.isfinite(result.nll).all()):
            result = replace(TopKPredictions(*(column[:0] for column in columns)), spread=spreads[:0])
        results.append(result)
    return results


def _prefix_nll(logits: Tensor, gold: Tensor, prefixes: BytePrefixes) -> Tensor:
    """The column `prefix_nll` for logits[N, V] and the next tokens gold[N], -1 for none; in float32."""
    ranges = [prefixes.ranges(token) for token in gold.tolist()]
    rows = torch.tensor([row for row, some in enumerate(ranges) for _ in some], dtype=torch.long, device=logits.device)
    bounds = torch.tensor([bound for some in ranges for bound in some], dtype=torch.long, device=logits.device)
    if not len(rows):
        return logits.new_zeros(0, dtype=torch.float32)
    # Sums of neighbours as differences of running sums, in float64, so that small ones keep their digits.
    p = logits.float().softmax(-1)[:, prefixes.order.to(logits.device)]
    running = torch.nn.functional.pad(p.cumsum(-1, dtype=torch.float64), (1, 0))
    mass = running[rows, bounds[:, 1]] - running[rows, bounds[:, 0]]
    return -mass.clamp(min=torch.finfo(torch.float32).tiny, max=1.0).log().float()


def _spread(logits: Tensor) -> Tensor:
    """The column `spread` for logits[N, V], in float32."""
    logits = logits.float()
    std = logits.std(-1, unbiased=False).clamp(min=LEAST_STD)
    standardised = (logits - logits.logsumexp(-1, keepdim=True)) / std[:, None]
    return torch.stack([std, standardised.logsumexp(-1)], -1)


def _summary(logits: Tensor, gold: Tensor, k: int, temperatures: Sequence[float]) -> tuple[Tensor, ...]:
    """The columns of `TopKPredictions` for logits[N, V] and the next tokens gold[N], -1 for none; in float32."""
    logits = logits.float()
    total = logits.logsumexp(-1, keepdim=True)
    top, ids = logits.topk(k, -1)
    log_p = top - total
    # Summed in float64: the tail is a small difference of numbers near one.
    tail = (1 - log_p.double().exp().sum(-1)).clamp(min=0).float()
    nats = (total - logits.gather(-1, gold.clamp(min=0)[:, None]))[:, 0].masked_fill(gold < 0, 0)
    if not temperatures:
        return ids.int(), log_p, tail, nats
    log_z = torch.stack([((logits - total) / t).logsumexp(-1) for t in temperatures], -1)
    return ids.int(), log_p, tail, nats, log_z
