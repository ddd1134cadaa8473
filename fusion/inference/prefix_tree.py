"""Token sequences that share prefixes: a trunk with branches, a prefix tree, and the cached keys and values of a
prefix.

`fusion.inference.prefix_cache` computes the forward passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CachedPrefix:
    """Keys and values of a prefix that was computed once: one [H, L, D] a layer (H: key-value heads, L: its length in
    tokens).
    """

    length: int
    keys: list[Tensor]
    values: list[Tensor]
    tokens: tuple[int, ...] = ()
    """All tokens from the beginning of the text to the end of this prefix, also where it continues another prefix."""
    member_prefixes: "tuple[CachedPrefix, ...]" = ()
    """The same text as the models with other tokenizers have cached it (`fusion.inference.ensembles`)."""

    def then(self, other: "CachedPrefix") -> "CachedPrefix":
        """The concatenation of this prefix and the one that continues it."""
        keys, values = (
            [torch.cat(pair, 1) for pair in zip(ours, theirs, strict=True)]
            for ours, theirs in ((self.keys, other.keys), (self.values, other.values))
        )
        return CachedPrefix(self.length + other.length, keys, values, other.tokens, other.member_prefixes)

    def cut(self, length: int) -> "CachedPrefix":
        """The first `length` tokens of a prefix that continues no other."""
        keys, values = ([x[:, :length] for x in kept] for kept in (self.keys, self.values))
        return CachedPrefix(length, keys, values, self.tokens[:length])


@dataclass(frozen=True)
class Branching:
    """New tokens that continue a cached prefix: a trunk, then branches, each of which attends to prefix, trunk and
    itself.
    """

    trunk: Sequence[int]
    cached: CachedPrefix | None = None
    branches: Sequence[Sequence[int]] = ()
    tokens: list[int] = field(init=False)
    branch: list[int] = field(init=False)
    """Of every token: 0 in the trunk, else the number of its branch, from 1."""
    positions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        start = self.cached.length if self.cached else 0
        end = start + len(self.trunk)
        set_ = object.__setattr__
        set_(self, "tokens", [*self.trunk, *(t for branch in self.branches for t in branch)])
        set_(self, "branch", [0] * len(self.trunk) + [n for n, b in enumerate(self.branches, 1) for _ in b])
        set_(self, "positions", [*range(start, end), *(end + i for b in self.branches for i in range(len(b)))])

    def is_plain(self, window: int | None) -> bool:
        """True if every token attends to all tokens before it and there is nothing else, so that plain causal attention
        serves.
        """
        return self.cached is None and not self.branches and (window is None or len(self.tokens) <= window)

    def mask(self, window: int | None) -> Tensor:
        """bool[t, L + t]: which of the L cached and t new tokens each new token attends to, within a sliding window if
        given.
        """
        branch, n = torch.tensor(self.branch), torch.arange(len(self.tokens))
        own = (n[:, None] >= n) & ((branch == 0) | (branch[:, None] == branch))
        return _seen(own, self.cached, self.positions, window)

    def text(self, index: int) -> list[int]:
        """All tokens from the beginning of the text up to and including the new token `index`."""
        before = self.cached.tokens if self.cached else ()
        own = zip(self.tokens[: index + 1], self.branch, strict=False)
        return [*before, *(token for token, branch in own if branch in (0, self.branch[index]))]


@dataclass(frozen=True)
class PrefixTree:
    """Sequences that continue a cached prefix, stored as a tree in which common beginnings occur once; used like
    `Branching`.
    """

    sequences: Sequence[Sequence[int]]
    cached: CachedPrefix | None = None
    tokens: list[int] = field(init=False)
    parents: list[int] = field(init=False)
    """Of every token: the index of the token before it, -1 where that is the last of the cached prefix."""
    positions: list[int] = field(init=False)
    ends: list[int] = field(init=False)
    """Of every sequence: the index of its last token."""

    def __post_init__(self) -> None:
        tokens: list[int] = []
        parents: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        children: dict[tuple[int, int], int] = {}
        start = self.cached.length if self.cached else 0
        path: list[int] = []
        before: list[int] = []
        for sequence in map(list, self.sequences):
            # Most begin like the one before; those tokens need not be looked up one by one.
            path = path[: common_prefix_length(before, sequence)]
            for token in sequence[len(path) :]:
                parent = path[-1] if path else -1
                node = children.setdefault((parent, token), len(tokens))
                if node == len(tokens):
                    tokens.append(token)
                    parents.append(parent)
                    positions.append(start + len(path))
                path.append(node)
            ends.append(path[-1])
            before = sequence
        for name, value in (("tokens", tokens), ("parents", parents), ("positions", positions), ("ends", ends)):
            object.__setattr__(self, name, value)

    def text(self, index: int) -> list[int]:
        """All tokens from the beginning of the text up to and including the tree's token `index`."""
        return [*(self.cached.tokens if self.cached else ()), *(self.tokens[i] for i in self.path(index))]

    def path(self, index: int) -> list[int]:
        """The indices of the tokens from the cached prefix to the token `index`, in order."""
        found = [index]
        while self.parents[found[-1]] >= 0:
            found.append(self.parents[found[-1]])
        return found[::-1]

    def is_plain(self, window: int | None) -> bool:
        """True if the tree is a single chain without a cached prefix, so that plain causal attention serves."""
        n = len(self.tokens)
        return self.cached is None and self.parents == list(range(-1, n - 1)) and (window is None or n <= window)

    def mask(self, window: int | None) -> Tensor:
        """bool[t, L + t]: which of the L cached and t tree tokens each of the tree's tokens attends to."""
        own = np.eye(len(self.tokens), dtype=bool)
        for token, parent in enumerate(self.parents):
            if parent >= 0:
                own[token, : parent + 1] = own[parent, : parent + 1]
        return _seen(torch.from_numpy(own), self.cached, self.positions, window)


def _seen(own: Tensor, cached: CachedPrefix | None, positions: Sequence[int], window: int | None) -> Tensor:
    """bool[t, L + t] from own[t, t]: the whole cached prefix is visible, and only what the sliding window reaches."""
    at, before = torch.tensor(positions), torch.arange(cached.length if cached else 0)
    seen = torch.cat([torch.ones(len(at), len(before), dtype=torch.bool), own], 1)
    if window is not None:
        seen &= at[:, None] - torch.cat([before, at]) < window
    return seen


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that two sequences of one type have in common at their beginning."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # slices are compared at once; alike up to low, not up to high
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
