"""What holds for the preset `corrected` on any text: tokenizers of four families, their real maps, models at random."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment.fuse import FusedSequence, Source, fuse_sequence
from fusion.switches import Switches
from fusion.types import Predictions
from fusion.vocabulary.maps import build_map
from fusion.vocabulary.pieces import PIECES, build_piece_map
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends
from fusion.vocabulary.tokenization import encode, encode_all, prefix_id
from tests.fusion.alignment.test_pairing import PASSAGES
from tests.fusion.tokenizers_for_tests import FAMILIES
from tests.fusion.vocabulary.test_token_bytes import TEXT

# Emoji, CJK, combining marks, control characters and spaces, alone and beside words that the tokenizers know.
TEXTS = st.lists(
    (TEXT | st.lists(st.sampled_from(PASSAGES), max_size=12).map("".join)).filter(len), min_size=1, max_size=3
)
SEEDS = st.integers(0, 2**32 - 1)
SWITCHES = st.builds(
    Switches,
    fusion=st.sampled_from(["mince", "avgce"]),
    select_over=st.sampled_from(["passage", "token", "sequence"]),
    include_target=st.booleans(),
    projection=st.sampled_from(["path", "token"]),
    inside=st.sampled_from(["prefix", "none"]),
    true_token=st.sampled_from(["always", "top_k"]),
)


@cache
def vocabulary(family: str) -> Vocabulary:
    return Vocabulary.from_tokenizer(FAMILIES[family]())


@cache
def mapped(source: str, target: str, kind: str) -> np.ndarray:
    tokenizer = FAMILIES[target]()
    return build_map(kind, vocabulary(source), vocabulary(target), encode_target=partial(encode_all, tokenizer))


@cache
def source(name: str, target: str, kind: str) -> Source:
    mine, theirs, whole = vocabulary(name), vocabulary(target), mapped(name, target, kind)
    if kind not in PIECES:
        return Source(name, mine, whole)
    encode_target = partial(encode_all, FAMILIES[target]())
    return Source(name, mine, whole, build_piece_map(kind, whole, mine, theirs, encode_target))


def predictions(family: str, text: str, rng: np.random.Generator, k: int) -> Predictions:
    """The tokens and ends of a family's tokenizer; the rest at random and rounded, so that sources tie."""
    tokenizer = FAMILIES[family]()
    tokens = encode(tokenizer, text)
    ends = byte_ends(tokens, vocabulary(family), text.encode())
    m = len(tokens) + 1
    p = rng.dirichlet(np.full(k + 1, 0.3), m)[:, :k]
    return Predictions(
        tokens=np.array([prefix_id(tokenizer), *tokens], np.int32),
        byte_ends=np.concatenate([[0], ends]).astype(np.int32),
        ids=np.array([rng.permutation(len(vocabulary(family)))[:k] for _ in range(m)], np.int32),
        log_p=np.log(np.maximum(p, 1e-30)).astype(np.float16).astype(np.float32),  # as the store keeps them
        tail=np.float32(1 - p.sum(1)),
        nll=np.append(rng.integers(0, 3, m - 1), 0).astype(np.float32),
    )


def fuse(
    target: str, texts: list[str], seed: int, switches: Switches, kind: str = "first_piece", order: Any = None
) -> tuple[FusedSequence, list[dict[str, Predictions]]]:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 5))  # of few entries the map often leaves none
    stored = [{name: predictions(name, text, rng, k) for name in FAMILIES} for text in texts]
    sources = [source(name, target, kind) for name in FAMILIES if name != target]
    row = fuse_sequence(
        stored,
        [len(text.encode()) for text in texts],
        target=target,
        sources=sources if order is None else [sources[s] for s in order],
        target_vocabulary=vocabulary(target),
        switches=switches,
    )
    return row, stored


@pytest.mark.parametrize("target", FAMILIES)
@settings(deadline=None, max_examples=25)
@given(TEXTS, SEEDS, SWITCHES, st.sampled_from(["mined", "em", "first_piece", "byte_prefix"]))
def test_mapped_mass_and_tail_are_one(target: str, texts: list[str], seed: int, switches: Switches, kind: str) -> None:
    if kind not in PIECES:
        switches = replace(switches, projection="token", inside="none")
    row, _ = fuse(target, texts, seed, switches, kind)
    weighted = row.fusion_weight > 0
    mass = row.targets.p.sum(axis=1, dtype=np.float64) + row.targets.tail
    np.testing.assert_allclose(mass[weighted], 1, atol=1e-6)
    assert weighted.tolist() == (row.gold >= 0).tolist()
    for ids in row.targets.ids:
        kept = ids[ids >= 0].tolist()
        assert len(set(kept)) == len(kept)


@pytest.mark.parametrize("target", FAMILIES)
@settings(deadline=None, max_examples=25)
@given(TEXTS, SEEDS, SWITCHES, st.permutations(range(3)))
def test_targets_do_not_depend_on_the_order_of_sources(
    target: str, texts: list[str], seed: int, switches: Switches, order: list[int]
) -> None:
    (one, _), (two, _) = (fuse(target, texts, seed, switches, order=o) for o in (None, order))
    for name in ("ids", "p", "tail"):
        np.testing.assert_array_equal(getattr(one.targets, name), getattr(two.targets, name))
    np.testing.assert_array_equal(one.fusion_weight, two.fusion_weight)


@pytest.mark.parametrize("target", FAMILIES)
@settings(deadline=None, max_examples=25)
@given(TEXTS, SEEDS)
def test_no_pair_in_a_row_has_different_text_before(target: str, texts: list[str], seed: int) -> None:
    row, stored = fuse(target, texts, seed, Switches(include_target=False))

    def before(family: str) -> list[tuple[int, bytes]]:
        """Of every position of the row its passage and what its tokens spell up to it."""
        found = []
        for number, passage in enumerate(stored):
            spelled = b""
            for token in passage[family].tokens[1:].tolist():
                found.append((number, spelled))
                spelled += vocabulary(family).token_bytes[token] or b""
            found.append((number, spelled))
        return found

    def texts_before(family: str, at: int) -> set[tuple[int, bytes]]:
        """The same as text: a dummy prefix may be one space that the text does not have."""
        number, spelled = before(family)[at]
        return {(number, spelled), *([(number, spelled[1:])] if vocabulary(family).dummy_prefix else [])}

    for name, partners, inside in zip(row.names, row.partner.tolist(), row.inside, strict=True):
        for i, j in enumerate(partners):
            if j >= 0 and not inside[i]:
                common = texts_before(name, j) & texts_before(target, i)
                assert any(texts[number].encode().startswith(spelled) for number, spelled in common), (name, i, j)
