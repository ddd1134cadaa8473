"""FuseLLM once more, in the order and the words of the method: dense, float64, a passage at a time, slow.

Nothing here comes from the packages under test; transformers alone, which gives tokens and logits, is shared. It is
there to be compared with, and prefers the plainest statement of each rule to the fastest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROLES = ("eos", "bos", "pad", "unk")


@dataclass(frozen=True)
class Reader:
    """A model with its tokenizer; `mark` is how the tokenizer writes a space, `dummy` whether it puts one before."""

    name: str
    tokenizer: Any
    model: Any
    mark: str
    dummy: bool

    @classmethod
    def load(cls, name: str, folder: Path, mark: str, dummy: bool) -> "Reader":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        return cls(name, tokenizer, AutoModelForCausalLM.from_pretrained(folder).double().eval(), mark, dummy)

    @property
    def size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def prefix(self) -> int:
        """bos, else eos."""
        bos: int | None = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    @property
    def controls(self) -> dict[int, str]:
        """The control tokens and the role of each."""
        return {
            i: role for role in reversed(ROLES) if (i := getattr(self.tokenizer, f"{role}_token_id", None)) is not None
        }

    def strings(self) -> list[str | None]:
        """The string of every id; None for a row of the model that the tokenizer has no token for."""
        return [self.tokenizer.convert_ids_to_tokens(i) for i in range(self.size)]

    def bytes(self) -> list[bytes | None]:
        """What every id writes; None for control tokens and for ids without a token."""
        alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
        spelled: list[bytes | None] = []
        for i, string in enumerate(self.strings()):
            if string is None or i in self.controls:
                spelled.append(None)
            elif self.mark == "Ġ":
                literal = not set(string) <= set(alphabet)
                spelled.append(string.encode() if literal else bytes(alphabet[c] for c in string))
            elif self.is_byte(string):
                spelled.append(bytes([int(string[3:5], 16)]))
            else:
                spelled.append(string.replace(self.mark, " ").encode())
        return spelled

    def is_byte(self, string: str | None) -> bool:
        """Whether this is a byte-fallback token, <0x41>."""
        return self.mark != "Ġ" and string is not None and len(string) == 6 and string.startswith("<0x")

    def writes(self, i: int, spelled: "bytes | None") -> bool:
        """Whether the tokenizer writes the id for its bytes in a text; it cannot be asked for parts of a character."""
        sentinel = "\n" if self.dummy else ""
        try:
            before, whole = (self.tokens(text)[1:] for text in (sentinel, sentinel + (spelled or b"").decode()))
        except UnicodeDecodeError:
            return True
        return spelled is not None and whole == [*before, i]

    def tokens(self, text: str) -> list[int]:
        return [self.prefix, *self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def log_q(self, tokens: Sequence[int]) -> torch.Tensor:
        """Dense log-probabilities [M, V] of what follows each of M tokens, with their gradient."""
        logits: torch.Tensor = self.model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
        return logits.log_softmax(-1)

    def ends(self, tokens: Sequence[int], text: str) -> list[int]:
        """The byte at which every token ends; -1 from the first on that does not spell the text."""
        spelled, ends = b"", [0]
        whole = (b" " if self.dummy else b"") + text.encode()
        by_id = self.bytes()
        for token in tokens[1:]:
            spelled += by_id[token] or b""
            same = by_id[token] is not None and whole.startswith(spelled) and ends[-1] >= 0
            ends.append(len(spelled) - self.dummy if same else -1)
        return ends


@dataclass(frozen=True)
class Read:
    """A passage as one model reads it: M tokens, the top k at each and the rest, and the summed nats of all but the
    prefix.
    """

    tokens: list[int]
    top_ids: np.ndarray
    top_log_p: np.ndarray
    tail: np.ndarray
    nats: float


@dataclass(frozen=True)
class ExpectedTargets:
    """What the target is to learn from M positions: p[M, V] and `tail`[M] outside, where `weight`[M] is 1."""

    p: np.ndarray
    tail: np.ndarray
    weight: np.ndarray
    partner: list[int]
    """The chosen model's positions, -1 where it has none; for the test's own checks."""


@cache
def levenshtein(a: str | bytes, b: str | bytes) -> int:
    """The number of insertions, deletions and replacements between two sequences."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def map_of_strings(source: Reader, target: Reader, kind: str) -> dict[int, int]:
    """Identical string first (the space mark replaced), else, for MinED, the nearest; ties to the lowest id."""
    others = [(i, string) for i, string in enumerate(target.strings()) if string is not None]
    by_string = {string: i for i, string in reversed(others)}
    found = {}
    for i, string in enumerate(source.strings()):
        if string is None:
            continue
        string = string.replace(source.mark, target.mark)
        if string in by_string:
            found[i] = by_string[string]
        elif kind == "mined":
            found[i] = min(others, key=lambda other: (levenshtein(string, other[1]), other[0]))[0]
    return found


def map_of_bytes(source: Reader, target: Reader, kind: str) -> dict[int, int]:
    """The same on bytes: ordinary tokens before byte-fallback ones, control tokens by role and never from text."""
    strings = target.strings()
    others = [
        (target.is_byte(strings[i]), i, spelled)
        for i, spelled in enumerate(target.bytes())
        if target.writes(i, spelled)
    ]
    by_bytes = {spelled: i for _, i, spelled in sorted(others, reverse=True)}
    roles = {role: getattr(target.tokenizer, f"{role}_token_id", None) for role in ROLES}
    found = {i: roles[role] for i, role in source.controls.items() if roles[role] is not None}
    for i, spelled in enumerate(source.bytes()):
        if spelled is None:
            continue
        if spelled in by_bytes:
            found[i] = by_bytes[spelled]
        elif kind == "mined":
            found[i] = min(others, key=lambda other: (levenshtein(spelled, other[2]), other[0], other[1]))[1]
    return found


def warping_path(source: Sequence[str], target: Sequence[str]) -> list[list[int]]:
    """For each target position the source positions that dynamic time warping pairs with it."""
    total = np.full((len(source) + 1, len(target) + 1), np.inf)
    total[0, 0] = 0
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            total[i + 1, j + 1] = levenshtein(a, b) + min(total[i, j], total[i, j + 1], total[i + 1, j])
    total = total[1:, 1:]
    paired: list[list[int]] = [[] for _ in target]
    i, j = len(source) - 1, len(target) - 1
    paired[j].append(i)
    while i > 0 or j > 0:
        diagonal = total[i - 1, j - 1] if i and j else np.inf
        up = total[i - 1, j] if i else np.inf
        left = total[i, j - 1] if j else np.inf
        move = int(np.argmin([diagonal, up, left]))
        i, j = i - (move != 2), j - (move != 1)
        paired[j].append(i)
    return paired


def published_partners(
    source: Reader, target: Reader, theirs: Sequence[int], ours: Sequence[int], vocabulary_map: Mapping[int, int]
) -> list[int]:
    """One to one on the warping path, and strings equal or mapped onto each other; the two prefixes are a pair."""
    strings, target_strings = source.strings(), target.strings()
    spelled = [strings[i] or "" for i in theirs[1:]]
    wanted = [target_strings[i] or "" for i in ours[1:]]
    paired = warping_path([s.replace(source.mark, "") for s in spelled], [t.replace(target.mark, "") for t in wanted])
    partners = [0]
    for i, (candidates, want) in enumerate(zip(paired, wanted, strict=True)):
        partners.append(-1)
        if len(candidates) != 1:
            continue
        (j,) = candidates
        string = spelled[j]
        if i == 0 and source.mark == "Ġ" and want.startswith(target.mark) and not string.startswith(source.mark):
            string = source.mark + string
        image = vocabulary_map.get(strings.index(string)) if string in strings else None
        if string.replace(source.mark, target.mark) == want or image == ours[1 + i]:
            partners[-1] = 1 + j
    return partners


def corrected_partners(source: Reader, target: Reader, theirs: Read, ours: Read, text: str) -> list[int]:
    """Of the positions whose text before ends at one byte, the last of each side."""
    ends, own = source.ends(theirs.tokens, text), target.ends(ours.tokens, text)
    return [
        max((j for j, other in enumerate(ends) if other == end and end >= 0 and end not in own[i + 1 :]), default=-1)
        for i, end in enumerate(own)
    ]


def adds_space(reader: Reader, read: Read, text: str, position: int) -> bool:
    """Whether the token after a position begins with a space that the tokenizer puts before the text."""
    if not reader.dummy or position + 1 >= len(read.tokens):
        return False
    ends, spelled = reader.ends(read.tokens, text), reader.bytes()[read.tokens[position + 1]]
    return spelled is not None and ends[position + 1] >= 0 and len(spelled) > ends[position + 1] - ends[position]


def respaced(source: Reader, vocabulary_map: Mapping[int, int], added: int) -> dict[int, int]:
    """The map of the source's tokens with a space put before them (1), or taken away (-1)."""
    by_bytes = {spelled: i for i, spelled in reversed(list(enumerate(source.bytes()))) if spelled}
    found = {}
    for i, spelled in enumerate(source.bytes()):
        form = spelled
        if spelled is not None and added:
            form = b" " + spelled if added > 0 else spelled[1:] if spelled.startswith(b" ") else b""
        other = i if form == spelled else by_bytes.get(form or b"")
        if other in vocabulary_map:
            found[i] = vocabulary_map[other]
    return found


def published_distribution(
    read: Read, partner: int, vocabulary_map: Mapping[int, int], own: np.ndarray | None, current: int, size: int
) -> np.ndarray:
    """p[V]: the entries in order, the first of duplicates, softmax over those left."""
    p = np.zeros(size)
    if partner < 0:
        p[current] = 1
        return p
    kept: dict[int, float] = {}
    for i, log_p in zip(read.top_ids[partner].tolist(), read.top_log_p[partner].tolist(), strict=True):
        if i in vocabulary_map and vocabulary_map[i] not in kept:
            kept[vocabulary_map[i]] = log_p
    if not kept:
        assert own is not None
        return own
    scores = np.array(list(kept.values()))
    p[list(kept)] = np.exp(scores) / np.exp(scores).sum()
    return p


def corrected_distribution(
    read: Read, partner: int, vocabulary_map: Mapping[int, int], gold: int | None, size: int
) -> tuple[np.ndarray, float]:
    """p[V] and tail: probabilities, duplicates summed, what maps to nothing in the tail."""
    p = np.zeros(size)
    if partner < 0:
        if gold is not None:
            p[gold] = 1
        return p, 0.0
    for i, log_p in zip(read.top_ids[partner].tolist(), read.top_log_p[partner].tolist(), strict=True):
        if i in vocabulary_map:
            p[vocabulary_map[i]] += np.exp(log_p)
    p /= np.exp(read.top_log_p[partner]).sum() + read.tail[partner]  # stored rounded, each for itself
    return p, max(1 - p.sum(), 0)


def published_row(
    texts: Sequence[str],
    target: Reader,
    source: Reader,
    ours: Sequence[Read],
    theirs: Sequence[Read],
    vocabulary_map: Mapping[int, int],
    fusion: str,
) -> list[ExpectedTargets]:
    """What a row of passages teaches under `published`."""
    itself = {i: i for i in range(target.size)}
    rewards = []
    for reads in (ours, theirs):
        tokens = sum(len(read.tokens) - 1 for read in reads)
        mean = torch.tensor(sum(read.nats for read in reads) / tokens, dtype=torch.bfloat16)
        rewards.append(torch.exp(-mean))
    weights = torch.stack(rewards).double().softmax(0).numpy()
    choice = int(torch.stack(rewards).argmax())  # ties by order
    expected = []
    for own, read in zip(ours, theirs, strict=True):
        positions = range(len(own.tokens))
        partners = published_partners(source, target, read.tokens, own.tokens, vocabulary_map)
        members = [np.stack([published_distribution(own, i, itself, None, -1, target.size) for i in positions])]
        members.append(
            np.stack(
                [
                    published_distribution(read, partners[i], vocabulary_map, members[0][i], own.tokens[i], target.size)
                    for i in positions
                ]
            )
        )
        p = members[choice] if fusion == "mince" else weights[0] * members[0] + weights[1] * members[1]
        chosen = list(positions) if (fusion, choice) == ("mince", 0) else partners
        expected.append(ExpectedTargets(p, np.zeros(len(p)), np.ones(len(p)), chosen))  # every position, the last too
    return expected


def corrected_row(
    texts: Sequence[str],
    target: Reader,
    source: Reader,
    ours: Sequence[Read],
    theirs: Sequence[Read],
    vocabulary_map: Mapping[int, int],
    fusion: str,
) -> list[ExpectedTargets]:
    """What a row of passages teaches under `corrected`."""
    itself = {i: i for i in range(target.size)}
    expected = []
    for text, own, read in zip(texts, ours, theirs, strict=True):
        golds: list[int | None] = [*own.tokens[1:], None]
        partners = corrected_partners(source, target, read, own, text)
        spaces = [
            adds_space(target, own, text, i) - adds_space(source, read, text, j) if j >= 0 else 0
            for i, j in enumerate(partners)
        ]
        maps = [respaced(source, vocabulary_map, added) if added else vocabulary_map for added in spaces]
        members = [
            [corrected_distribution(own, i, itself, golds[i], target.size) for i in range(len(golds))],
            [corrected_distribution(read, partners[i], maps[i], golds[i], target.size) for i in range(len(golds))],
        ]
        per_byte = np.array([own.nats, read.nats]) / len(text.encode())
        spells = np.array(
            [m.ends(r.tokens, text)[-1] == len(text.encode()) for m, r in ((target, own), (source, read))]
        )
        if spells.any():  # who does not spell the text does not compete
            per_byte[~spells] = np.inf
        names = [target.name, source.name]
        choice = min((0, 1), key=lambda s: (np.float32(per_byte[s]), names[s]))
        weights = np.exp((per_byte.min() - per_byte) / 0.05)
        weights /= weights.sum()
        if fusion == "mince":
            weights = np.eye(2)[choice]
        p = sum(w * np.stack([p for p, _ in member]) for w, member in zip(weights, members, strict=True))
        tail = sum(w * np.array([tail for _, tail in member]) for w, member in zip(weights, members, strict=True))
        weight = np.array([gold is not None for gold in golds], float)
        chosen = list(range(len(golds))) if (fusion, choice) == ("mince", 0) else partners
        expected.append(ExpectedTargets(p, tail, weight, chosen))
    return expected


def loss(
    target: Reader, tokens: Sequence[int], after: int | None, expected: ExpectedTargets
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Summed CLM and fusion nats of a passage and its number of next tokens; `after` is what follows its last token."""
    log_q = target.log_q(tokens)
    golds = [*tokens[1:], *([] if after is None else [after])]
    clm = -sum((log_q[i, gold] for i, gold in enumerate(golds)), torch.zeros((), dtype=torch.float64))
    p, tail = torch.from_numpy(expected.p), torch.from_numpy(expected.tail)
    rest = (1 - (log_q.exp() * (p > 0)).sum(1)).clamp(min=1e-30)  # 1 - Q
    fusion = -(p * log_q).sum(1) - tail * rest.log()
    return clm, (torch.from_numpy(expected.weight) * fusion).sum(), len(golds)
