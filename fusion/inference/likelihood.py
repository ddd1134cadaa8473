"""Log-likelihood of whole documents that may be longer than a model's window: summed nats, every token scored once."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn

from fusion.errors import NotFinite, UserError
from fusion.inference.decoding import pack_consecutive
from fusion.inference.ensembles import PrefixCachedEnsemble
from fusion.inference.prefix_tree import Branching, CachedPrefix
from fusion.inference.top_k import Backbone, Projection, batches_by_length, reader
from fusion.inference.windows import read_tokens, window_stride, windows
from fusion.modeling.context import context_length
from fusion.modeling.heads import find_head

Mode = Literal["rolling", "strided"]
LOGITS_PER_CHUNK = 2**25  # float32 logits that exist at one time: 128 MB
_MORE = 8  # tokens that the beginning of a text may have more than the text: it may end inside a word or a character
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
               windows that meet without overlap, so that the tokens at the beginning of one know little, and only
               a document's first window begins with the prefix
    `strided`  windows that overlap and begin with the prefix each: half a window or more before every token, but for
               the first window

    Where lm-eval differs: it leaves special tokens to the tokenizer unless told otherwise, so that families whose
    tokenizer puts a bos before the text (Gemma, Llama 2 and 3, Mistral) read bos twice and have the second one scored;
    it turns text that looks like a control token into that token; it takes the softmax in the model's dtype, here it
    is float32 whatever the model's.

    Windows are batched by length, at most `batch_tokens` padded tokens a batch (a longer window alone), which changes
    the result by rounding only; only the scored positions' logits are made, a few at a time. Of models read as one
    (`ensemble.PrefixCachedEnsemble`) a long window is read in parts, each with the keys and values of those before.
    `progress` is called with the number of tokens scored since the last call.

    Raises UserError for windows the model has no positions for and tokens it has no row for, and NotFinite for logits
    that are not (both name the document's index).
    """
    stride = window_stride(mode, window, stride)
    if isinstance(model, PrefixCachedEnsemble):
        positions, rows = model.positions, model.vocabulary
    else:
        positions = context_length(model.config)
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

    sequences = [[prefix, *tokens] for tokens in texts_ids]
    jobs = [
        (document, part)
        for document, tokens in enumerate(texts_ids)
        for part in windows(len(tokens), window=window, stride=stride)
    ]
    job_nats = np.zeros(len(jobs))
    chosen = [
        ScoredText(
            np.array(read_tokens(sequences[document], part, mode), np.int64),
            np.array(sequences[document][part.scored_from + 1 : part.end + 1], np.int64),
        )
        for document, part in jobs
    ]
    scored = (
        _ensemble_nats(model, chosen) if isinstance(model, PrefixCachedEnsemble) else _nats(model, chosen, batch_tokens)
    )
    for batch, found in scored:
        for job, nats in zip(batch, found, strict=True):
            if not np.isfinite(nats).all():
                raise NotFinite(f"the model's logits on document {jobs[job][0]} are not finite: it cannot be scored")
            job_nats[job] = nats.sum()
        if progress is not None:
            progress(sum(len(chosen[job].gold) for job in batch))
    result = np.zeros(len(texts_ids))
    # In the windows' order, so that the sum does not depend on how they were batched.
    np.add.at(result, [document for document, _ in jobs], job_nats)
    return result


def unreadable(
    model: nn.Module | PrefixCachedEnsemble,
    texts_ids: Sequence[Sequence[int]],
    *,
    prefix: int,
    window: int,
    mode: Mode = "rolling",
    stride: int | None = None,
) -> set[int]:
    """Which of the documents of `document_nats` cannot be scored: a member of the ensemble needs more tokens for one of
    their windows than its context has. None of a single model.
    """
    if not isinstance(model, PrefixCachedEnsemble):
        return set()
    stride = window_stride(mode, window, stride)
    with model.prefixes_as_given():
        return {
            document
            for document, tokens in enumerate(texts_ids)
            for part in windows(len(tokens), window=window, stride=stride)
            if model.excess(read_tokens([prefix, *tokens], part, mode), _MORE) > 0
        }


class ScoredText(NamedTuple):
    """What is read of a window, int64[L], and the tokens that its last positions predict, int64[n] with n <= L."""

    tokens: np.ndarray
    gold: np.ndarray

    @property
    def first(self) -> int:
        """The first position whose prediction is scored."""
        return len(self.tokens) - len(self.gold)


ScoredWindows = Iterator[tuple[list[int], list[np.ndarray]]]
"""Numbers of windows, and the float64 nats of the scored tokens of each."""


def _nats(model: nn.Module, jobs: Sequence[ScoredText], batch_tokens: int) -> ScoredWindows:
    embeddings: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    rows = embeddings.shape[0]
    training = model.training
    model.eval()
    try:
        backbone, project = reader(model)
        if find_head(model) is None:  # then the backbone gives the logits of all positions of a batch
            batch_tokens = min(batch_tokens, DENSE_LOGITS // rows)
        for batch in batches_by_length([len(job.tokens) for job in jobs], batch_tokens):
            some = [jobs[job] for job in batch]
            yield batch, _token_nats(backbone, project, some, embeddings.device, max(1, LOGITS_PER_CHUNK // rows))
    finally:
        model.train(training)


def _ensemble_nats(reader: PrefixCachedEnsemble, jobs: Sequence[ScoredText]) -> ScoredWindows:
    chunk = max(1, LOGITS_PER_CHUNK // reader.widest)
    for batch in pack_consecutive([len(job.tokens) for job in jobs], chunk):
        some = [jobs[job] for job in batch]
        with reader.patched_attention(), reader.prefixes_as_given():
            if len(batch) == 1:
                found = _in_parts(reader, some[0], chunk)
            else:
                branchings = [Branching(job.tokens.tolist()) for job in some]
                wanted = [range(job.first, len(job.tokens)) for job in some]
                gold = torch.from_numpy(np.concatenate([job.gold for job in some]))
                found = _gold_nats(reader.read(branchings, wanted), gold)
        yield batch, np.split(found.double().cpu().numpy(), np.cumsum([len(job.gold) for job in some])[:-1])


def _in_parts(reader: PrefixCachedEnsemble, job: ScoredText, chunk: int) -> torch.Tensor:
    """The nats of the job's gold tokens, computed `chunk` positions at a time."""
    cached: CachedPrefix | None = None
    found = []
    tokens, first = job.tokens.tolist(), job.first
    for start, end in pairwise([*([0] if first else []), *range(first, len(tokens), chunk), len(tokens)]):
        wanted = [range(end - start)] if start >= first else None
        logits, (new,) = reader.prefill([Branching(tokens[start:end], cached)], wanted)
        cached = new if cached is None else cached.then(new)
        if wanted:
            found.append(_gold_nats(logits, torch.from_numpy(job.gold[start - first : end - first])))
    return torch.cat(found)


def _gold_nats(logits: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    return logits.logsumexp(-1) - logits.gather(-1, gold.to(logits.device)[:, None])[:, 0]


@torch.inference_mode()
def _token_nats(
    backbone: Backbone,
    project: Projection,
    batch: Sequence[ScoredText],
    device: torch.device,
    chunk: int,
) -> list[np.ndarray]:
    """float64 nats of the scored tokens of each text, computed as one batch padded on the right.

    Logits exist for `chunk` positions at a time, in float32.
    """
    length = max(len(job.tokens) for job in batch)
    tokens = torch.zeros(len(batch), length, dtype=torch.long)
    gold = torch.full((len(batch), length), -1)  # -1: not scored
    for row, job in enumerate(batch):
        tokens[row, : len(job.tokens)] = torch.from_numpy(job.tokens)
        gold[row, job.first : len(job.tokens)] = torch.from_numpy(job.gold)
    gold = gold.to(device)
    scored = gold >= 0
    hidden = backbone(tokens.to(device))[scored]
    gold = gold[scored]
    values: list[torch.Tensor] = []
    for some, following in zip(hidden.split(chunk), gold.split(chunk), strict=True):
        logits = project(some).float()
        values.append(_gold_nats(logits, following))
    counts = [len(job.gold) for job in batch]
    return np.split(torch.cat(values).double().cpu().numpy(), np.cumsum(counts)[:-1])
