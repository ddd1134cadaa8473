"""Byte-prefix marginalisation: what a teacher says of the next bytes, over the target's tokens (arXiv 2607.22334)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from fusion.alignment.fuse import Source, stored_entries
from fusion.alignment.path import text_ends
from fusion.alignment.projection import true_token_last
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary

MOST_CANDIDATES = 8
"""Greatest number of tokens in a chain, as in the published code."""
CERTAIN = 1e-6
"""Greatest unknown part of a distribution that counts as nothing."""


class Targets(NamedTuple):
    """Distributions over the target's tokens at the N target positions of a sequence."""

    ids: np.ndarray
    """int32[N, K], -1 pads."""
    p: np.ndarray
    """float64[N, K]."""
    tail: np.ndarray
    """float64[N], the probability that belongs to no token."""
    trained: np.ndarray
    """bool[N], true where there is a distribution to learn."""
    forced: np.ndarray
    """bool[N], true where only the true next token can follow."""


class BytePrefixTargets:
    """The rule for one teacher.

    At a target position that ends at byte a, with next token up to byte e, let the teacher's token k cover byte a.
    Where k begins at a, the target token of a teacher's token is the longest one that its bytes begin with (equations 3
    and 4). Where a is inside k, tokens that begin with the bytes of k before a count, divided by the probability of all
    these, each as the longest target token of its further bytes, of which no more count than k has left (equation 5).
    Such a position is left out if k ends at a byte where no target token does, unless the next token goes on beyond k.
    Tokens of the target that go on beyond k are written by the text itself: each gets, by the chain rule over the
    teacher's tokens, the probability of its bytes, which the token that begins like k loses (equation 6).
    """

    def __init__(self, teacher: Source, target: Vocabulary, chain: bool, skip_spaces: bool) -> None:
        self._teacher, self._target, self._chain, self._skip_spaces = teacher, target, chain, skip_spaces
        named = set(teacher.map.tolist())  # of tokens with the same bytes the one that the target's tokenizer writes
        order = sorted(range(len(target)), key=lambda i: (i in named, i not in target.byte_fallback, -i))
        self._ids = {token: i for i in order if (token := target.token_bytes[i])}
        self._longest = max(map(len, self._ids), default=0)
        self._images: dict[bytes, int] = {}

    def __call__(self, teacher: Sequence[Predictions], target: Sequence[Predictions]) -> Targets:
        """The distributions at the target's positions in the passages of a sequence."""
        rows: list[tuple[dict[int, float], bool] | None] = []
        for read, own in zip(teacher, target, strict=True):
            rows += [None] * len(own.tokens) if read.skipped else self._passage(read, own)
        width = max((len(row[0]) for row in rows if row is not None), default=1) or 1
        ids, p = np.full((len(rows), width), -1, np.int32), np.zeros((len(rows), width))
        for i, row in enumerate(rows):
            if row is not None:
                ids[i, : len(row[0])], p[i, : len(row[0])] = list(row[0]), list(row[0].values())
        trained = np.array([row is not None for row in rows])
        tail = np.where(trained, np.maximum(1 - p.sum(1), 0), 0)
        return Targets(ids, p, tail, trained, np.array([row is not None and row[1] for row in rows]))

    def _image(self, text: bytes) -> int:
        """The longest target token that the bytes begin with, -1 for none."""
        if text not in self._images:
            lengths = range(min(len(text), self._longest), 0, -1)
            self._images[text] = next((self._ids[text[:n]] for n in lengths if text[:n] in self._ids), -1)
        return self._images[text]

    def _passage(self, read: Predictions, own: Predictions) -> list[tuple[dict[int, float], bool] | None]:
        ids, p = stored_entries("teacher", [{"teacher": read}])
        ids, p = true_token_last(ids, p, np.append(read.tokens[1:], -1), read.nll)
        spelled, words = self._teacher.vocabulary.token_bytes, self._target.token_bytes
        ends, own_ends = (text_ends(one, v) for one, v in ((read, self._teacher.vocabulary), (own, self._target)))
        n_read, n_own = (len(list(takewhile(lambda end: end >= 0, x.tolist()))) for x in (ends, own_ends))
        first_prefix = np.cumsum([0, *(max(len(spelled[t] or b"") - 1, 0) for t in read.tokens[1:].tolist())])
        text = b"".join(words[t] or b"" for t in own.tokens[1:n_own].tolist())
        start, shared = int(own_ends[0]), {*own_ends[:n_own].tolist()}

        def begins(j: int, n: int) -> float:
            """The probability at j of all tokens that begin with the first n bytes of the one that follows."""
            if n == 0:
                return 1.0
            token = spelled[read.tokens[j + 1]] or b""
            if read.prefix_nll is not None and n < len(token):  # of all its bytes, only what is kept is known
                return math.exp(-float(read.prefix_nll[first_prefix[j] + n - 1]))
            alike = [t >= 0 and (spelled[t] or b"").startswith(token[:n]) for t in ids[j].tolist()]
            return float(p[j][alike].sum())

        rows: list[tuple[dict[int, float], bool] | None] = [None] * len(own.tokens)
        j = 0
        for i in range(n_own - 1):
            a, e = int(own_ends[i]), int(own_ends[i + 1])
            while j + 1 < n_read and ends[j + 1] <= a:
                j += 1
            gold = words[own.tokens[i + 1]] or b""
            if j + 1 >= n_read or ends[j] > a or (self._skip_spaces and not gold.strip(b" \t")) or e == a:
                continue
            cs, ce = int(ends[j]), int(ends[j + 1])
            n = a - cs
            if n > 0 and e <= ce and ce not in shared:
                continue
            true = spelled[read.tokens[j + 1]] or b""
            rho, q, known, mass = true[:n], dict[int, float](), 0.0, begins(j, n)
            for t, value in zip(ids[j].tolist(), p[j].tolist(), strict=True):
                token = spelled[t] if t >= 0 else None
                if t < 0 or (n > 0 and not (token or b"").startswith(rho)):
                    continue
                known += value
                image = int(self._teacher.map[t]) if token is None else self._image(token[n : ce - cs] if n else token)
                if image >= 0:
                    q[image] = q.get(image, 0.0) + value
            mass = max(mass, known, 1e-30)
            q = {image: value / mass for image, value in q.items() if value > 0}
            forced = n > 0 and e <= ce and set(q) == {int(own.tokens[i + 1])} and known >= mass * (1 - CERTAIN)
            if self._chain and (n == 0 or e > ce):
                head, ahead, first, covered = self._image(true[n:]), text[a - start :], j + 1, ce - a
                previous = 0.0
                for length in reversed(self._beyond(ahead, covered, len(gold))):
                    share, at, left = math.exp(-float(read.nll[j])) / mass, first, length - covered
                    while at + 1 < n_read and left > ends[at + 1] - ends[at]:
                        share *= math.exp(-float(read.nll[at]))
                        at, left = at + 1, left - int(ends[at + 1] - ends[at])
                    share *= begins(at, left) if at + 1 < n_read else 0.0
                    # What a longer one has is a part of it.
                    token = self._ids[ahead[:length]]
                    q[token] = q.get(token, 0.0) + share - previous
                    previous = share
                if head in q:
                    q[head] = max(q[head] - previous, 0.0)
            rows[i] = ({int(own.tokens[i + 1]): 1.0} if forced else q, forced)
        return rows

    def _beyond(self, text: bytes, covered: int, true: int) -> list[int]:
        """The lengths of target tokens that the text begins with and that are longer than `covered`, at most eight.

        `true`, the length of the token that really follows, is among them where it is one.
        """
        lengths = [n for n in range(covered + 1, min(len(text), self._longest) + 1) if text[:n] in self._ids]
        if true in lengths[MOST_CANDIDATES:]:
            return [*lengths[: MOST_CANDIDATES - 1], true]
        return lengths[:MOST_CANDIDATES]
