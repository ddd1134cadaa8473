"""Vocabulary maps: which target id each source id becomes.

A map is int32[V_source]: a target id, -1 where the source id maps to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fusion.errors import UserError
from fusion.registry import Registry
from fusion.vocabulary.edit_distance import Codes, Targets, code_points, nearest, to_alphabet
from fusion.vocabulary.pieces import NOTHING, PIECES
from fusion.vocabulary.token_bytes import Vocabulary, respace
from fusion.vocabulary.tokenization import EncodeTexts, written_ids

Unit = Literal["bytes", "strings"]
Text = str | bytes
Progress = Callable[[int, int], None]

# A control token with several roles takes the first that the target has: one that ends texts and begins them
# (GPT-2's) is predicted where a text ends.
_ROLE_ORDER = ("eos", "bos", "pad", "unk")
_PATTERNS_AT_ONCE = 512


@dataclass(frozen=True)
class MapTask:
    """The input of a kind of map: the source ids `ids` int64[N] to map, all of which have a token.

    On bytes, `ids` holds no control tokens: those are mapped by role before.
    """

    source: Vocabulary
    target: Vocabulary
    on: Unit
    ids: np.ndarray
    encode_target: EncodeTexts | None
    progress: Progress


MapKind = Callable[[MapTask], np.ndarray]
MAPS: Registry[MapKind] = Registry("map", "fusellm.maps")


def build_map(
    kind: str,
    source: Vocabulary,
    target: Vocabulary,
    *,
    on: Unit = "bytes",
    encode_target: EncodeTexts | None = None,
    progress: Progress | None = None,
) -> np.ndarray:
    """The vocabulary map int32[V_source] of the registered `kind`: "mined", "em", "first_piece" or
    "byte_prefix".

    `on="bytes"` compares the bytes that tokens stand for; control tokens map to the control token of the same role or
    to nothing, and no text ever maps to a control token. `on="strings"` compares raw strings with the source's space
    mark replaced by the target's, control tokens included, as the published code does. `encode_target` (texts to ids,
    no special tokens) is the target's tokenizer: with it no map on bytes names an id that it never writes (see
    `written_ids`); "first_piece" and "byte_prefix" need it. `progress(done, total)` counts source tokens. Raises
    UserError for unknown kinds and units.
    """
    if on not in ("bytes", "strings"):
        raise UserError(f'A vocabulary map compares "bytes" or "strings", not {on!r}.')
    build = MAPS.choose(kind).value
    result = np.full(len(source), NOTHING, dtype=np.int32)
    if on == "bytes":
        for i, mapped in control_ids(source, target).items():
            result[i] = mapped
        ids = [i for i, spelling in enumerate(source.token_bytes) if spelling is not None]
    else:
        ids = [i for i, token in enumerate(source.tokens) if token]
    task = MapTask(source, target, on, np.array(ids, dtype=np.int64), encode_target, progress or _silent)
    result[task.ids] = build(task)
    return result


def _silent(done: int, total: int) -> None:
    pass


def control_ids(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """The target's control token of the same role, for each control token of the source that has one."""
    found = {i: _same_role(i, source, target) for i in source.control}
    return {i: mapped for i, mapped in found.items() if mapped != NOTHING}


def _same_role(i: int, source: Vocabulary, target: Vocabulary) -> int:
    for role in _ROLE_ORDER:
        if source.roles.get(role) == i and role in target.roles:
            return target.roles[role]
    return NOTHING


@MAPS.register("em", reference="arXiv 2401.10491, section 4.4: exact match (EM)")
def exact(task: MapTask) -> np.ndarray:
    """int32[N]: the identical target token, else -1. Of two with the same bytes an ordinary token is preferred to a
    byte-fallback one.
    """
    texts, candidates, places = _texts(task)
    by_text = _first_places(candidates)
    task.progress(len(texts), len(texts))
    return np.array([places[by_text[text]] if text in by_text else NOTHING for text in texts], dtype=np.int32)


@MAPS.register("mined", reference="arXiv 2401.10491, section 3.3: minimum edit distance (MinED)")
def mined(task: MapTask) -> np.ndarray:
    """int32[N]: the identical target token, else the one at the least Levenshtein distance (MinED).

    Distances are in bytes, or in characters of the strings. Ties go to the lowest target id; on bytes, ordinary tokens
    precede byte-fallback tokens.
    """
    texts, candidates, places = _texts(task)
    by_text = _first_places(candidates)
    result = np.array([places[by_text[text]] if text in by_text else NOTHING for text in texts], dtype=np.int32)
    inexact = np.flatnonzero([text not in by_text for text in texts])
    if not len(inexact) or not candidates:
        task.progress(len(texts), len(texts))
        return result
    patterns, strings, alphabet = to_alphabet(code_points([texts[i] for i in inexact]), code_points(candidates))
    found = _search(patterns, Targets.build(strings, alphabet), task.progress, len(texts))
    result[inexact] = np.array(places, dtype=np.int32)[found]
    return result


@MAPS.register("first_piece", reference="the first token of the source token's bytes, as the target encodes them")
def first_piece(task: MapTask) -> np.ndarray:
    """int32[N]: the first target token when the target's tokenizer encodes the source token's bytes
    (`fusion.vocabulary.pieces.first_piece`).
    """
    return _by_pieces("first_piece", task)


@MAPS.register("byte_prefix", reference="arXiv 2607.22334: the longest target token that is a prefix of the bytes")
def byte_prefix(task: MapTask) -> np.ndarray:
    """int32[N]: the longest target token that is a prefix of the source token's bytes."""
    return _by_pieces("byte_prefix", task)


def _by_pieces(kind: str, task: MapTask) -> np.ndarray:
    if task.encode_target is None:
        raise UserError(f'The map "{kind}" needs the target\'s tokenizer: give its encode function.')
    if task.on != "bytes":
        raise UserError(f'The map "{kind}" works on bytes: set the map\'s unit to "bytes".')
    image = PIECES[kind](task.target, task.encode_target)([task.source.token_bytes[i] or b"" for i in task.ids])
    task.progress(len(image), len(image))
    return image


def _texts(task: MapTask) -> tuple[list[Text], list[Text], list[int]]:
    """The N source texts, the M target texts in order of preference, and the ids of the latter."""
    source, target = task.source, task.target
    if task.on == "strings":
        places = [i for i, token in enumerate(target.tokens) if token]
        strings: list[Text] = [respace(source.tokens[i], source.space, target.space) for i in task.ids.tolist()]
        return strings, [target.tokens[i] for i in places], places
    spelled = target.token_bytes
    if task.encode_target is None:
        usable = [i for i, spelling in enumerate(spelled) if spelling]
    else:
        usable = np.flatnonzero(written_ids(target, task.encode_target)).tolist()
    places = sorted(usable, key=lambda i: (i in target.byte_fallback, i))
    texts: list[Text] = [source.token_bytes[i] or b"" for i in task.ids.tolist()]
    return texts, [spelled[i] or b"" for i in places], places


def _first_places(candidates: Sequence[Text]) -> dict[Text, int]:
    return {text: place for place, text in reversed(list(enumerate(candidates)))}


def _search(patterns: Codes, targets: Targets, progress: Progress, total: int) -> np.ndarray:
    """int64[N]: the index of each pattern's nearest target, searched on all cores."""
    # Characters that the targets lack have all become one wildcard, which makes many patterns the same.
    distinct: dict[bytes, int] = {}
    rows = [patterns.codes[a:b] for a, b in zip(patterns.offsets[:-1], patterns.offsets[1:], strict=True)]
    which = np.array([distinct.setdefault(row.tobytes(), len(distinct)) for row in rows])
    representatives = np.unique(which, return_index=True)[1]
    chunks = [
        representatives[start : start + _PATTERNS_AT_ONCE]
        for start in range(0, len(representatives), _PATTERNS_AT_ONCE)
    ]
    found = np.empty(len(distinct), dtype=np.int64)
    multiplicity = np.bincount(which)
    done = total - len(rows)
    progress(done, total)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        running = {pool.submit(nearest, _pick(rows, chunk), targets): chunk for chunk in chunks}
        try:
            for future in as_completed(running):
                chunk = running[future]
                found[which[chunk]] = future.result()
                done += int(multiplicity[which[chunk]].sum())
                progress(done, total)
        finally:  # an interrupted search ends with the chunks in hand, not with all of them
            pool.shutdown(wait=False, cancel_futures=True)
    return found[which]


def _pick(rows: Sequence[np.ndarray], chunk: Iterable[int]) -> Codes:
    picked = [rows[i] for i in chunk]
    return Codes(np.concatenate(picked), np.concatenate([[0], np.cumsum([len(row) for row in picked])]))
