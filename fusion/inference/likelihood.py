"""Log-likelihood of whole documents that may be longer than a model's window: summed nats, every token scored once."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fusion.errors import UserError
from fusion.inference.decoding import pack_consecutive
from fusion.inference.ensembles import PrefixCachedEnsemble
from fusion.inference.prefix_tree import Branching, CachedPrefix
from fusion.inference.top_k import Backbone, Projection, batches_by_length, reader
from fusion.inference.windows import Window, window_stride, windows
from fusion.modeling.heads import find_head

Mode = Literal["rolling", "strided"]
LOGITS_PER_CHUNK = 2**25  # float32 logits that exist at one time: 128 MB
DENSE_LOGITS = 2**28  # the same for a model that gives its logits only whole: 1 GB, or one window


def document_nats(
    model: nn.Module | PrefixCachedEnsemble,
    texts_ids: Sequence[Sequence[int]],
    *,
    prefix: int,
    window: int,
    mode: Mode = "rolling",
    stride: int | None = None,
    batch_tokens: int,
    progress: Callable[[float], object] | None = None,
) -> np.ndarray:
    """The negative log-likelihood float64[n] of n documents in nats, each summed over all its tokens.

    `texts_ids` are the documents' tokens without special tokens, `prefix` is what is read before the first of them, so
    that it is scored, too: the model's bos, else its eos. An empty document has 0 nats. `mode`:

    `rolling`  the number of lm-eval 0.4.13's `loglikelihood_rolling` with `max_length=window, add_bos_token=False`:
               windows that meet without overlap, so that the tokens at the beginning of one know little
    `strided`  windows that overlap: half a window or more before every token, but for the first window

    Where lm-eval differs: it leaves special tokens to the tokenizer unless told otherwise, so that families whose
    tokenizer puts a bos before the text (Gemma, Llama 2 and 3, Mistral) read bos twice and have the second one scored;
    it turns text that looks like a control token into that token; it takes the softmax in the model's dtype, here it
    is float32 whatever the model's.

    Windows are batched by length, at most `batch_tokens` padded tokens a batch (a longer window alone), which changes
    the result by rounding only; only the scored positions' logits are made, a few at a time. Of models read as one
    (`ensemble.PrefixCachedEnsemble`) a long window is read in parts, each with the keys and values of those before.
    `progress` is called with the number of tokens scored since the last call.

    Raises UserError for windows the model has no positions for, tokens it has no row for, and logits that are not
    finite (both name the document's index).
    """
    stride = window_stride(mode, window, stride)
    if isinstance(model, PrefixCachedEnsemble):
        positions, rows = model.positions, model.vocabulary
    else:
        config: Any = model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if positions is not None and window > positions:
        raise UserError(f"the window of {window} tokens exceeds the {positions} positions of the model: lower it")
    for index, tokens in enumerate(texts_ids):
        if len(tokens) and not 0 <= min(tokens) <= max(tokens) < rows:
            raise UserError(
                f"document {index} has a token outside of the model's vocabulary of {rows}: it was encoded with "
                "another model's tokenizer"
            )
    if not 0 <= prefix < rows:
        raise UserError(f"the prefix token {prefix} lies outside of the model's vocabulary of {rows}")

    sequences = [np.array([prefix, *tokens], dtype=np.int64) for tokens in texts_ids]
    jobs = [
        (document, part)
        for document, tokens in enumerate(texts_ids)
        for part in windows(len(tokens), window=window, stride=stride)
    ]
    job_nats = np.zeros(len(jobs))
    chosen = [(sequences[document], part) for document, part in jobs]
    scored = (
        _ensemble_nats(model, chosen) if isinstance(model, PrefixCachedEnsemble) else _nats(model, chosen, batch_tokens)
    )
    for batch, found in scored:
        for job, nats in zip(batch, found, strict=True):
            if not np.isfinite(nats).all():
                raise UserError(f"the model's logits on document {jobs[job][0]} are not finite: it cannot be scored")
            job_nats[job] = nats.sum()
        if progress is not None:
            progress(sum(chosen[job][1].end - chosen[job][1].scored_from for job in batch))
    result = np.zeros(len(texts_ids))
    # In the windows' order, so that the sum does not depend on how they were batched.
    np.add.at(result, [document for document, _ in jobs], job_nats)
    return result


ScoredWindows = Iterator[tuple[list[int], list[np.ndarray]]]
"""Numbers of windows, and the float64 nats of the scored tokens of each."""


def _nats(model: nn.Module, jobs: Sequence[tuple[np.ndarray, Window]], batch_tokens: int) -> ScoredWindows:
    embeddings: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    rows = embeddings.shape[0]
    training = model.training
    model.eval()
    try:
        backbone, project = reader(model)
        if find_head(model) is None:  # then the backbone gives the logits of all positions of a batch
            batch_tokens = min(batch_tokens, DENSE_LOGITS // rows)
        for batch in batches_by_length([part.end - part.start for _, part in jobs], batch_tokens):
            some = [jobs[job] for job in batch]
            yield batch, _token_nats(backbone, project, some, embeddings.device, max(1, LOGITS_PER_CHUNK // rows))
    finally:
        model.train(training)


def _ensemble_nats(reader: PrefixCachedEnsemble, jobs: Sequence[tuple[np.ndarray, Window]]) -> ScoredWindows:
    chunk = max(1, LOGITS_PER_CHUNK // reader.widest)
    for batch in pack_consecutive([part.end - part.start for _, part in jobs], chunk):
        some = [(jobs[job][0][jobs[job][1].start : jobs[job][1].end + 1].tolist(), jobs[job][1]) for job in batch]
        firsts = [part.scored_from - part.start for _, part in some]
        with reader.patched_attention():
            if len(batch) == 1:
                found = _in_parts(reader, some[0][0], firsts[0], chunk)
            else:
                branchings = [Branching(tokens[:-1]) for tokens, _ in some]
                wanted = [
                    range(first, len(branching.tokens)) for branching, first in zip(branchings, firsts, strict=True)
                ]
                gold = [i for (tokens, _), first in zip(some, firsts, strict=True) for i in tokens[first + 1 :]]
                found = _gold_nats(reader.read(branchings, wanted), torch.tensor(gold))
        counts = [part.end - part.scored_from for _, part in some]
        yield batch, np.split(found.double().cpu().numpy(), np.cumsum(counts)[:-1])


def _in_parts(reader: PrefixCachedEnsemble, tokens: Sequence[int], first: int, chunk: int) -> torch.Tensor:
    """The nats of tokens[first + 1 :], computed `chunk` positions at a time."""
    cached: CachedPrefix | None = None
    found = []
    for start, end in pairwise([*([0] if first else []), *range(first, len(tokens) - 1, chunk), len(tokens) - 1]):
        wanted = [range(end - start)] if start >= first else None
        logits, (new,) = reader.prefill([Branching(tokens[start:end], cached)], wanted)
        cached = new if cached is None else cached.then(new)
        if wanted:
            found.append(_gold_nats(logits, torch.tensor(tokens[start + 1 : end + 1])))
    return torch.cat(found)


def _gold_nats(logits: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, gold.to(logits.device)[:, None])[:, 0]


@torch.inference_mode()
def _token_nats(
    backbone: Backbone,
    project: Projection,
    batch: Sequence[tuple[np.ndarray, Window]],
    device: torch.device,
    chunk: int,
) -> list[np.ndarray]:
    """float64 nats of the scored tokens of each (sequence, window), computed as one batch padded on the right.

    Logits exist for `chunk` positions at a time, in float32.
    """
    length = max(part.end - part.start for _, part in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    gold = torch.full((len(batch), length), -1)  # -1: not scored
    for row, (sequence, part) in enumerate(batch):
        tokens[row, : part.end - part.start] = torch.from_numpy(sequence[part.start : part.end])
        first, last = part.scored_from - part.start, part.end - part.start
        gold[row, first:last] = torch.from_numpy(sequence[part.scored_from + 1 : part.end + 1])
    gold = gold.to(device)
    scored = gold >= 0
    hidden = backbone(tokens.to(device))[scored]
    gold = gold[scored]
    values: list[torch.Tensor] = []
    for some, following in zip(hidden.split(chunk), gold.split(chunk), strict=True):
        logits = project(some).float()
        values.append(_gold_nats(logits, following))
    counts = [part.end - part.scored_from for _, part in batch]
    return np.split(torch.cat(values).double().cpu().numpy(), np.cumsum(counts)[:-1])
