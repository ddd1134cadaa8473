"""The negative control: shuffled predictions are distributions that know nothing of the text."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment.fuse import Source, fuse_sequence
from fusion.alignment.shuffling import shuffled
from fusion.switches import Switches
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary

LETTERS = Vocabulary.from_tokens(["<s>", *"abcdefgh"], space=" ", control={0})
V = len(LETTERS.tokens)


def knowing(text: str, k: int = 2) -> Predictions:
    """Predictions that give the true next token 0.9, and the rest to one more entry and the tail."""
    tokens = np.array([0, *(LETTERS.tokens.index(letter) for letter in text)], np.int32)
    m = len(tokens)
    true = np.append(tokens[1:], 1)
    ids = np.stack([true, np.where(true == 1, 2, 1)], 1)[:, :k].astype(np.int32)
    log_p = np.log(np.tile([0.9, 0.06][:k], (m, 1))).astype(np.float32)
    return Predictions(
        tokens=tokens,
        byte_ends=np.arange(m, dtype=np.int32),
        ids=ids,
        log_p=log_p,
        tail=(1 - np.exp(log_p).sum(1)).astype(np.float32),
        nll=np.append(np.full(m - 1, -np.log(0.9)), 0).astype(np.float32),
        prefix_nll=np.zeros(0, np.float32),
    )


@settings(max_examples=50, deadline=None)
@given(st.text("abcdefgh", max_size=40))
def test_the_distributions_are_the_same_at_other_positions(text: str) -> None:
    given, control = knowing(text), shuffled(knowing(text), V)
    assert sorted(map(tuple, control.ids)) == sorted(map(tuple, given.ids))
    np.testing.assert_array_equal(control.ids[-1], given.ids[-1])
    np.testing.assert_array_equal(control.tokens, given.tokens)
    np.testing.assert_array_equal(control.ids, shuffled(knowing(text), V).ids)
    p = np.exp(control.log_p.astype(float))
    for i, token in enumerate(control.tokens[1:]):
        listed = p[i][control.ids[i] == token]
        assert np.exp(-control.nll[i]) == pytest.approx(listed.sum() or control.tail[i] / (V - 2), rel=1e-5)


def test_a_skipped_passage_stays_skipped() -> None:
    one = knowing("abc")
    assert shuffled(Predictions.empty(one.tokens, one.byte_ends, 2), V).skipped


def test_the_sources_say_no_more_of_the_text_than_of_any_other() -> None:
    text = "abcdefgh" * 8
    own = knowing(text)
    mass = {}
    for control in ("none", "shuffled"):
        fused = fuse_sequence(
            [{"target": own, "source": knowing(text)}],
            [len(text)],
            target="target",
            sources=[Source("source", LETTERS, np.arange(V, dtype=np.int32))],
            target_vocabulary=LETTERS,
            switches=Switches(control=control),  # type: ignore[arg-type]
        )
        at = np.flatnonzero(fused.gold >= 0)
        of_gold = np.where(fused.targets.ids[at] == fused.gold[at, None], fused.targets.p[at], 0)
        mass[control] = of_gold.sum(axis=1).mean()
    assert mass["none"] == pytest.approx(0.9, abs=1e-3)
    assert mass["shuffled"] < 0.25  # a text of eight letters that are equally frequent
