"""Token healing: the tokens of a model that cover the end of a text, and their continuations in the pivot's tokens.

A text in the pivot's tokens ends where one of these ends. Another tokenizer would often have put that place inside a
longer token; cut off there, the model predicts what follows the shorter tokens, which is a different distribution. The
longer tokens are therefore counted as well: each at the position where it would begin, for the part of it that lies
beyond the end (Phan et al. 2024, arXiv 2410.09303; Vieira et al. 2024, arXiv 2412.03719).
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import EncodeTexts, written_ids

MOST = 2  # of a model's last tokens that a longer one may begin with; a third changed nothing that was measured
_KEPT = 4096  # ends whose covering tokens are remembered
_BEFORE = "\n"  # what a pivot with a dummy prefix is given before a text, so that the text itself gets no space

CoveringTokens = tuple[Tensor, Tensor]
"""int64[C] tokens of the model, and int64[C] the pivot's tokens that would come next, were the text to go on so."""


class TokenHealing:
    """The tokens of a model that begin with a text's last bytes and extend beyond them, in agreement with the pivot's
    tokens.

    A token does not count where the pivot would have written the extended text with other tokens than the text has:
    then the text is known to continue differently.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        pivot: Vocabulary,
        encode_pivot: EncodeTexts,
        *,
        most: int = MOST,
        device: torch.device | None = None,
    ) -> None:
        """`encode_pivot`: the pivot's tokens of texts, without special tokens; `most`: see `MOST`, 0 for no healing."""
        self.most = most
        self._own = vocabulary.token_bytes
        self._pivot = pivot
        self._encode = encode_pivot
        self._device = device
        spelled = sorted((spelling, i) for i, spelling in enumerate(self._own) if spelling)
        self._spellings, self._ids = [spelling for spelling, _ in spelled], [i for _, i in spelled]
        self._spelling = {i: spelling for i, spelling in enumerate(pivot.token_bytes) if spelling}
        written = np.flatnonzero(written_ids(pivot, encode_pivot)).tolist()
        self._by_bytes = {self._spelling[i]: i for i in reversed(written)}
        self._longest = max(map(len, self._by_bytes), default=0)
        self._none = (torch.zeros(0, dtype=torch.long, device=device),) * 2
        self._cover = lru_cache(_KEPT)(self._find)

    def covering_tokens(self, own: Sequence[int], text: Sequence[int]) -> list[CoveringTokens]:
        """For a text in the model's and in the pivot's tokens: the tokens that cover the model's last 1, 2, ... tokens.

        The list is as long as there are covering tokens. The search stops at a control token and where the model's
        tokens do not spell the text; at least one token always remains before the covered ones, since its distribution
        gives their probability.
        """
        found: list[CoveringTokens] = []
        end, known, tail = b"", b"", 0
        for back in range(1, min(self.most, len(own) - 1) + 1):
            spelling = self._own[own[-back]]
            if spelling is None:
                break
            end = spelling + end
            while len(known) < len(end) and tail < len(text):
                before = self._pivot.token_bytes[text[-1 - tail]]
                if before is None:
                    break
                known, tail = before + known, tail + 1
            if not end or not known.endswith(end):
                break
            # Most long ends are covered by nothing, and not worth remembering.
            found.append(self._cover(tuple(text[len(text) - tail :]), end) if len(self._range(end)) else self._none)
        while found and not len(found[-1][0]):
            found.pop()
        return found

    def _find(self, tail: tuple[int, ...], end: bytes) -> CoveringTokens:
        """The tokens that extend `end`, where the pivot's last tokens are `tail` and spell it."""
        covering = self._range(end)
        known = b"".join(self._pivot.token_bytes[i] or b"" for i in tail)
        rests = list(dict.fromkeys(self._spellings[n][len(end) :] for n in covering))
        following = dict(zip(rests, self._following(tail, known, rests), strict=True))
        pairs = [
            (self._ids[n], onto) for n in covering if (onto := following[self._spellings[n][len(end) :]]) is not None
        ]
        ids, onto = torch.tensor(pairs, dtype=torch.long, device=self._device).reshape(-1, 2).T.contiguous()
        return ids, onto

    def _range(self, end: bytes) -> range:
        """The index range, in byte order, of the tokens that begin with `end` and extend beyond it."""
        first = bisect_right(self._spellings, end)
        return range(first, bisect_right(self._spellings, end, lo=first, key=lambda spelling: spelling[: len(end)]))

    def _following(self, tail: tuple[int, ...], known: bytes, rests: Sequence[bytes]) -> list[int | None]:
        """The pivot's token after `tail` (which spells `known`) when it encodes `known` plus each of the rests."""
        before = _BEFORE if self._pivot.dummy_prefix else ""
        texts = [_text(known + rest) for rest in (b"", *rests)]
        written = iter(self._encode([before, *(before + text for text in texts if text is not None)]))
        start = next(written)
        by_text = [next(written) if text is not None else None for text in texts]
        expected = [*start, *tail]
        # Its tokenizer can be asked where it writes what is known, taken by itself, as it is.
        asked = by_text[0] == expected
        found: list[int | None] = []
        for rest, ids in zip(rests, by_text[1:], strict=True):
            stays = ids is None or ids[: len(expected)] == expected
            if known + rest in self._by_bytes or (asked and not stays):  # it may never write a token that it has
                found.append(None)
                continue
            following = ids[len(expected) :] if asked and ids is not None else []
            begins = following and following[0] in self._spelling and rest.startswith(self._spelling[following[0]])
            found.append(following[0] if begins else self._by_length(tail, known, rest))
        return found

    def _by_length(self, tail: tuple[int, ...], known: bytes, rest: bytes) -> int | None:
        """The same without the pivot's tokenizer, by assuming its longest token."""
        starts = accumulate((len(self._pivot.token_bytes[i] or b"") for i in tail[:-1]), initial=0)
        whole = known + rest
        longer = range(len(known) + 1, len(whole) + 1)
        if any(whole[start:stop] in self._by_bytes for start in starts for stop in longer):
            return None
        lengths = range(min(len(rest), self._longest), 0, -1)
        return next((self._by_bytes[rest[:n]] for n in lengths if rest[:n] in self._by_bytes), None)


def _text(spelled: bytes) -> str | None:
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return None
