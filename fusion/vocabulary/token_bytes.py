"""Tokenizer vocabularies in bytes: which bytes of text every token id stands for.

Predictions of models with different tokenizers can be compared only through the text itself. A `Vocabulary` gives for
every id the bytes it contributes to the text, which ids are control tokens without text, and how the tokenizer family
writes a space.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_LEVEL_SPACE = "Ġ"
SENTENCEPIECE_SPACE = "▁"
ROLES = ("bos", "eos", "unk", "pad")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's table from the printable characters of a byte-level vocabulary to the 256 bytes they stand for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET: Mapping[str, int] = _byte_level_alphabet()
# Byte-level characters lie below 324, so that one str.translate to Latin-1 turns a token into its bytes.
_TO_LATIN1 = {ord(char): byte for char, byte in BYTE_LEVEL_ALPHABET.items()}
# Everything below 324 that is not in the alphabet must not survive the translation by accident.
_TO_LATIN1.update({code: 0xFFFF for code in range(324) if chr(code) not in BYTE_LEVEL_ALPHABET})


@dataclass(frozen=True)
class Vocabulary:
    """The V ids of one model: their strings, the bytes they stand for, and which of them stand for no text.

    `token_bytes[id]` is None for control tokens and for ids that have no token; `tokens[id]` is "" for the latter.
    Byte-fallback ids (`<0x41>`) stand for one byte. With `dummy_prefix` the tokenizer puts a space before the text, so
    that the first token's bytes may begin with a space that is not in the text (`byte_ends` accounts for it).
    """

    tokens: tuple[str, ...]
    token_bytes: tuple[bytes | None, ...] = field(repr=False)
    control: frozenset[int]
    byte_fallback: frozenset[int]
    space: str
    roles: Mapping[str, int] = field(hash=False)
    dummy_prefix: bool

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each token string; the lower one for a string that two ids have."""
        return {token: i for i, token in reversed(list(enumerate(self.tokens))) if token}

    @cached_property
    def with_space(self) -> np.ndarray:
        """int32[V], the id of each id's bytes after a space, -1 where there is none; an id without bytes is its own."""
        return self._ids_of([None if spelling is None else b" " + spelling for spelling in self.token_bytes])

    @cached_property
    def without_space(self) -> np.ndarray:
        """int32[V], the id of each id's bytes without their first space, -1 where there is none; as `with_space`."""
        return self._ids_of([s[1:] if s is not None and s.startswith(b" ") else s and b"" for s in self.token_bytes])

    def _ids_of(self, spellings: Sequence[bytes | None]) -> np.ndarray:
        by_bytes = {spelling: i for i, spelling in reversed(list(enumerate(self.token_bytes))) if spelling}
        return np.array([i if s is None else by_bytes.get(s, -1) for i, s in enumerate(spellings)], dtype=np.int32)

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) over strings, bytes and control ids: equal exactly when the ids mean the same."""
        digest = hashlib.sha256()
        # Lengths go first: joined strings alone do not say where one token ends and the next begins.
        texts = [token.encode("utf-8", "surrogatepass") for token in self.tokens]
        for parts in (texts, [b"" if part is None else part for part in self.token_bytes]):
            digest.update(np.array([len(part) for part in parts], dtype="<i8").tobytes())
            digest.update(b"".join(parts))
        digest.update(np.array([part is None for part in self.token_bytes], dtype="u1").tobytes())
        for ids in (self.control, self.byte_fallback):
            digest.update(np.array([len(ids), *sorted(ids)], dtype="<i8").tobytes())
        digest.update(json.dumps([sorted(self.roles.items()), self.space, self.dummy_prefix]).encode())
        return digest.hexdigest()

    def means_in(self, other: Vocabulary) -> bool:
        """True if a model with the other vocabulary can read this one's ids: no id is a different token there.

        The number of unused embedding rows differs between sizes of one family, and an added token may be missing in
        one of them.
        """
        tokens = self.tokens[: max((i for i, token in enumerate(self.tokens) if token), default=-1) + 1]
        alike = (not a or not b or a == b for a, b in zip(tokens, other.tokens, strict=False))
        return len(tokens) <= len(other) and all(alike)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerFast, size: int | None = None) -> Vocabulary:
        """The vocabulary of a fast tokenizer, for a model with `size` embedding rows (default: the tokenizer's length).

        Embedding rows without a token are empty; tokens without an embedding row are left out. Raises UserError for a
        tokenizer without a `tokenizers` backend.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"The tokenizer {type(tokenizer).__name__} of {tokenizer.name_or_path!r} is not a fast tokenizer: "
                "convert it to one that has a tokenizer.json."
            )
        by_token = backend.get_vocab(with_added_tokens=True)
        if size is None:
            size = max(by_token.values(), default=-1) + 1
        tokens = [""] * size
        for token, token_id in by_token.items():
            if token_id < size:
                tokens[token_id] = token
        added = {i: token for i, token in backend.get_added_tokens_decoder().items() if i < size}
        roles = {}
        for role in ROLES:
            role_id = getattr(tokenizer, f"{role}_token_id")
            if role_id is not None and role_id < size:
                roles[role] = role_id
        family = _family(backend)
        return cls.from_tokens(
            tokens,
            space=family.space,
            control={i for i, token in added.items() if token.special} | set(roles.values()),
            # In a SentencePiece model the user's own symbols (Gemma's runs of spaces) are vocabulary entries, written
            # with the space mark like any other; only what was added outside of the model is literal.
            added={
                i
                for i, token in added.items()
                if family.space != SENTENCEPIECE_SPACE or backend.model.token_to_id(token.content) is None
            },
            roles=roles,
            dummy_prefix=family.dummy_prefix,
            byte_fallback=family.byte_fallback,
        )

    @classmethod
    def from_tokens(
        cls,
        tokens: Sequence[str],
        *,
        space: str,
        control: Collection[int] = (),
        added: Collection[int] = (),
        roles: Mapping[str, int] | None = None,
        dummy_prefix: bool = False,
        byte_fallback: bool | None = None,
    ) -> Vocabulary:
        """A vocabulary from a list of token strings and the family's space mark.

        "Ġ" means byte-level BPE, " " means strings that are text as they are, any other mark a SentencePiece-like
        vocabulary. `added` ids that are not control tokens stand for their literal content. `byte_fallback`: `<0xNN>`
        stands for a byte (default: only in SentencePiece-like vocabularies).
        """
        if byte_fallback is None:
            byte_fallback = space not in (BYTE_LEVEL_SPACE, " ")
        fallback = {}
        if byte_fallback:
            for i, token in enumerate(tokens):
                if token.startswith("<0x") and (match := _BYTE_FALLBACK.fullmatch(token)) and i not in control:
                    fallback[i] = bytes([int(match[1], 16)])
        literal = frozenset(added)
        spelled: list[bytes | None]
        if space == BYTE_LEVEL_SPACE:
            spelled = [_byte_level(token) for token in tokens]
        else:
            spelled = [_utf8(token.replace(space, " ")) for token in tokens]
        for i in literal:
            spelled[i] = _utf8(tokens[i])
        for i, byte in fallback.items():
            spelled[i] = byte
        for i in control:
            spelled[i] = None
        for i, token in enumerate(tokens):
            if not token:
                spelled[i] = None
        return cls(
            tokens=tuple(tokens),
            token_bytes=tuple(spelled),
            control=frozenset(control),
            byte_fallback=frozenset(fallback),
            space=space,
            roles=dict(roles or {}),
            dummy_prefix=dummy_prefix,
        )


def same_ids(one: Vocabulary, other: Vocabulary) -> bool:
    """True if every id means the same in both vocabularies; embedding rows without a token are ignored."""
    n = min(len(one), len(other))
    alike = one.tokens[:n] == other.tokens[:n] and one.token_bytes[:n] == other.token_bytes[:n]
    return alike and not any(one.tokens[n:]) and not any(other.tokens[n:])


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _byte_level(token: str) -> bytes:
    try:
        return token.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:  # not written in the byte alphabet (an unk token): it stands for its own string
        return _utf8(token)


@dataclass(frozen=True)
class _Family:
    space: str
    dummy_prefix: bool
    byte_fallback: bool


def _components(state: Any) -> Iterator[dict[str, Any]]:
    """The parts of a component of `tokenizers`, with sequences flattened."""
    if isinstance(state, dict):
        for nested in ("decoders", "pretokenizers", "normalizers"):
            if nested in state:
                for part in state[nested]:
                    yield from _components(part)
                return
        yield state


def _family(backend: Any) -> _Family:
    """How a `tokenizers.Tokenizer` writes spaces and bytes, read from its normalizer, pre-tokenizer and decoder."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for stage in ("normalizer", "pre_tokenizer", "decoder"):
        component = getattr(backend, stage)
        parts[stage] = [] if component is None else list(_components(json.loads(component.__getstate__())))
    every = [part for stage in parts.values() for part in stage]
    before = parts["normalizer"] + parts["pre_tokenizer"]
    if any(part["type"] == "ByteLevel" for part in every):
        prefixed = any(part["type"] == "ByteLevel" and part.get("add_prefix_space", False) for part in before)
        return _Family(BYTE_LEVEL_SPACE, prefixed, False)
    fallback = any(part["type"] == "ByteFallback" for part in parts["decoder"])
    for part in every:
        if part["type"] == "Metaspace":
            # Only what happens to the text counts: a decoder may name a scheme that the pre-tokenizer does not follow.
            schemes = [p.get("prepend_scheme", "always") for p in before if p["type"] == "Metaspace"]
            prefixed = any(scheme != "never" for scheme in schemes) or _prepends(before, part["replacement"])
            return _Family(part["replacement"], prefixed, fallback)
    for part in every:
        if part["type"] == "Replace":
            pattern = part["pattern"].get("String")
            mark = part["content"] if pattern == " " else pattern if part["content"] == " " else None
            if mark == SENTENCEPIECE_SPACE:
                return _Family(mark, _prepends(before, mark), fallback)
    return _Family(" ", False, fallback)


def _prepends(parts: Iterable[dict[str, Any]], mark: str) -> bool:
    return any(part["type"] == "Prepend" and part["prepend"] in (mark, " ") for part in parts)


def respace(token: str, space: str, other: str) -> str:
    """A token's string with the space mark of its family replaced by another family's."""
    return token if space == other else token.replace(space, other)


def byte_ends(ids: Sequence[int] | np.ndarray, vocabulary: Vocabulary, text: bytes) -> np.ndarray:
    """int32[T]: the byte offset in `text` at which each of the T tokens ends, -1 from the first token that does not
    spell the text.

    `ids` is the output of `encode` (no prefix token). A lossy tokenizer may drop a character, normalise it, or emit an
    unknown token: all offsets from there on are -1. Zero-length tokens repeat the offset before them. A dummy prefix
    may or may not be part of the text: the interpretation that spells the whole text is taken, else the one that spells
    more tokens; where both spell equally many, or no text at all, every offset is -1.
    """
    size, known_ids = len(vocabulary), np.asarray(ids, dtype=np.int64)
    if known_ids.min(initial=0) >= 0 and known_ids.max(initial=-1) < size:
        token_bytes = list(map(vocabulary.token_bytes.__getitem__, known_ids.tolist()))
    else:
        token_bytes = [vocabulary.token_bytes[i] if 0 <= i < size else None for i in known_ids.tolist()]
    direct = _ends(token_bytes, text)
    if not vocabulary.dummy_prefix or not token_bytes or not (token_bytes[0] or b"").startswith(b" "):
        return direct
    shifted = _ends(token_bytes, b" " + text)
    shifted[shifted >= 0] -= 1
    by_shift = {False: direct, True: shifted}
    for ends in by_shift.values():
        if ends[-1] == len(text):
            return ends
    matched = {shift: int((ends >= 0).sum()) for shift, ends in by_shift.items()}
    better = by_shift[matched[True] > matched[False]]
    # A space that nothing follows may be the tokenizer's own or what it made of the text: no way to tell.
    if matched[True] == matched[False] or better.max() <= 0:
        return np.full(len(token_bytes), -1, dtype=np.int32)
    return better


def _ends(token_bytes: Sequence[bytes | None], text: bytes) -> np.ndarray:
    known = len(token_bytes) if None not in token_bytes else token_bytes.index(None)
    parts: list[bytes] = token_bytes[:known]  # type: ignore[assignment]  # there is no None before `known`
    spelled = b"".join(parts)
    ends = np.full(len(token_bytes), -1, dtype=np.int32)
    ends[:known] = np.cumsum(np.fromiter(map(len, parts), np.int64, known))
    if not text.startswith(spelled):
        common = min(len(spelled), len(text))
        left, right = np.frombuffer(spelled, np.uint8, common), np.frombuffer(text, np.uint8, common)
        different = np.flatnonzero(left != right)
        good = int(different[0]) if len(different) else common
        # A token that ends where the spelling still agrees is right; zero-length ones after a wrong one are not.
        wrong = int(np.argmax(ends[:known] > good))
        ends[wrong:] = -1
    return ends
