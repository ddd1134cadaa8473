import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fusion.errors import UserError
from fusion.vocabulary.token_bytes import BYTE_LEVEL_ALPHABET, Vocabulary, byte_ends
from fusion.vocabulary.tokenization import encode, prefix_id
from tests.fusion.tokenizers_for_tests import FAMILIES, byte_level, metaspace_unigram, sentencepiece_bpe, word_piece
from tests.shared import shared

# Emoji, CJK, combining marks, control characters and spaces where they hurt.
TEXT = st.text(
    st.sampled_from(list("ab Te.\n\t"))
    | st.sampled_from(list("猫🙂ß▁Ġ\u0301\u200d\x00\x07\x1f\u00a0"))
    | st.characters(codec="utf-8"),
    max_size=30,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=50)
@given(text=TEXT)
def test_what_is_claimed_is_what_the_tokens_spell(family: str, text: str) -> None:
    tokenizer = FAMILIES[family]()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    ids, data = encode(tokenizer, text), text.encode()
    ends = byte_ends(ids, vocabulary, data)
    assert ends.dtype == np.int32 and len(ends) == len(ids)
    claimed = ends[ends >= 0]
    assert (ends[: len(claimed)] >= 0).all() and (np.diff(claimed) >= 0).all()
    added = 0
    if len(claimed) and vocabulary.dummy_prefix:
        first = vocabulary.token_bytes[ids[0]] or b""
        added = len(first) - int(ends[0])
    for n, end in enumerate(claimed.tolist()):
        spelled = b"".join(vocabulary.token_bytes[i] or b"" for i in ids[: n + 1])
        assert spelled[added:] == data[:end] and spelled[:added] == b" " * added
    if "▁" not in text and text.strip():
        assert ends[-1] == len(data)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["The fox", " The fox", "  The fox ", "\nThe", "猫 fox", "▁"])
def test_tokens_decode_to_their_bytes(family: str, text: str) -> None:
    tokenizer = FAMILIES[family]()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    ids = encode(tokenizer, text)
    if text == "▁" and vocabulary.space == "▁":
        assert byte_ends(ids, vocabulary, text.encode())[-1] == -1  # written as a space: lossy, and said so
    else:
        assert byte_ends(ids, vocabulary, text.encode())[-1] == len(text.encode())


def test_byte_level_alphabet_has_all_bytes() -> None:
    assert sorted(BYTE_LEVEL_ALPHABET.values()) == list(range(256))
    every = Vocabulary.from_tokens(["".join(BYTE_LEVEL_ALPHABET)], space="Ġ")
    assert every.token_bytes[0] == bytes(BYTE_LEVEL_ALPHABET.values())
    assert Vocabulary.from_tokens(["a b", "漢", "Ń"], space="Ġ").token_bytes == (b"a b", "漢".encode(), b"\xad")


def test_sentencepiece_bytes_and_byte_fallback() -> None:
    v = Vocabulary.from_tokens(
        ["▁a▁", "<0x0A>", "<0xfF>", "<0x0A>b", "", "<s>", "x▁y"], space="▁", control={5}, added={6}
    )
    assert v.token_bytes == (b" a ", b"\n", b"\xff", b"<0x0A>b", None, None, "x▁y".encode())
    assert v.byte_fallback == {1, 2}
    assert Vocabulary.from_tokens(["<0x0A>"], space="Ġ").byte_fallback == frozenset()


def test_families_are_recognised() -> None:
    metaspace_unigram.cache_clear()  # lm-eval gives tokenizers that lack one a pad token
    found = {name: Vocabulary.from_tokenizer(make()) for name, make in FAMILIES.items()}
    assert {name: (v.space, v.dummy_prefix, len(v.byte_fallback)) for name, v in found.items()} == {
        "byte_level": ("Ġ", False, 0),
        "sentencepiece": ("▁", False, 256),
        "dummy_prefix": ("▁", True, 256),
        "unigram": ("▁", True, 256),
    }
    assert {name: v.roles for name, v in found.items()}["unigram"] == {"bos": 0, "eos": 1, "unk": 2}
    assert found["sentencepiece"].control == {0, 1, 2}


def test_added_tokens_stand_for_their_content_and_runs_of_marks_for_spaces() -> None:
    level = Vocabulary.from_tokenizer(byte_level())
    assert level.token_bytes[level.ids["<ünit>"]] == "<ünit>".encode()
    passage = Vocabulary.from_tokenizer(sentencepiece_bpe(False))
    assert passage.token_bytes[passage.ids["▁▁"]] == b"  "


def test_sizes_beyond_and_below_the_tokenizer() -> None:
    tokenizer = byte_level()
    full = Vocabulary.from_tokenizer(tokenizer)
    wide = Vocabulary.from_tokenizer(tokenizer, len(full) + 7)
    assert len(wide) == len(full) + 7 and set(wide.tokens[-7:]) == {""} and set(wide.token_bytes[-7:]) == {None}
    narrow = Vocabulary.from_tokenizer(tokenizer, len(full) - 1)
    assert "<ünit>" not in narrow.ids
    assert byte_ends([len(full) - 1], narrow, "<ünit>".encode()).tolist() == [-1]
    assert byte_ends([-1], narrow, b"x").tolist() == [-1]


def test_control_tokens_end_the_spelling_and_are_never_made_from_text() -> None:
    for family in ("byte_level", "sentencepiece", "dummy_prefix"):
        tokenizer = FAMILIES[family]()
        vocabulary = Vocabulary.from_tokenizer(tokenizer)
        ids = encode(tokenizer, "a <eos> <bos>b")
        assert not vocabulary.control.intersection(ids)
        ends = byte_ends([*ids, tokenizer.eos_token_id, *ids], vocabulary, b"a <eos> <bos>b")
        assert ends[len(ids) - 1] == 14 and (ends[len(ids) :] == -1).all()


def test_a_unigram_model_may_write_control_tokens_and_then_nothing_is_claimed() -> None:
    tokenizer = FAMILIES["unigram"]()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    ids = encode(tokenizer, "a <eos> b")
    ends = byte_ends(ids, vocabulary, b"a <eos> b")
    assert (ends[ids.index(tokenizer.eos_token_id) :] == -1).all()


def test_dummy_prefix_that_is_a_token_of_its_own_has_no_length() -> None:
    v = Vocabulary.from_tokens(["▁", "▁a", "a", "b"], space="▁", dummy_prefix=True)
    assert byte_ends([1, 3], v, b"ab").tolist() == [1, 2]
    assert byte_ends([1, 3], v, b" ab").tolist() == [2, 3]
    assert byte_ends([0, 2, 3], v, b"ab").tolist() == [0, 1, 2]
    assert byte_ends([0, 1], v, b" a").tolist() == [0, 2]
    assert byte_ends([0, 0], v, b" ").tolist() == [0, 1]
    assert byte_ends([0, 2], v, b"x").tolist() == [-1, -1]
    assert byte_ends([0, 2], v, b" x").tolist() == [-1, -1]  # the space may be the text's or the tokenizer's


def test_mismatches() -> None:
    v = Vocabulary.from_tokens(["a", "b", "é"], space=" ")
    assert byte_ends([0, 1, 0], v, b"abc").tolist() == [1, 2, -1]
    assert byte_ends([0, 2, 0], v, "ae\u0301a".encode()).tolist() == [1, -1, -1]
    assert byte_ends([0, 1], v, b"a").tolist() == [1, -1]
    assert byte_ends([], v, b"a").tolist() == []
    assert byte_ends([0], v, b"").tolist() == [-1]


def test_word_pieces_are_counted_as_mismatch_and_not_guessed() -> None:
    tokenizer = word_piece()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    ends = byte_ends(encode(tokenizer, "The fox jumps"), vocabulary, b"The fox jumps")
    assert vocabulary.space == " " and ends[-1] == -1


def test_encode_adds_and_cuts_nothing() -> None:
    tokenizer = sentencepiece_bpe(False)
    plain = encode(tokenizer, "The dog " * 40)
    tokenizer.model_max_length = 8
    try:
        assert encode(tokenizer, "The dog " * 40) == plain and len(plain) > 8 and tokenizer.bos_token_id not in plain
        assert encode(tokenizer, "") == []
    finally:
        tokenizer.model_max_length = 10**9


def test_prefix_is_bos_else_eos_else_refused() -> None:
    assert prefix_id(sentencepiece_bpe(False)) == 0
    assert prefix_id(byte_level()) == byte_level().eos_token_id
    with pytest.raises(UserError, match="neither a bos nor an eos"):
        prefix_id(word_piece())


def test_slow_tokenizers_are_refused() -> None:
    class Slow:
        name_or_path = "old"

    with pytest.raises(UserError, match="not a fast tokenizer"):
        Vocabulary.from_tokenizer(Slow())  # type: ignore[arg-type]


def test_fingerprint_follows_meaning() -> None:
    v = Vocabulary.from_tokens(["ab", "c", "<s>"], space="Ġ", control={2}, roles={"bos": 2})
    same = Vocabulary.from_tokens(["ab", "c", "<s>"], space="Ġ", control={2}, roles={"bos": 2})
    assert v.fingerprint() == same.fingerprint() and v == same
    others = [
        Vocabulary.from_tokens(["a", "bc", "<s>"], space="Ġ", control={2}, roles={"bos": 2}),
        Vocabulary.from_tokens(["ab", "c", "<s>"], space="Ġ", roles={"bos": 2}),
        replace(v, token_bytes=(b"ab", b"d", None)),
        replace(v, dummy_prefix=True),
    ]
    assert len({v.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_fast_tokenizer_class_keeps_its_ids() -> None:
    tokenizer = byte_level()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    assert all(tokenizer.convert_ids_to_tokens(i) == token for i, token in enumerate(vocabulary.tokens))
    assert [vocabulary.ids[token] for token in vocabulary.tokens] == list(range(len(vocabulary)))


def test_real_vocabularies() -> None:
    gemma = json.loads(gzip.decompress(shared("oracle/vocabularies/gemma.json.gz").read_bytes()))
    v = Vocabulary.from_tokens(gemma["tokens"], space=gemma["space"])
    assert len(v) == 262_144 and len(v.byte_fallback) == 256
    assert v.token_bytes[v.ids["<0x41>"]] == b"A" and v.token_bytes[138] == b"  "
