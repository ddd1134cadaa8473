"""The waterfall of a passage: by hand, and with projections that lose nothing."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment.fuse import UNALIGNED, Source, fuse_sequence
from fusion.alignment.waterfall import FUSED, PassageGains, waterfall
from fusion.losses.top_k_distillation import Tail
from fusion.switches import PRESETS, Switches
from fusion.types import Predictions
from fusion.vocabulary.maps import build_map
from fusion.vocabulary.pieces import build_piece_map
from fusion.vocabulary.token_bytes import Vocabulary

CORRECTED = Switches(**PRESETS["corrected"])


def vocabulary(words: Sequence[str]) -> Vocabulary:
    return Vocabulary.from_tokens(["<s>", *words], space=" ", control=[0], roles={"bos": 0})


def source(name: str, words: Sequence[str], theirs: Sequence[str]) -> Source:
    """A source of these words, with a map to the target's."""

    def encode_greedily(texts: list[str]) -> list[list[int]]:
        order = sorted(range(len(theirs)), key=lambda w: -len(theirs[w]))
        return [[w + 1 for w in order if text.startswith(theirs[w])][:1] for text in texts]

    mine, target = vocabulary(words), vocabulary(theirs)
    whole = build_map("first_piece", mine, target, encode_target=encode_greedily)
    return Source(name, mine, whole, build_piece_map("first_piece", whole, mine, target, encode_greedily))


def said(words: Sequence[str], read: Sequence[str], p: np.ndarray) -> Predictions:
    """The predictions p[M, V] of a model that reads the words `read`, with all entries and prefix masses."""
    tokens = np.array([0, *(words.index(word) + 1 for word in read)], np.int32)
    ids = np.argsort(-p, axis=1, kind="stable").astype(np.int32)
    nats = np.append(-np.log(p[np.arange(len(read)), tokens[1:]]), 0).astype(np.float32)
    ends = np.cumsum([0, *map(len, read)]).astype(np.int32)
    log_p = np.log(np.take_along_axis(p, ids, 1)).astype(np.float32)
    prefix_nll = [
        -math.log(p[j, [n for n, other in enumerate(words, start=1) if other.startswith(word[:length])]].sum())
        for j, word in enumerate(read)
        for length in range(1, len(word))
    ]
    return Predictions(
        tokens, ends, ids, log_p, np.zeros(len(p), np.float32), nats, prefix_nll=np.array(prefix_nll, np.float32)
    )


LETTERS, PAIRS = ["a", "b", "c"], ["ab", "c", "a", "b"]
TARGET = said(LETTERS, ["a", "b", "c"], np.full((4, 4), 0.25))
BETTER = said(
    PAIRS, ["ab", "c"], np.array([[0.125, 0.5, 0.125, 0.125, 0.125], [0.05, 0.05, 0.8, 0.05, 0.05], [0.2] * 5])
)
WORSE = said(PAIRS, ["a", "b", "c"], np.full((4, 5), 0.2))
LN2, LN4 = math.log(2), math.log(4)
LEAD = [LN4 + LN4 - LN2, LN4 + math.log(0.8)]  # of BETTER in "ab" and in "c"


def measured(switches: Switches = CORRECTED, k: int | None = None, **predictions: Predictions) -> PassageGains:
    return waterfall(
        {"target": TARGET, **predictions},
        3,
        target="target",
        sources=[source(name, PAIRS, LETTERS) for name in predictions],
        target_vocabulary=vocabulary(LETTERS),
        switches=switches,
        k=k,
    )


def test_what_pairs_and_is_projected_along_the_text_is_kept() -> None:
    found = measured(better=BETTER)
    assert list(found.nats["better"].values()) == pytest.approx([sum(LEAD)] * 6, abs=1e-6)
    assert list(found.nats["target"].values()) == pytest.approx([0] * 6, abs=1e-6)
    assert list(found.nats[FUSED].values()) == pytest.approx([sum(LEAD)] * 6, abs=1e-6)
    assert found.positions["better"] == {"paired": 3, "inside": 1, "no_entry": 0, "chosen": 3}
    assert (found.n_positions, found.shared_bytes) == (3, 3)


def test_a_segment_with_a_position_without_a_partner_is_taught_in_part() -> None:
    found = measured(replace(CORRECTED, projection="token", inside="none"), better=BETTER)
    # At the beginning "a" has what the source gave "ab" and "a"; behind it there is no partner.
    elsewhere = math.log(0.625) + LN4
    expected = [sum(LEAD), LEAD[1], LEAD[1], LEAD[1], LEAD[1], LEAD[1] + elsewhere]
    assert list(found.nats["better"].values()) == pytest.approx(expected, abs=1e-6)
    assert list(found.nats[FUSED].values()) == pytest.approx(expected, abs=1e-6)
    assert found.positions["better"]["paired"] == 2


@pytest.mark.parametrize(("tail", "kept"), [("bucket", math.log(0.4 / 0.75)), ("renormalise", -math.inf)])
def test_a_true_token_without_an_entry_is_an_outcome_of_the_tail(tail: Tail, kept: float) -> None:
    """0.4 is what the model has outside its first entry, 0.75 what the target has there."""
    own = np.array([[0.1, 0.2, 0.6, 0.1], [0.1, 0.1, 0.7, 0.1], [0.1, 0.1, 0.1, 0.7], [0.25] * 4])
    switches = replace(CORRECTED, projection="token", inside="none", true_token="top_k", tail=tail)
    alike = said(LETTERS, ["a", "b", "c"], own)
    found = waterfall(
        {"target": TARGET, "alike": alike},
        3,
        target="target",
        sources=[source("alike", LETTERS, LETTERS)],
        target_vocabulary=vocabulary(LETTERS),
        switches=switches,
        k=1,
    )
    lead = [math.log(0.2), math.log(0.7), math.log(0.7)]
    assert found.nats["alike"]["projected"] == pytest.approx(sum(lead) + 3 * LN4, abs=1e-6)
    of_others = sum(lead[1:]) + 2 * LN4 if tail == "bucket" else 0
    assert found.nats["alike"]["kept"] == pytest.approx(kept + of_others, abs=1e-6)
    assert found.positions["alike"]["no_entry"] == found.positions[FUSED]["no_entry"] == 1


def test_who_is_not_selected_teaches_nothing() -> None:
    found = measured(better=BETTER, worse=WORSE)
    assert found.nats["worse"]["native"] < 0 and found.nats["worse"]["in_loss"] == found.nats["worse"]["selected"] == 0
    assert found.nats[FUSED]["in_loss"] == found.nats["better"]["in_loss"] == pytest.approx(sum(LEAD), abs=1e-6)
    found = measured(worse=WORSE)  # but the target itself
    assert found.nats[FUSED]["in_loss"] == pytest.approx(0, abs=1e-6)
    assert found.positions["target"]["chosen"] == 3


def test_a_mixture_is_nobodys() -> None:
    found = measured(replace(CORRECTED, fusion="avgce", weight_temperature=1e-3), better=BETTER, worse=WORSE)
    assert math.isnan(found.nats["better"]["selected"]) and math.isnan(found.nats["better"]["in_loss"])
    assert list(found.nats[FUSED].values()) == pytest.approx([sum(LEAD)] * 6, abs=1e-5)
    found = measured(replace(CORRECTED, fusion="avgce", include_target=False), better=BETTER)
    assert found.nats[FUSED]["in_loss"] == pytest.approx(sum(LEAD), abs=1e-5)


def test_a_mixture_has_no_part_of_the_text_itself() -> None:
    """Behind "a" one source has no partner; a training mixes a one-hot on the text in, of which no source knew."""
    switches = replace(CORRECTED, projection="token", inside="none", fusion="avgce", include_target=False)
    found = measured(replace(switches, weight_temperature=1e9), better=BETTER, worse=WORSE)
    assert found.positions[FUSED]["paired"] == 3
    mixed = [(0.625 + 0.4) / 2, 0.2, (0.8 + 0.2) / 2]
    assert found.nats[FUSED]["in_loss"] == pytest.approx(sum(math.log(p) + LN4 for p in mixed), abs=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"select_over": "token"},
        {"projection": "token", "inside": "none"},
        {"fusion": "avgce"},
        {"control": "shuffled"},
        {"include_target": False, "tail": "gold"},
    ],
)
def test_what_is_selected_is_what_a_training_selects(changed: dict[str, Any]) -> None:
    switches, predictions = replace(CORRECTED, **changed), {"better": BETTER, "worse": WORSE}
    found = measured(switches, **predictions)
    fused = fuse_sequence(
        [{"target": TARGET, **predictions}],
        [3],
        target="target",
        sources=[source(name, PAIRS, LETTERS) for name in predictions],
        target_vocabulary=vocabulary(LETTERS),
        switches=switches,
    )
    chosen = fused.chosen[:-1]
    for name in ("target", *predictions):
        by_training = (chosen == fused.names.index(name)).sum() if name in fused.names else 0
        assert found.positions[name]["chosen"] == by_training
    assert found.positions[FUSED]["paired"] == (chosen != UNALIGNED).sum()


def test_text_that_a_tokenizer_does_not_spell_is_not_shared() -> None:
    found = measured(better=replace(BETTER, byte_ends=np.array([0, 2, -1], np.int32)))
    assert found.shared_bytes == 2
    assert found.nats["better"]["native"] == pytest.approx(LEAD[0], abs=1e-6)


WORDS = st.lists(st.text("abc", min_size=2, max_size=4), unique=True, max_size=12)
CODE = ["a", "ba", "bb", "bca", "bcb", "cc"]  # none begins with another


def cut(text: str, words: list[str], rng: np.random.Generator) -> list[str]:
    """Any segmentation of the text into words."""
    read: list[str] = []
    while text:
        fitting = [word for word in words if text.startswith(word)]
        read.append(fitting[rng.integers(len(fitting))])
        text = text[len(read[-1]) :]
    return read


@settings(deadline=None, max_examples=100)
@given(
    written=st.lists(st.sampled_from(CODE), min_size=1, max_size=8),
    words=WORDS,
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(["letters to words", "words to letters", "its own"]),
)
def test_a_projection_that_loses_nothing_leaves_every_segment_as_it_was(
    written: list[str], words: list[str], seed: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    mine, theirs = {
        "letters to words": (LETTERS, [*LETTERS, *words]),
        "words to letters": (CODE, LETTERS),
        "its own": (CODE, CODE),
    }[kind]

    def model(words: list[str]) -> Predictions:
        read = cut("".join(written), words, rng)
        return said(
            words, read, rng.dirichlet(np.full(len(words) + 1, 0.3), len(read) + 1) * 0.99 + 0.01 / (len(words) + 1)
        )

    found = waterfall(
        {"target": model(theirs), "source": model(mine)},
        sum(map(len, written)),
        target="target",
        sources=[source("source", mine, theirs)],
        target_vocabulary=vocabulary(theirs),
        switches=CORRECTED,
    ).nats["source"]
    assert found["aligned"] == pytest.approx(found["native"], abs=1e-4)
    assert found["projected"] == pytest.approx(found["aligned"], abs=1e-4)
    assert found["kept"] == pytest.approx(found["projected"], abs=1e-4)
