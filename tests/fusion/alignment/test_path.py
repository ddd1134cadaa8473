"""Projection along the text, checked against its definition written out over byte strings."""

from collections import Counter
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment.path import SourceEntries, TokenSequence, project_path, text_ends
from fusion.alignment.projection import Projected, true_token_last
from fusion.types import Predictions
from fusion.vocabulary.maps import build_map
from fusion.vocabulary.pieces import PieceMap, build_piece_map
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends
from fusion.vocabulary.tokenization import encode, encode_all, prefix_id
from tests.fusion.tokenizers_for_tests import FAMILIES
from tests.fusion.vocabulary.test_token_bytes import TEXT

NAMES = sorted(FAMILIES)


@cache
def vocabulary(family: str) -> Vocabulary:
    return Vocabulary.from_tokenizer(FAMILIES[family]())


@cache
def pieces(source: str, target: str) -> PieceMap:
    tokenizer = FAMILIES[target]()
    mine, theirs, encode_target = vocabulary(source), vocabulary(target), partial(encode_all, tokenizer)
    whole = build_map("first_piece", mine, theirs, encode_target=encode_target)
    result = build_piece_map("first_piece", whole, mine, theirs, encode_target)
    np.testing.assert_array_equal(result.images[result.starts[:-1] + 1], whole)
    return result


def passage(tokens: list[int], ends: list[int]) -> Predictions:
    """A passage of which tokens and byte ends are known, the prefix first."""
    return replace(Predictions.empty(np.array(tokens, np.int32), np.array(ends, np.int32), 0), skipped=False)


def read(family: str, text: str) -> Predictions:
    tokenizer = FAMILIES[family]()
    tokens = encode(tokenizer, text)
    ends = byte_ends(tokens, vocabulary(family), text.encode())
    return passage([prefix_id(tokenizer), *tokens], [0, *ends.tolist()])


def distributions(m: int, size: int, seed: int) -> np.ndarray:
    """p[M, V], full: every token has a probability."""
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(size, 0.1), m) * 0.99 + 0.01 / size


def prefix_mass(p: np.ndarray, source: Predictions, mine: Vocabulary) -> np.ndarray:
    """P(the next token begins with its first byte, its first two, ...) for every next token."""
    found = []
    for row, token in zip(p, source.tokens[1:].tolist(), strict=False):
        spelling = mine.token_bytes[token] or b""
        for n in range(1, len(spelling)):
            found.append(row[[(s or b"").startswith(spelling[:n]) for s in mine.token_bytes]].sum())
    return np.array(found)


def project(
    p: np.ndarray,
    source: Predictions,
    target: Predictions,
    mine: Vocabulary,
    theirs: Vocabulary,
    made: PieceMap,
    k: int,
    prefixes: bool = True,
) -> Projected:
    """The projection of the k most probable entries of p[M, V]."""
    stored = prefix_mass(p, source, mine) if prefixes else np.zeros(0)
    ids = np.argsort(-p, axis=1, kind="stable")[:, :k].astype(np.int32)
    kept = np.take_along_axis(p, ids, 1)
    following = np.append(source.tokens[1:], -1).astype(np.int32)
    nats = np.where(following >= 0, -np.log(p[np.arange(len(p)), following]), 0)
    ids, kept = true_token_last(ids, kept, following, nats)
    return project_path(
        SourceEntries(ids, kept, stored, np.array([0, len(stored)])),
        TokenSequence.of([source], mine),
        TokenSequence.of([target], theirs),
        made,
        vocabulary_size=len(theirs),
        inside=True,
        correct=True,
    )


def by_definition(
    p: np.ndarray,
    text: str,
    source: Predictions,
    target: Predictions,
    mine: Vocabulary,
    theirs: Vocabulary,
    made: PieceMap,
    k: int,
    prefixes: bool,
) -> list[dict[int, float] | None]:
    """The definition, position by position: comparisons of byte strings with the text, sums over dictionaries."""
    spelled = b" " + text.encode()
    tokens, target_tokens = source.tokens, target.tokens
    at, v = text_ends(source, mine), text_ends(target, theirs)
    stored = [
        {
            int(u): float(row[u])
            for u in {*np.argsort(-row, kind="stable")[:k].tolist(), *tokens[j + 1 : j + 2].tolist()}
        }
        for j, row in enumerate(p)
    ]

    def image(u: int, offset: int) -> int:
        return int(made.images[made.starts[u] + 1 + offset])

    def mass(j: int, begin: bytes) -> float:
        return sum(q for u, q in stored[j].items() if (mine.token_bytes[u] or b"").startswith(begin))

    def mass_of_all(j: int, begin: bytes) -> float:
        if not prefixes:
            return mass(j, begin)
        return sum(q for q, spelling in zip(p[j], mine.token_bytes, strict=True) if (spelling or b"").startswith(begin))

    result: list[dict[int, float] | None] = []
    for i, position in enumerate(v.tolist()):
        before = [j for j, end in enumerate(at.tolist()) if 0 <= end <= position] or [0]
        j = before[-1]
        offset = position - int(at[j])
        followed = j + 1 < len(at) and at[j + 1] >= 0
        repeated = i + 1 < len(v) and v[i + 1] == position
        if position < 0 or repeated or (offset > 0 and not (followed and prefixes)):
            result.append(None)
            continue
        read_already = spelled[at[j] : position] if offset > 0 else b""
        given = mass_of_all(j, read_already) if offset > 0 else 1.0
        scale = 1 / given if offset > 0 else 1.0
        row: Counter[int] = Counter()
        for u, q in stored[j].items():
            if offset > 0 and not (
                (mine.token_bytes[u] or b"").startswith(read_already) and mine.token_bytes[u] != read_already
            ):
                continue
            row[image(u, offset)] += q * scale
        if followed and i + 1 < len(v) and v[i + 1] >= 0:
            true, gold, end = int(tokens[j + 1]), int(target_tokens[i + 1]), int(v[i + 1])
            if image(true, offset) != gold:
                moved, position = stored[j][true] * scale, j + 1
                while at[position] < end:
                    if position + 1 == len(at) or at[position + 1] < 0:
                        moved = 0.0
                        break
                    if at[position + 1] <= end:
                        moved *= stored[position][int(tokens[position + 1])]
                    else:
                        moved *= mass_of_all(position, spelled[at[position] : end])
                    position += 1
                row[gold] += moved
                row[image(true, offset)] -= moved
            if at[j + 1] > end > at[j]:
                begin = spelled[at[j] : end]
                row[gold] += scale * (mass_of_all(j, begin) - mass(j, begin))
        result.append({t: q for t, q in row.items() if t >= 0 and q > 1e-12})
    return result


def check(
    p: np.ndarray,
    text: str,
    source: Predictions,
    target: Predictions,
    mine: Vocabulary,
    theirs: Vocabulary,
    made: PieceMap,
    k: int,
    prefixes: bool = True,
) -> Projected:
    result = project(p, source, target, mine, theirs, made, k, prefixes)
    expected = by_definition(p, text, source, target, mine, theirs, made, k, prefixes)
    for i, row in enumerate(expected):
        assert (result.partner[i] >= 0) == (row is not None)
        entries = dict(zip(result.ids[i].tolist(), result.p[i].tolist(), strict=True))
        assert {t: q for t, q in entries.items() if t >= 0 and q > 1e-12} == pytest.approx(
            row or {}, rel=1e-6, abs=1e-9
        )
        assert len(set(result.ids[i][result.ids[i] >= 0])) == (result.ids[i] >= 0).sum()
        assert result.p[i].sum() <= 1 + 1e-6
        if (
            row is not None
            and not result.inside[i]
            and (made.images[made.starts[:-1] + 1] >= 0).all()
            and k == p.shape[1]
        ):
            assert result.p[i].sum() == pytest.approx(1, abs=1e-6)
    return result


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
@settings(deadline=None, max_examples=6)
@given(text=TEXT.filter(len), seed=st.integers(0, 2**32 - 1), k=st.sampled_from([1, 5, 1000]))
def test_tokenizers_of_all_families(source: str, target: str, text: str, seed: int, k: int) -> None:
    mine, theirs = vocabulary(source), vocabulary(target)
    own = read(source, text)
    p = distributions(len(own.tokens), len(mine), seed)
    check(p, text, own, read(target, text), mine, theirs, pieces(source, target), min(k, len(mine)))


WORDS = st.lists(st.text("ab c", min_size=2, max_size=4), unique=True, max_size=25)


def cut(text: str, words: list[str], rng: np.random.Generator) -> Predictions:
    """Any segmentation of the text into words: tokens are their places + 1, behind a prefix token 0."""
    tokens, ends, at = [0], [0], 0
    while at < len(text):
        fitting = [w for w, word in enumerate(words) if text.startswith(word, at)]
        chosen = fitting[rng.integers(len(fitting))]
        at += len(words[chosen])
        tokens.append(chosen + 1)
        ends.append(at)
    return passage(tokens, ends)


@settings(deadline=None, max_examples=300)
@given(
    text=st.text("ab c", min_size=1, max_size=12),
    mine=WORDS,
    theirs=WORDS,
    seed=st.integers(0, 2**32 - 1),
    k=st.integers(1, 30),
    longest=st.booleans(),
    prefixes=st.booleans(),
)
def test_any_two_segmentations_of_a_text(
    text: str, mine: list[str], theirs: list[str], seed: int, k: int, longest: bool, prefixes: bool
) -> None:
    rng = np.random.default_rng(seed)
    mine, theirs = [*"ab c", *mine], [*"ab c", *theirs]
    source, target = (
        Vocabulary.from_tokens(["<s>", *words], space=" ", control=[0], roles={"bos": 0}) for words in (mine, theirs)
    )

    def encode_greedily(texts: list[str]) -> list[list[int]]:
        order = sorted(range(len(theirs)), key=lambda w: -len(theirs[w]))
        return [[next(w for w in order if text.startswith(theirs[w])) + 1] for text in texts]

    kind = "byte_prefix" if longest else "first_piece"
    made = build_piece_map(kind, np.zeros(len(source), np.int32), source, target, encode_greedily)
    own = cut(text, mine, rng)
    p = distributions(len(own.tokens), len(source), seed)
    result = check(p, text, own, cut(text, theirs, rng), source, target, made, min(k, len(source)), prefixes)
    assert (result.partner >= 0).all() or not prefixes  # every byte is read by both


def test_a_tokenizers_own_predictions_come_back_as_they_are() -> None:
    for family in NAMES:
        mine, text = vocabulary(family), " the quick  brown fox\r\n猫 🙂 12"
        own = read(family, text)
        p = distributions(len(own.tokens), len(mine), 0)
        starts = pieces(family, family).starts
        images = np.repeat(np.arange(len(mine)), np.diff(starts)).astype(np.int32)  # the identity
        result = project(p, own, own, mine, mine, PieceMap.of(mine, images), 8)
        known = np.flatnonzero(result.partner >= 0)
        np.testing.assert_array_equal(result.partner[known], known)
        assert not result.inside.any()
        for i in known:
            ids = result.ids[i][result.ids[i] >= 0]
            np.testing.assert_allclose(result.p[i][: len(ids)], p[i][ids], rtol=1e-6)


def test_the_mass_that_a_source_gave_a_whole_word_in_two_tokens_is_found() -> None:
    source = Vocabulary.from_tokens(["<s>", "re", "turn", "d"], space=" ", control=[0], roles={"bos": 0})
    target = Vocabulary.from_tokens(["<s>", "re", "return", "t", "d"], space=" ", control=[0], roles={"bos": 0})
    ids = {token: n for n, token in enumerate(target.tokens)}
    made = build_piece_map(
        "byte_prefix", np.array([0, -1, -1, -1]), source, target, lambda texts: [[ids[text]] for text in texts]
    )
    own = passage([0, 1, 2], [0, 2, 6])
    p = np.array([[0.1, 0.6, 0.2, 0.1], [0.05, 0.05, 0.8, 0.1], [0.25, 0.25, 0.25, 0.25]])
    result = project(p, own, passage([0, 2], [0, 6]), source, target, made, 4)
    first = dict(zip(result.ids[0].tolist(), result.p[0].tolist(), strict=True))
    assert first[2] == pytest.approx(0.48)  # P(re) P(turn | re)
    assert first[1] == pytest.approx(0.12)  # the rest of what "re" had
    assert first[3] == pytest.approx(0.2) and first[4] == pytest.approx(0.1)
