import gzip
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from fusion.alignment.pairing import ALIGNMENTS, same_end, warping_path
from fusion.errors import UserError
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends
from fusion.vocabulary.tokenization import encode
from tests.fusion.tokenizers_for_tests import FAMILIES
from tests.fusion.vocabulary.test_token_bytes import TEXT
from tests.shared import shared

PASSAGES = [
    "猫",
    "🙂",
    "👩‍👩‍👧",
    "e\u0301",
    "ﬁ",
    "\x00",
    "\x07",
    "\x1f",
    "\u00a0",
    "▁",
    "Ġ",
    " ",
    "  ",
    "\n",
    "The fox",
    " dog",
]
ENDS = st.lists(st.integers(0, 12), max_size=12).map(sorted)


def _reading(family: str, text: str) -> tuple[np.ndarray, np.ndarray, Vocabulary]:
    tokenizer = FAMILIES[family]()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    ids = encode(tokenizer, text)
    ends = np.concatenate([[0], byte_ends(ids, vocabulary, text.encode())]).astype(np.int32)
    return np.array([tokenizer.eos_token_id, *ids], dtype=np.int32), ends, vocabulary


@pytest.mark.parametrize("source", FAMILIES)
@pytest.mark.parametrize("target", FAMILIES)
@settings(deadline=None, max_examples=25)
@given(text=TEXT | st.lists(st.sampled_from(PASSAGES), max_size=12).map("".join))
def test_same_end_pairs_have_the_same_text_before(source: str, target: str, text: str) -> None:
    tokens, ends, vocabulary = _reading(source, text)
    target_tokens, target_ends, target_vocabulary = _reading(target, text)
    nothing = np.full(len(vocabulary), -2, dtype=np.int32)
    pairs = ALIGNMENTS.get("same_end")(tokens, ends, target_tokens, target_ends, vocabulary, target_vocabulary, nothing)
    assert pairs.dtype == np.int32 and len(pairs) == len(target_tokens)

    def prefix(ids: np.ndarray, of: Vocabulary) -> bytes:
        spelled = b"".join(of.token_bytes[i] or b"" for i in ids)
        return spelled.removeprefix(b" ") if spelled.lstrip(b" ") and of.dummy_prefix else spelled

    for i, j in enumerate(pairs.tolist()):
        if j < 0:
            continue
        before, after = prefix(tokens[1 : j + 1], vocabulary), prefix(target_tokens[1 : i + 1], target_vocabulary)
        # Only the spaces at the very start may be the tokenizer's own.
        assert before.lstrip(b" ") == after.lstrip(b" ")
        assert ends[j] == target_ends[i] >= 0
    assert pairs[np.flatnonzero(target_ends == 0)[-1]] >= 0
    if ends[-1] == target_ends[-1] == len(text.encode()):
        assert pairs[-1] == len(tokens) - 1


@given(ENDS, ENDS, st.integers(0, 3), st.integers(0, 3))
@settings(deadline=None)
def test_same_end_pairs_the_last_positions_with_that_end(
    source: list[int], target: list[int], lost_source: int, lost_target: int
) -> None:
    source, target = source + [-1] * lost_source, target + [-1] * lost_target
    pairs = same_end(np.array(source, dtype=np.int32), np.array(target, dtype=np.int32))
    expected = [max((j for j, e in enumerate(source) if e == end and e >= 0), default=-1) for end in target]
    last = [i + 1 == len(target) or target[i + 1] != end for i, end in enumerate(target)]
    assert pairs.tolist() == [j if is_last else -1 for j, is_last in zip(expected, last, strict=True)]


def test_a_zero_length_token_is_not_taught_its_successors_distribution() -> None:
    # SentencePiece with a dummy prefix may begin with "▁" alone: the position before it predicts "▁", not the word.
    tokens, ends, vocabulary = _reading("dummy_prefix", "𓀀")
    assert vocabulary.tokens[tokens[1]] == "▁" and ends[:2].tolist() == [0, 0]
    _, source_ends, _ = _reading("byte_level", "𓀀")
    assert same_end(source_ends, ends)[:2].tolist() == [-1, 0]


def test_same_end_of_a_reading_with_itself_is_the_identity() -> None:
    for family in FAMILIES:
        _, ends, _ = _reading(family, "The fox 猫 jumps.")
        if len(set(ends.tolist())) == len(ends):
            assert same_end(ends, ends).tolist() == list(range(len(ends)))


def _published_path(source: list[str], target: list[str]) -> list[list[int]]:
    """The published dynamic program, as simply as it can be written."""
    total = np.full((len(source) + 1, len(target) + 1), np.inf)
    total[0, 0] = 0
    for i, a in enumerate(source):
        for j, b in enumerate(target):
            total[i + 1, j + 1] = Levenshtein.distance(a, b) + min(total[i, j + 1], total[i + 1, j], total[i, j])
    total = total[1:, 1:]
    paired: list[list[int]] = [[] for _ in target]
    i, j = len(source) - 1, len(target) - 1
    while i > 0 or j > 0:
        paired[j].append(i)
        diagonal = total[i - 1, j - 1] if i > 0 and j > 0 else np.inf
        up = total[i - 1, j] if i > 0 else np.inf
        left = total[i, j - 1] if j > 0 else np.inf
        move = np.argmin([diagonal, up, left])
        i -= int(move != 2)
        j -= int(move != 1)
    paired[0].append(0)
    return [positions[::-1] for positions in paired]


WORD = st.text("ab", max_size=3) | st.sampled_from(["猫", "a" * 70, "▁", "Ġ"])


@settings(deadline=None)
@given(st.lists(WORD, min_size=1, max_size=8), st.lists(WORD, min_size=1, max_size=8))
def test_warping_path_is_the_published_one(source: list[str], target: list[str]) -> None:
    bare_source, bare_target = [s.replace("▁", "") for s in source], [t.replace("Ġ", "") for t in target]
    assert warping_path(source, target, "▁", "Ġ") == _published_path(bare_source, bare_target)


@pytest.mark.parametrize("lengths", [(90, 33), (40, 64), (70, 101)])
def test_warping_path_of_more_columns_than_lanes(lengths: tuple[int, int]) -> None:
    random = np.random.default_rng(sum(lengths))
    source, target = (["".join(random.choice(list("ab"), random.integers(0, 4))) for _ in range(n)] for n in lengths)
    assert warping_path(source, target, "▁", "Ġ") == _published_path(source, target)


def test_warping_path_of_nothing() -> None:
    assert warping_path([], ["a"], "▁", "Ġ") == [[]] and warping_path(["a"], [], "▁", "Ġ") == []


def _dtw(
    source: list[int], target: list[int], s: Vocabulary, t: Vocabulary, image: dict[int, int] | None = None
) -> list[int]:
    vocabulary_map = np.full(len(s), -1, dtype=np.int32)
    for i, other in (image or {}).items():
        vocabulary_map[i] = other
    ids, others = np.array(source, dtype=np.int32), np.array(target, dtype=np.int32)
    return ALIGNMENTS.get("dtw")(ids, ids * 0, others, others * 0, s, t, vocabulary_map).tolist()


def test_dtw_pairs_what_is_equal_or_mapped_one_to_one() -> None:
    s = Vocabulary.from_tokens(["<s>", "Ġthe", "Ġfox", "Ġdog", "s", "xyz"], space="Ġ", control={0})
    t = Vocabulary.from_tokens(["<b>", "▁the", "▁fox", "▁dogs", "xyZ"], space="▁", control={0})
    assert _dtw([0, 1, 2, 3, 4], [0, 1, 2, 3], s, t) == [0, 1, 2, -1]
    assert _dtw([1, 2, 3, 4], [1, 2, 3], s, t) == [0, 1, -1]
    assert _dtw([1, 5], [1, 4], s, t) == [0, -1]
    assert _dtw([1, 5], [1, 4], s, t, {5: 4}) == [0, 1]
    assert _dtw([1, 5], [1, 4], s, t, {5: 3}) == [0, -1]
    assert _dtw([0], [0], s, t) == [0]


def test_dtw_adds_the_missing_mark_of_a_byte_level_source_at_the_start() -> None:
    s = Vocabulary.from_tokens(["<s>", "The", "Ġfox", "ĠThe", "Ths", "ĠThs"], space="Ġ", control={0})
    t = Vocabulary.from_tokens(["<b>", "▁The", "▁fox", "The"], space="▁", control={0}, dummy_prefix=True)
    assert _dtw([1, 2], [1, 2], s, t) == [0, 1]
    assert _dtw([0, 1, 2], [0, 1, 2], s, t) == [0, 1, 2]  # the prefix token is not the start of the text
    assert _dtw([2, 1], [2, 1], s, t) == [0, -1]  # only at the start
    assert _dtw([1, 2], [3, 2], s, t) == [0, 1]  # nothing is missing
    assert _dtw([4, 2], [1, 2], s, t, {4: 1}) == [-1, 1]  # the map is asked for the string with its mark
    assert _dtw([4, 2], [1, 2], s, t, {5: 1}) == [0, 1]
    other = Vocabulary.from_tokens(["<s>", "The", "▁fox"], space="▁", control={0})
    assert _dtw([1, 2], [1, 2], other, t) == [-1, 1]


def test_unknown_alignments_are_named() -> None:
    v = Vocabulary.from_tokens(["a"], space=" ")
    ids = np.zeros(1, dtype=np.int32)
    with pytest.raises(UserError, match=r"no alignment 'same-end' \(did you mean 'same_end'\?\)"):
        ALIGNMENTS.get("same-end")(ids, ids, ids, ids, v, v, ids)


@cache
def _real(name: str) -> Vocabulary:
    read = json.loads(gzip.decompress(shared(f"oracle/vocabularies/{name}.json.gz").read_bytes()))
    return Vocabulary.from_tokens(read["tokens"], space=read["space"])


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("case", ["gemma_to_smol_0", "gemma_to_smol_10", "smol_to_gemma_0", "smol_to_gemma_10"])
def test_dtw_pairs_the_positions_that_the_published_code_pairs(case: str, mode: str) -> None:
    oracle: dict[str, Any] = json.loads(gzip.decompress(shared(f"oracle/alignment/{case}.json.gz").read_bytes()))
    source, target = _real(oracle["source"]), _real(oracle["target"])
    image = {}
    for key in oracle["source_tokens"]:
        string = source.tokens[int(key)].replace(source.space, target.space)
        mapped = oracle["vocabulary_map"][string]
        image[int(key)] = target.ids[mapped] if mode == "soft" or mapped == string else -1
    pairs = _dtw(oracle["source_ids"], oracle["target_ids"], source, target, image)
    expected = oracle["expected"][mode]
    for i, j in enumerate(pairs):
        if j < 0:
            assert (expected["ids"][i], expected["logits"][i]) == ([oracle["target_ids"][i]], [1.0])
        else:
            mapped = dict.fromkeys(image[k] for k in oracle["top_k_ids"][j] if image[k] >= 0)
            assert expected["ids"][i] == list(mapped)
