"""Decoding many sequences at once: common prefixes are computed once, finished sequences make room."""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusion.inference.prefix_cache import DecodingBatch, PrefixCachedModel
from fusion.inference.prefix_tree import Branching, common_prefix_length

_TOP = 64  # of the likeliest tokens that a draw looks at first
MIN_SHARED_TOKENS = 16  # a shorter common prefix is not worth caching

Choose = Callable[[Sequence[int], Tensor], Sequence[int | None]]
"""choose(numbers of n sequences, logits[n, V]) -> the next token of each, None where it has ended."""


def group_by_prefix(sequences: Sequence[Sequence[int]]) -> list[tuple[int, list[int]]]:
    """Groups of sequences with a common prefix: (length of the prefix in tokens, sequence numbers), in lexicographic
    order.

    A sequence joins the current group when it shares at least half of the group's prefix. The last token never belongs
    to the prefix, since its successor is to be predicted. A group whose prefix is too short to be cached has length 0.
    """
    found: list[tuple[int, list[int]]] = []
    for number in sorted(range(len(sequences)), key=lambda i: tuple(sequences[i])):
        sequence = sequences[number]
        if found:
            common, members = found[-1]
            shared = min(common_prefix_length(sequences[members[0]], sequence), common, len(sequence) - 1)
            if shared >= MIN_SHARED_TOKENS and 2 * shared >= common:
                found[-1] = shared, [*members, number]
                continue
        found.append((len(sequence) - 1, [number]))
    return [(common if len(members) > 1 else 0, members) for common, members in found]


def pack_consecutive(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive indices whose `sizes` add up to at most `limit`; a larger one is alone in its pack."""
    found: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not found or size > room:
            found.append([])
            room = limit
        found[-1].append(index)
        room -= size
    return found


@dataclass(eq=False)
class _PrefixGroup:
    """Sequences that continue one cached prefix; `members` and `tokens` are those being decoded, in the order of
    `rows`.
    """

    common: int
    size: int
    rows: DecodingBatch | None = None
    members: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    """The last token of each sequence, whose successor the next step predicts."""

    def prefill(self, reader: PrefixCachedModel, prompt: Sequence[int], room: int) -> DecodingBatch:
        """The decoding batch; the common prefix is computed when the first sequence of the group is admitted."""
        if self.rows is None:
            cached = reader.prefill([Branching(prompt[: self.common])])[1][0] if self.common else None
            self.rows = DecodingBatch(cached, min(room, self.size))
        return self.rows

    def settle(self, chosen: Sequence[int | None]) -> None:
        """Appends the chosen tokens in the order of the sequences; sequences that have ended are removed."""
        assert self.rows is not None
        for row in reversed(range(len(chosen))):
            token = chosen[row]
            if token is not None:
                self.tokens[row] = token
                continue
            self.rows.drop(row)
            self.members[row], self.tokens[row] = self.members[-1], self.tokens[-1]
            self.members.pop()
            self.tokens.pop()
            self.size -= 1
        if not self.size:  # its memory is needed for others
            self.rows = None


def decode(
    reader: PrefixCachedModel, prompts: Sequence[Sequence[int]], choose: Choose, *, rows: int, batch_tokens: int
) -> None:
    """Continues every prompt until `choose` ends it; at most `rows` at once, the longest of a group first.

    `batch_tokens` bounds the prompt tokens of one call. A sequence's logits do not depend on the others, except for
    rounding.
    """
    alone = _PrefixGroup(0, 0)  # what has nothing in common with anything is one family, too
    waiting: deque[tuple[_PrefixGroup, int]] = deque()
    for common, members in group_by_prefix(prompts):
        family = _PrefixGroup(common, 0) if common else alone
        family.size += len(members)
        waiting += [(family, m) for m in sorted(members, key=lambda m: (-len(prompts[m]), m))]
    under_way: list[_PrefixGroup] = []
    with reader.patched_attention():
        while waiting or under_way:
            free = rows - sum(len(f.members) for f in under_way)
            if waiting and (not under_way or 4 * free >= rows):
                some = [waiting.popleft() for _ in range(min(free, len(waiting)))]
                under_way += [f for f in dict.fromkeys(f for f, _ in some) if f not in under_way]
                _admit(reader, prompts, choose, some, rows, batch_tokens)
            groups = [(f, f.rows) for f in under_way if f.rows is not None and f.members]
            if groups:
                logits = reader.step([r for _, r in groups], [t for f, _ in groups for t in f.tokens])
                chosen = choose([m for f, _ in groups for m in f.members], logits)
                start = 0
                for family, group in groups:
                    n = len(group)
                    family.settle(chosen[start : start + n])
                    start += n
            under_way = [f for f in under_way if f.members]


def _admit(
    reader: PrefixCachedModel,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    some: Sequence[tuple[_PrefixGroup, int]],
    room: int,
    batch_tokens: int,
) -> None:
    """Computes the prompts of some sequences after their common prefixes and chooses their first tokens."""
    for pack in pack_consecutive([len(prompts[number]) - family.common for family, number in some], batch_tokens):
        part = [(*some[i], some[i][0].prefill(reader, prompts[some[i][1]], room)) for i in pack]
        branchings = [Branching(prompts[number][family.common :], rows.cached) for family, number, rows in part]
        logits, started = reader.prefill(branchings)
        chosen = choose([number for _, number, _ in part], logits)
        for (family, number, rows), row, token in zip(part, started, chosen, strict=True):
            if token is None:
                family.size -= 1
            else:
                rows.add(row)
                family.members.append(number)
                family.tokens.append(token)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a sequence are drawn; 0 as `top_k` and 1 as `top_p` leave nothing out."""

    temperature: float
    top_k: int
    top_p: float
    generator: random.Random = field(compare=False)
    """The sequence's own generator, so that what is drawn depends on no other sequence."""


def draw(sequences: Sequence[Sampling], logits: Tensor) -> list[int]:
    """One token for each of n sequences from logits[n, V]: temperature, then top k, then top p, as transformers do."""
    chances = [sequence.generator.random() for sequence in sequences]
    by_settings: dict[Sampling, list[int]] = {}
    for number, sequence in enumerate(sequences):
        by_settings.setdefault(sequence, []).append(number)
    tokens = [0] * len(sequences)
    for settings, numbers in by_settings.items():
        uniform = torch.tensor([chances[n] for n in numbers], dtype=torch.float64, device=logits.device)
        n_top = settings.top_k or _TOP
        while numbers:  # few tokens are needed where the model is sure
            found, enough = _draw(settings, logits[numbers], uniform, n_top)
            for number, token, known in zip(numbers, found, enough, strict=True):
                if known:
                    tokens[number] = token
            uniform = uniform[[i for i, known in enumerate(enough) if not known]]
            numbers = [number for number, known in zip(numbers, enough, strict=True) if not known]
            n_top *= 8
    return tokens


def _draw(settings: Sampling, logits: Tensor, uniform: Tensor, n_top: int) -> tuple[list[int], list[bool]]:
    """The tokens that float64 uniform[n] in [0, 1) picks among the `n_top` likeliest of logits[n, V].

    The second list is False where these do not suffice for top p.
    """
    vocabulary = logits.shape[1]
    top = logits.topk(min(n_top, vocabulary))
    scaled = top.values.double() / settings.temperature
    whole = scaled.logsumexp(-1)
    n_rest = 0 if settings.top_k else max(vocabulary - n_top, 0)
    # The rest is at most as likely as the last of these; where that is nothing it needs not be summed.
    summed = n_rest * (scaled[:, -1] - scaled[:, 0]).exp() >= 1e-9
    if bool(summed.any()):
        whole = torch.where(summed, (logits.double() / settings.temperature).logsumexp(-1), whole)
    p = (scaled - whole[:, None]).exp()
    before = p.cumsum(-1) - p
    kept = torch.where(before < settings.top_p, p, 0).cumsum(-1)
    # The likeliest first: rounding in the sum of the unlikely ones moves no draw.
    drawn = torch.searchsorted(kept, uniform[:, None] * kept[:, -1:], right=True)
    drawn = drawn.minimum((before < settings.top_p).sum(-1, keepdim=True) - 1)
    enough = torch.full_like(uniform, not n_rest, dtype=torch.bool) | (p.sum(-1) >= settings.top_p)
    tokens, known = torch.stack([top.indices.gather(1, drawn)[:, 0], enough.long()]).tolist()
    return tokens, [bool(one) for one in known]
