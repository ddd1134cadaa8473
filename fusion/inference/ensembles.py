"""Ensembles: at every position the weighted mean of several models' next-token distributions.

Models with one tokenizer get the same tokens, each with its own keys and values. A model with another tokenizer
re-tokenizes the text so far (never text to come), so that its distribution for a text equals the one it would give
while generating it; its distribution is projected onto the vocabulary of the pivot, the model whose tokens the ensemble
reads and writes. Where the text ends inside a token of its own, the continuations of that token count as well
(`fusion.inference.token_healing`). The logits of one model exist at a time, beside the running mean.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fusion.errors import UserError
from fusion.inference.prefix_cache import DecodingBatch, LayerOffset, PrefixCachedModel
from fusion.inference.prefix_tree import Branching, CachedPrefix, PrefixTree, common_prefix_length
from fusion.inference.token_healing import MOST, CoveringTokens, TokenHealing
from fusion.vocabulary.maps import control_ids
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import EncodeTexts, encode_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Combine = Literal["probabilities", "logits"]
_ROWS = 16  # of logits that are worked on at one time: what fits a processor's cache
_ESCAPED = 0xDC00  # where Python's surrogateescape puts a byte that is no text


def mean(parts: Iterable[Tensor], weights: Sequence[float], combine: Combine = "probabilities") -> Tensor:
    """Log-probabilities float32[n, V]: the weighted mean of the distributions given by logits[n, at least V] each.

    V is the first part's vocabulary size; logits beyond it are ignored. The weights are positive and sum to 1.
    `probabilities` is the arithmetic mean, `logits` the geometric mean, normalised. Where all logits of a part are
    -inf, the mean is that of the others.
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
    """The running sum float32[n, V] plus logits[n, at least V], in place; a new sum where there is none."""
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


class CrossTokenizerMember:
    """A member of an ensemble with a tokenizer of its own; its inputs and outputs are the pivot's tokens."""

    def __init__(
        self,
        reader: PrefixCachedModel,
        tokenizer: "PreTrainedTokenizerFast",
        vocabulary: Vocabulary,
        pivot: Vocabulary,
        vocabulary_map: Tensor,
        *,
        encode_pivot: EncodeTexts,
        prefix: int,
        label: str,
        overlaps: int = MOST,
    ) -> None:
        """`vocabulary_map`: int64[V], the pivot's id of each of the model's ids, negative for none; `prefix`: its bos,
        else its eos; `encode_pivot` and `overlaps`: see `fusion.inference.token_healing`.
        """
        self.reader = reader
        self._tokenizer = tokenizer
        self._pivot = pivot
        self._dummy_prefix = vocabulary.dummy_prefix
        self._prefix = prefix
        self._label = label
        self.adds_prefix = tokenizer("")["input_ids"][:1] == [prefix]  # some tokenizers put a bos before any text
        forms = {0: np.arange(len(vocabulary)), 1: vocabulary.with_space, -1: vocabulary.without_space}
        self._maps = {added: _pairs(vocabulary_map, form, reader.device) for added, form in forms.items()}
        """By the spaces that the pivot's first token has more than the model's: the model's ids and the pivot's."""
        self._of_byte = {
            spelling[0]: i for i, spelling in enumerate(vocabulary.token_bytes) if spelling and len(spelling) == 1
        }
        own = control_ids(pivot, vocabulary)
        self._of_control = {i: own.get(i, vocabulary.ids.get(pivot.tokens[i])) for i in pivot.control}
        self._healing = TokenHealing(vocabulary, pivot, encode_pivot, most=overlaps, device=reader.device)
        self.widest = (1 + overlaps) * reader.vocabulary
        """The largest number of logits that one text may need."""

    def read(
        self, asked: Sequence[Sequence[Sequence[int]]], started: Sequence[CachedPrefix | None]
    ) -> tuple[Tensor, list[CachedPrefix]]:
        """Log-probabilities float32[n, V of the pivot] after each of the n texts, and cached prefixes to continue from.

        A group of texts continues its entry of `started`; the new cached prefix of a group is that of its last text.
        """
        found = self.encode([text for texts in asked for text in texts])
        ends = [
            _End(own, self._healing.covering_tokens(own, text), self._added_spaces(text))
            for own, text in zip(found, (text for texts in asked for text in texts), strict=True)
        ]
        left = iter(ends)
        trees, kept = [], []
        wanted: list[list[int]] = []
        for texts, cached in zip(asked, started, strict=True):
            some = [next(left) for _ in texts]
            # The last token may change with the next character, and all of them with the pre-tokenizer's mood. Those
            # whose logits are wanted are read anew.
            n = (
                min(min(common_prefix_length(cached.tokens, tuple(e.own)), len(e.own) - e.rows) for e in some)
                if cached
                else 0
            )
            kept.append(cached.cut(n) if cached and n else None)
            trees.append(PrefixTree([e.own[n:] for e in some], kept[-1]))
            longest = max(len(e.own) for e in some)
            if self.reader.positions and longest > self.reader.positions:
                raise UserError(
                    f"A text of {longest} tokens does not fit the context of {self._label}, "
                    f"{self.reader.positions}: leave its task out, or lower the window."
                )
            wanted.append(_rows(trees[-1], some, sum(len(nodes) for nodes in wanted)))
        logits, read = self.reader.prefill(trees, wanted)
        cached_prefixes = [
            _extended_prefix(before, tree, new) for before, tree, new in zip(kept, trees, read, strict=True)
        ]
        return self._mapped(logits, ends), cached_prefixes

    def encode(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The model's own tokens of texts given in the pivot's tokens; at least one token each.

        The model's bos precedes a text that begins with a control token of the pivot, and every text where the
        tokenizer always adds it. Incomplete UTF-8 bytes become byte tokens where the model has them.
        """
        parts = [self._parts(text) for text in texts]
        written = iter(encode_all(self._tokenizer, [part for some in parts for part in some if isinstance(part, str)]))
        return [[i for part in some for i in (next(written) if isinstance(part, str) else [part])] for some in parts]

    def _parts(self, text: Sequence[int]) -> list[str | int]:
        """The parts of a text: strings that are still to be encoded, and ids of the model between them."""
        spellings = self._pivot.token_bytes
        start = next((n for n, i in enumerate(text) if spellings[i] is not None), len(text))
        found: list[str | int] = [self._prefix] if start or self.adds_prefix else []
        spelled: list[bytes] = []
        for i in [*text[start:], None]:
            spelling = spellings[i] if i is not None else None
            if spelling is not None:
                spelled.append(spelling)
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

    def _added_spaces(self, text: Sequence[int]) -> int:
        """1 where the pivot's next token has a dummy prefix and the model's does not, -1 the other way round."""
        if not (self._pivot.dummy_prefix or self._dummy_prefix):
            return 0
        spelled = b""
        for i in reversed(text):
            spelled = (self._pivot.token_bytes[i] or b"") + spelled
            if len(spelled) > 1:
                return 0
        nothing_read = spelled.removeprefix(b" ") == b"" if self._pivot.dummy_prefix else not spelled
        return int(self._pivot.dummy_prefix and not spelled) - int(self._dummy_prefix and nothing_read)

    def _mapped(self, logits: Tensor, ends: Sequence["_End"]) -> Tensor:
        """Log-probabilities float32[n, V of the pivot] through the map: duplicates are summed, unmapped ids are left
        out.
        """
        mapped = torch.zeros(len(ends), len(self._pivot), device=logits.device)
        totals = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(_ROWS)])
        for start in range(0, len(ends), _ROWS):
            rows, some = mapped[start : start + _ROWS], ends[start : start + _ROWS]
            last = torch.tensor([end.at[0] for end in some], device=logits.device)
            p = logits[last].float().softmax(-1)
            for added, (ids, onto) in self._maps.items():
                at = [n for n, end in enumerate(some) if end.added_spaces == added]
                if len(at) == len(some):
                    rows.index_add_(1, onto, p[:, ids])
                elif at:
                    rows[at] = torch.zeros_like(rows[at]).index_add_(1, onto, p[at][:, ids])
            for row, end in zip(rows, some, strict=True):
                if end.covering_tokens:
                    _add_covers(row, logits, totals, end)
            rows.log_()
        return mapped


@dataclass
class _End:
    """The end of a text in a model's own tokens, and the tokens that cover its last 1, 2, ... tokens."""

    own: list[int]
    covering_tokens: list[CoveringTokens]
    added_spaces: int = 0
    at: list[int] = field(default_factory=list)
    """Rows of the logits after all tokens, and after all but the last 1, 2, ... tokens."""

    @property
    def rows(self) -> int:
        return 1 + len(self.covering_tokens)


def _pairs(vocabulary_map: Tensor, form: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64[n] ids of the model and int64[n] of the pivot: each id becomes the image of its `form`, if there is one."""
    forms = torch.from_numpy(form).long()
    onto = torch.where(forms >= 0, vocabulary_map[forms.clamp(min=0)], -1)
    ids = torch.nonzero(onto >= 0)[:, 0]
    return ids.to(device), onto[ids].to(device)


def _rows(tree: PrefixTree, ends: Sequence[_End], first: int) -> list[int]:
    """The tree's tokens whose logits are wanted, each once; `ends` receives their rows, counted from `first`."""
    wanted: dict[int, int] = {}
    for node, end in zip(tree.ends, ends, strict=True):
        for _ in range(end.rows):
            end.at.append(first + wanted.setdefault(node, len(wanted)))
            node = tree.parents[node]
    return list(wanted)


def _add_covers(row: Tensor, logits: Tensor, totals: Tensor, end: _End) -> None:
    """Adds, in place, the next-token probabilities float32[V of the pivot] of texts that end inside a token."""
    # Against all that begins with the text's own tokens, a longer one in their place weighs its probability by theirs.
    theirs = torch.zeros((), device=row.device)
    weights = []
    for back, (ids, _) in enumerate(end.covering_tokens, 1):
        at = end.at[back]
        theirs = theirs + logits[at, end.own[-back]].float() - totals[at]
        weights.append(logits[at, ids].float() - totals[at] - theirs)
    log_weights = torch.cat(weights)
    whole = torch.logaddexp(log_weights.logsumexp(0), torch.zeros_like(theirs))
    row *= (-whole).exp()
    row.index_add_(0, torch.cat([onto for _, onto in end.covering_tokens]), (log_weights - whole).exp())


def _extended_prefix(before: CachedPrefix | None, tree: PrefixTree, read: CachedPrefix) -> CachedPrefix:
    """The cached prefix of a tree's last sequence, joined to the prefix that it continues."""
    path = tree.path(tree.ends[-1])
    keys, values = ([x[:, path] for x in kept] for kept in (read.keys, read.values))
    cached = CachedPrefix(len(path), keys, values, tuple(tree.text(path[-1])))
    return cached if before is None else before.then(cached)


class PrefixCachedEnsemble(PrefixCachedModel):
    """An ensemble with cached prefixes: its logits are the log-probabilities of the members' mean, in float32."""

    def __init__(
        self,
        members: Sequence[tuple[PrefixCachedModel, float]],
        translated: Sequence[tuple[CrossTokenizerMember, float]] = (),
        combine: Combine = "probabilities",
    ) -> None:
        """Models and weights of the members that share the pivot's tokenizer, and of those that do not.

        Where the former have vocabularies of several sizes (unused embedding rows), the smallest is the ensemble's.
        Weights are positive and are normalised. Raises UserError for a mean of logits across vocabularies.
        """
        total = sum(weight for _, weight in [*members, *translated])
        weights = [weight / total for _, weight in [*members, *translated]]
        if translated and combine == "logits":
            raise UserError(
                "A mean of logits needs models with one tokenizer (a token that one of them lacks has no logit): "
                "combine probabilities."
            )
        self._readers = [reader for reader, _ in members]
        self._members = [member for member, _ in translated]
        own = weights[: len(members)]
        self._share = sum(own)
        self._own = [weight / self._share for weight in own]
        self._others = weights[len(members) :]
        self._combine: Combine = combine
        every = [*self._readers, *(t.reader for t in self._members)]
        self.device = self._readers[0].device
        self.vocabulary = min(reader.vocabulary for reader in self._readers)
        self.widest = max(*(r.vocabulary for r in self._readers), *(t.widest for t in self._members), 0)
        self.positions = min((reader.positions for reader in self._readers if reader.positions), default=None)
        self.layers = sum(reader.layers for reader in self._readers)
        self.position_bytes = sum(reader.position_bytes for reader in every)

    @contextmanager
    def patched_attention(self) -> Iterator[None]:
        with ExitStack() as stack:
            for reader in [*self._readers, *(t.reader for t in self._members)]:
                stack.enter_context(reader.patched_attention())
            yield

    def excess(self, tokens: Sequence[int], new: int) -> int:
        """By how many tokens of its own a text, given in the pivot's tokens, and `new` more exceed the context of the
        member with another tokenizer that they exceed most; 0 or less where they fit all.
        """
        limited = [(member, member.reader.positions) for member in self._members if member.reader.positions]
        return max((len(member.encode([tokens])[0]) + new - most for member, most in limited), default=0)

    @contextmanager
    def prefixes_as_given(self) -> Iterator[None]:
        """Inside the block a member reads its bos where the pivot's tokens begin with a control token, and only there.

        Outside, members whose tokenizer puts a bos before any text do so.
        """
        before = [member.adds_prefix for member in self._members]
        for member in self._members:
            member.adds_prefix = False
        try:
            yield
        finally:
            for member, adds in zip(self._members, before, strict=True):
                member.adds_prefix = adds

    def read(self, branchings: Sequence[Branching | PrefixTree], wanted: Sequence[Sequence[int]]) -> Tensor:
        return self._with_others(super().read(branchings, wanted), branchings, wanted)[0]

    def prefill(
        self, branchings: Sequence[Branching | PrefixTree], wanted: Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, list[CachedPrefix]]:
        wanted = wanted or [[len(branching.tokens) - 1] for branching in branchings]
        logits, cached_prefixes = super().prefill(branchings, wanted)
        logits, read = self._with_others(logits, branchings, wanted)
        return logits, [
            CachedPrefix(s.length, s.keys, s.values, s.tokens, tuple(r))
            for s, r in zip(cached_prefixes, read, strict=True)
        ]

    def step(self, groups: Sequence[DecodingBatch], tokens: Sequence[int]) -> Tensor:
        logits = super().step(groups, tokens)
        texts = [[text] for rows in groups for text in rows.tokens]
        read = [cached_prefixes for rows in groups for cached_prefixes in rows.member_prefixes]
        logits, new = self._joined(logits, texts, read)
        for cached_prefixes, now in zip(read, new, strict=True):
            cached_prefixes[:] = now
        return logits

    def _forward(self, tokens: Sequence[int], positions: Sequence[int], wanted: Sequence[int], shared: Any) -> Tensor:
        def parts() -> Iterator[Tensor]:
            first = 0
            for reader in self._readers:
                yield reader._forward(tokens, positions, wanted, LayerOffset(shared, first))[:, : self.vocabulary]
                first += reader.layers

        return mean(parts(), self._own, self._combine)

    def _with_others(
        self, logits: Tensor, branchings: Sequence[Branching | PrefixTree], wanted: Sequence[Sequence[int]]
    ) -> tuple[Tensor, list[list[CachedPrefix]]]:
        if not self._members:
            return logits, [[] for _ in branchings]
        texts = [[branching.text(i) for i in some] for branching, some in zip(branchings, wanted, strict=True)]
        started = [list(branching.cached.member_prefixes) if branching.cached else [] for branching in branchings]
        return self._joined(logits, texts, started)

    def _joined(
        self, logits: Tensor, texts: Sequence[Sequence[Sequence[int]]], started: Sequence[Sequence[CachedPrefix]]
    ) -> tuple[Tensor, list[list[CachedPrefix]]]:
        """The mean over all members after the texts, and the members' new cached prefixes, by group and member."""
        cached_prefixes: list[list[CachedPrefix]] = [[] for _ in texts]
        if not self._members:
            return logits, cached_prefixes

        def parts() -> Iterator[Tensor]:
            yield logits
            for number, member in enumerate(self._members):
                mapped, read = member.read(texts, [some[number] if some else None for some in started])
                for known, new in zip(cached_prefixes, read, strict=True):
                    known.append(new)
                yield mapped

        return mean(parts(), [self._share, *self._others]), cached_prefixes
