"""Several models that answer as one: at every position the mean of their distributions over the next token.

Models with one tokenizer read the same tokens, each with its own keys and values. A model with another tokenizer reads
the text so far as it would write it itself, never text to come, so that what it says of a text is what it would have
said while writing it; its distribution is carried into the vocabulary of the pivot, the model whose tokens the ensemble
reads and writes. Where the text ends within a token of its own, what that token would go on with counts, too
(`fusion.inference.token_healing`). One model's logits exist at a time, beside the mean of those before.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.inference.prefix_cache import DecodingBatch, Later, PrefixReader
from fusion.inference.prefix_tree import Run, Stem, Tree, alike
from fusion.inference.token_healing import MOST, Cover, Overlaps
from fusion.vocabulary.maps import control_ids
from fusion.vocabulary.token_bytes import Vocabulary, encode_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Combine = Literal["probabilities", "logits"]
_ROWS = 16  # of logits that are worked on at one time: what fits a processor's cache
_ESCAPED = 0xDC00  # where Python's surrogateescape puts a byte that is no text


def mean(parts: Iterable[Tensor], weights: Sequence[float], combine: Combine = "probabilities") -> Tensor:
    """Log-probabilities float32[n, V]: the weighted mean of the distributions given by logits[n, at least V] each.

    V is the first part's; of logits beyond it nothing is taken. The weights are positive and sum to 1.
    `probabilities` is the arithmetic mean, `logits` the geometric one, scaled to sum to 1. Where a part knows nothing
    (all its logits are -inf), the mean is that of the others.
    """
    given = iter(parts)
    total = None
    for weight in weights:
        total = _added(total, next(given), weight, combine)  # by no name, so that it is gone before the next is made
    assert total is not None
    for rows in total.split(_ROWS):
        rows -= rows.logsumexp(-1, keepdim=True)
    return total


def _added(total: Tensor | None, logits: Tensor, weight: float, combine: Combine) -> Tensor:
    """The running sum float32[n, V] with logits[n, at least V], in place; a new one where there is none."""
    if total is None:
        start = -torch.inf if combine == "probabilities" else 0.0
        total = torch.full(logits.shape, start, dtype=torch.float32, device=logits.device)
    for rows, new in zip(total.split(_ROWS), logits[:, : total.shape[1]].split(_ROWS), strict=True):
        log_p = new.float()
        log_p = log_p - log_p.logsumexp(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)
        if combine == "probabilities":
            torch.logaddexp(rows, log_p + math.log(weight), out=rows)
        else:
            rows += weight * log_p
    return total


class Translator:
    """A model with a tokenizer of its own, asked in the pivot's tokens and answering in them."""

    def __init__(
        self,
        reader: PrefixReader,
        tokenizer: "PreTrainedTokenizerFast",
        vocabulary: Vocabulary,
        pivot: Vocabulary,
        vocabulary_map: Tensor,
        *,
        encode_pivot: Callable[[Sequence[str]], list[list[int]]],
        prefix: int,
        label: str,
        overlaps: int = MOST,
    ) -> None:
        """`vocabulary_map`: int64[V] the pivot's id of each of the model's, negative for none; `prefix`: its bos, else
        its eos; `encode_pivot` and `overlaps`: see `fusion.inference.token_healing`.
        """
        self.reader = reader
        self._tokenizer = tokenizer
        self._pivot = pivot
        self._prefix = prefix
        self._label = label
        self._always = tokenizer("")["input_ids"][:1] == [prefix]  # some tokenizers put a bos before any text
        self._mapped = torch.nonzero(vocabulary_map >= 0)[:, 0].to(reader.device)
        self._onto = vocabulary_map.to(reader.device)[self._mapped]
        self._of_byte = {
            passage[0]: i for i, passage in enumerate(vocabulary.token_bytes) if passage and len(passage) == 1
        }
        own = control_ids(pivot, vocabulary)
        self._of_control = {i: own.get(i, vocabulary.ids.get(pivot.tokens[i])) for i in pivot.control}
        self._overlaps = Overlaps(vocabulary, pivot, encode_pivot, most=overlaps, device=reader.device)
        self.widest = (1 + overlaps) * reader.vocabulary
        """Logits that one text may need."""

    def read(self, asked: Sequence[Sequence[Sequence[int]]], begun: Sequence[Stem | None]) -> tuple[Tensor, list[Stem]]:
        """Log-probabilities float32[n, V of the pivot] after each of the n texts asked for, and stems to go on from.

        A group of texts continues what `begun` has read of it; its stem is that of its last text.
        """
        found = self.encode([text for texts in asked for text in texts])
        ends = [
            _End(own, self._overlaps.covers(own, text))
            for own, text in zip(found, (text for texts in asked for text in texts), strict=True)
        ]
        left = iter(ends)
        trees, kept = [], []
        wanted: list[list[int]] = []
        for texts, stem in zip(asked, begun, strict=True):
            some = [next(left) for _ in texts]
            # The last token may change with the next character, and all of them with the pre-tokenizer's mood. Those
            # whose logits are wanted are read anew.
            n = min(min(alike(stem.tokens, tuple(e.own)), len(e.own) - e.rows) for e in some) if stem else 0
            kept.append(stem.cut(n) if stem and n else None)
            trees.append(Tree([e.own[n:] for e in some], kept[-1]))
            longest = max(len(e.own) for e in some)
            if self.reader.positions and longest > self.reader.positions:
                raise UserError(
                    f"A text of {longest} tokens does not fit the context of {self._label}, "
                    f"{self.reader.positions}: leave its task out, or lower the window."
                )
            wanted.append(_rows(trees[-1], some, sum(len(nodes) for nodes in wanted)))
        logits, read = self.reader.begin(trees, wanted)
        stems = [_longer(before, tree, new) for before, tree, new in zip(kept, trees, read, strict=True)]
        return self._carried(logits, ends), stems

    def encode(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The model's own tokens of texts in the pivot's tokens; never none.

        Its bos goes before a text that begins with a control token of the pivot's, and where its tokenizer always puts
        one. Of bytes that are no characters yet those are read that it has tokens for.
        """
        parts = [self._parts(text) for text in texts]
        written = iter(encode_all(self._tokenizer, [part for some in parts for part in some if isinstance(part, str)]))
        return [[i for part in some for i in (next(written) if isinstance(part, str) else [part])] for some in parts]

    def _parts(self, text: Sequence[int]) -> list[str | int]:
        """Strings that are still to be encoded, and tokens of the model between them."""
        passages = self._pivot.token_bytes
        start = next((n for n, i in enumerate(text) if passages[i] is not None), len(text))
        found: list[str | int] = [self._prefix] if start or self._always else []
        spelled: list[bytes] = []
        for i in [*text[start:], None]:
            passage = passages[i] if i is not None else None
            if passage is not None:
                spelled.append(passage)
                continue
            found += self._spelled(b"".join(spelled))
            spelled = []
            if i is not None:
                token = self._of_control.get(i)
                found += [self._pivot.tokens[i]] if token is None else [token]
        return found or [self._prefix]

    def _spelled(self, text: bytes) -> list[str | int]:
        if self._pivot.dummy_prefix and text.startswith(b" "):
            text = text[1:]
        found: list[str | int] = []
        whole = text.decode("utf-8", "surrogateescape")
        marks = [n for n, char in enumerate(whole) if _ESCAPED <= ord(char) < _ESCAPED + 256]
        for before, mark in pairwise([-1, *marks, len(whole)]):
            if before >= 0 and (token := self._of_byte.get(ord(whole[before]) - _ESCAPED)) is not None:
                found.append(token)
            if whole[before + 1 : mark]:
                found.append(whole[before + 1 : mark])
        return found

    def _carried(self, logits: Tensor, ends: Sequence["_End"]) -> Tensor:
        """Log-probabilities float32[n, V of the pivot] by the map: duplicates summed, what maps to nothing left out."""
        carried = torch.zeros(len(ends), len(self._pivot), device=logits.device)
        totals = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(_ROWS)])
        for start in range(0, len(ends), _ROWS):
            rows, some = carried[start : start + _ROWS], ends[start : start + _ROWS]
            last = torch.tensor([end.at[0] for end in some], device=logits.device)
            rows.index_add_(1, self._onto, logits[last].float().softmax(-1)[:, self._mapped])
            for row, end in zip(rows, some, strict=True):
                if end.covers:
                    _add_covers(row, logits, totals, end)
            rows.log_()
        return carried


@dataclass
class _End:
    """The end of a text in a model's own tokens, and what covers the last 1, 2, ... of these."""

    own: list[int]
    covers: list[Cover]
    at: list[int] = field(default_factory=list)
    """Rows of the logits after all tokens, and after all but the last 1, 2, ..."""

    @property
    def rows(self) -> int:
        return 1 + len(self.covers)


def _rows(tree: Tree, ends: Sequence[_End], first: int) -> list[int]:
    """The tokens of the tree whose logits are wanted, each once; where they will be, from `first`, is noted."""
    wanted: dict[int, int] = {}
    for node, end in zip(tree.ends, ends, strict=True):
        for _ in range(end.rows):
            end.at.append(first + wanted.setdefault(node, len(wanted)))
            node = tree.parents[node]
    return list(wanted)


def _add_covers(row: Tensor, logits: Tensor, totals: Tensor, end: _End) -> None:
    """What comes next, float32[V of the pivot], where the text may also end within a token: in place."""
    # Against all that begins with the text's own tokens, a longer one in their place weighs its probability by theirs.
    theirs = torch.zeros((), device=row.device)
    weights = []
    for back, (ids, _) in enumerate(end.covers, 1):
        at = end.at[back]
        theirs = theirs + logits[at, end.own[-back]].float() - totals[at]
        weights.append(logits[at, ids].float() - totals[at] - theirs)
    log_weights = torch.cat(weights)
    whole = torch.logaddexp(log_weights.logsumexp(0), torch.zeros_like(theirs))
    row *= (-whole).exp()
    row.index_add_(0, torch.cat([onto for _, onto in end.covers]), (log_weights - whole).exp())


def _longer(before: Stem | None, tree: Tree, read: Stem) -> Stem:
    """The stem of a tree's last sequence, with what it continues."""
    path = tree.path(tree.ends[-1])
    keys, values = ([x[:, path] for x in kept] for kept in (read.keys, read.values))
    stem = Stem(len(path), keys, values, tuple(tree.text(path[-1])))
    return stem if before is None else before.then(stem)


class JointReader(PrefixReader):
    """Models read as one (see the module): logits are the log-probabilities of their mean, in float32."""

    def __init__(
        self,
        members: Sequence[tuple[PrefixReader, float]],
        translated: Sequence[tuple[Translator, float]] = (),
        combine: Combine = "probabilities",
    ) -> None:
        """Readers and weights of the models that share the pivot's tokenizer, and of those that do not.

        Where the former have vocabularies of several sizes (rows without a token), the smallest is the ensemble's.
        Weights are positive; their shares count. Raises UserError for a mean of logits across vocabularies.
        """
        total = sum(weight for _, weight in [*members, *translated])
        weights = [weight / total for _, weight in [*members, *translated]]
        if translated and combine == "logits":
            raise UserError(
                "A mean of logits needs models with one tokenizer (a token that one of them lacks has no logit): "
                "combine probabilities."
            )
        self._readers = [reader for reader, _ in members]
        self._translators = [translator for translator, _ in translated]
        own = weights[: len(members)]
        self._share = sum(own)
        self._own = [weight / self._share for weight in own]
        self._others = weights[len(members) :]
        self._combine: Combine = combine
        every = [*self._readers, *(t.reader for t in self._translators)]
        self.device = self._readers[0].device
        self.vocabulary = min(reader.vocabulary for reader in self._readers)
        self.widest = max(*(r.vocabulary for r in self._readers), *(t.widest for t in self._translators), 0)
        self.positions = min((reader.positions for reader in self._readers if reader.positions), default=None)
        self.layers = sum(reader.layers for reader in self._readers)
        self.position_bytes = sum(reader.position_bytes for reader in every)

    @contextmanager
    def reading(self) -> Iterator[None]:
        with ExitStack() as stack:
            for reader in [*self._readers, *(t.reader for t in self._translators)]:
                stack.enter_context(reader.reading())
            yield

    def read(self, runs: Sequence[Run | Tree], wanted: Sequence[Sequence[int]]) -> Tensor:
        return self._with_others(super().read(runs, wanted), runs, wanted)[0]

    def begin(
        self, runs: Sequence[Run | Tree], wanted: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, list[Stem]]:
        wanted = wanted or [[len(run.tokens) - 1] for run in runs]
        logits, stems = super().begin(runs, wanted)
        logits, read = self._with_others(logits, runs, wanted)
        return logits, [Stem(s.length, s.keys, s.values, s.tokens, tuple(r)) for s, r in zip(stems, read, strict=True)]

    def step(self, groups: Sequence[DecodingBatch], tokens: Sequence[int]) -> Tensor:
        logits = super().step(groups, tokens)
        texts = [[text] for rows in groups for text in rows.tokens]
        read = [stems for rows in groups for stems in rows.translations]
        logits, new = self._joined(logits, texts, read)
        for stems, now in zip(read, new, strict=True):
            stems[:] = now
        return logits

    def _forward(self, tokens: Sequence[int], positions: Sequence[int], wanted: Sequence[int], shared: Any) -> Tensor:
        def parts() -> Iterator[Tensor]:
            first = 0
            for reader in self._readers:
                yield reader._forward(tokens, positions, wanted, Later(shared, first))[:, : self.vocabulary]
                first += reader.layers

        return mean(parts(), self._own, self._combine)

    def _with_others(
        self, logits: Tensor, runs: Sequence[Run | Tree], wanted: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[list[Stem]]]:
        if not self._translators:
            return logits, [[] for _ in runs]
        texts = [[run.text(i) for i in some] for run, some in zip(runs, wanted, strict=True)]
        begun = [list(run.stem.translations) if run.stem else [] for run in runs]
        return self._joined(logits, texts, begun)

    def _joined(
        self, logits: Tensor, texts: Sequence[Sequence[Sequence[int]]], begun: Sequence[Sequence[Stem]]
    ) -> tuple[Tensor, list[list[Stem]]]:
        """The mean with what the others say after the texts, and what they have read now, by group and model."""
        stems: list[list[Stem]] = [[] for _ in texts]
        if not self._translators:
            return logits, stems

        def parts() -> Iterator[Tensor]:
            yield logits
            for number, translator in enumerate(self._translators):
                carried, read = translator.read(texts, [some[number] if some else None for some in begun])
                for known, new in zip(stems, read, strict=True):
                    known.append(new)
                yield carried

        return mean(parts(), [self._share, *self._others]), stems
