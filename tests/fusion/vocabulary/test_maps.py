import gzip
import json
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from fusion.errors import UserError
from fusion.vocabulary.edit_distance import Targets, code_points, distances, nearest, to_alphabet
from fusion.vocabulary.maps import MAPS, MapTask, build_map
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import encode, encode_all, written_ids
from tests.fusion.tokenizers_for_tests import FAMILIES, byte_level, sentencepiece_bpe
from tests.shared import shared

# Lengths on both sides of a machine word, and characters that only one side uses.
STRING = st.text("abc猫\u0301", max_size=8) | st.text("ab", min_size=60, max_size=70)
OTHER = st.text("abd猫▁", max_size=8) | st.text("ab", min_size=60, max_size=70)


@settings(deadline=None)
@given(st.lists(STRING, max_size=6), st.lists(OTHER, max_size=6))
def test_distances_are_levenshtein(patterns: list[str], targets: list[str]) -> None:
    expected = [[Levenshtein.distance(p, t) for t in targets] for p in patterns]
    assert distances(patterns, targets).tolist() == expected


@settings(deadline=None)
@given(st.lists(STRING, min_size=1, max_size=6), st.lists(OTHER, max_size=12))
def test_nearest_is_the_first_of_the_least(patterns: list[str], targets: list[str]) -> None:
    left, right, alphabet = to_alphabet(code_points(patterns), code_points(targets))
    expected = [
        min(range(len(targets)), key=lambda i: Levenshtein.distance(p, targets[i]), default=-1) for p in patterns
    ]
    assert nearest(left, Targets.build(right, alphabet)).tolist() == expected


@settings(deadline=None)
@given(st.binary(max_size=12), st.lists(st.binary(min_size=1, max_size=12), min_size=1, max_size=20))
def test_nearest_on_bytes(pattern: bytes, targets: list[bytes]) -> None:
    left, right, alphabet = to_alphabet(code_points([pattern]), code_points(targets))
    expected = min(range(len(targets)), key=lambda i: Levenshtein.distance(pattern, targets[i]))
    assert nearest(left, Targets.build(right, alphabet)).tolist() == [expected]


def _strings(*tokens: str, **how: Any) -> Vocabulary:
    return Vocabulary.from_tokens(tokens, **({"space": " "} | how))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["mined", "em", "first_piece"])
def test_a_vocabulary_maps_onto_itself(kind: str, family: str) -> None:
    tokenizer = FAMILIES[family]()
    v = Vocabulary.from_tokenizer(tokenizer)
    encode_target = partial(encode_all, tokenizer)
    image, written = build_map(kind, v, v, encode_target=encode_target), written_ids(v, encode_target)
    assert image.dtype == np.int32
    for i, passage in enumerate(v.token_bytes):
        if i in v.control:
            assert image[i] == i
        elif kind == "first_piece":
            assert passage is not None and passage.startswith(v.token_bytes[image[i]] or b"?")
        elif written[i]:
            assert image[i] == i
        elif kind == "em":  # of a byte twice in the vocabulary the token that the tokenizer writes
            assert image[i] == -1 or (v.token_bytes[image[i]] == passage and written[image[i]])
        else:
            assert written[image[i]]


def test_strings_map_onto_themselves() -> None:
    v = Vocabulary.from_tokenizer(byte_level())
    assert build_map("mined", v, v, on="strings").tolist() == list(range(len(v)))


def test_mined_takes_exact_bytes_first_and_ordinary_tokens_before_fallback() -> None:
    target = _strings("<s>", "<0x41>", "<0x42>", "A", "Ax", "Bx", space="▁", control={0}, roles={"bos": 0})
    source = _strings("A", "B", "C", "<s>", "<pad>", "ĠA", space="Ġ", control={3, 4}, roles={"eos": 3, "pad": 4})
    # C is one edit from <0x41> (id 1) too: of the ties, the ordinary token.
    assert build_map("mined", source, target).tolist() == [3, 2, 3, -1, -1, 3]
    assert build_map("em", source, target).tolist() == [3, 2, -1, -1, -1, -1]


def test_control_tokens_map_by_role_alone() -> None:
    target = _strings("<s>", "</s>", "<pad>", "x", control={0, 1, 2}, roles={"bos": 0, "eos": 1, "pad": 2})
    source = _strings("<pad>", "<s>", "a", "b", control={0, 1, 3}, roles={"bos": 1, "eos": 1, "unk": 3})
    for kind in ("mined", "em"):
        assert build_map(kind, source, target)[[0, 1, 3]].tolist() == [-1, 1, -1]


def test_mined_on_strings_follows_the_published_rule() -> None:
    target = _strings("▁the", "the", "<s>", "!", "", space="▁", control={2})
    source = _strings("Ġthe", "the", "<x>", "Ċ", "", space="Ġ", control={2})
    assert build_map("mined", source, target, on="strings").tolist() == [0, 1, 2, 3, -1]
    assert build_map("em", source, target, on="strings").tolist() == [0, 1, -1, -1, -1]
    # As bytes the newline is nobody's, and as good as anything; as a string it was, too.
    assert build_map("mined", source, target)[3] == 3


def test_every_token_is_mapped_and_progress_is_reported() -> None:
    source = Vocabulary.from_tokenizer(byte_level())
    target = Vocabulary.from_tokenizer(sentencepiece_bpe(True))
    seen: list[tuple[int, int]] = []
    whole = build_map("mined", source, target, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(source) - len(source.control),) * 2 and seen == sorted(seen)
    ids = np.array([300, 5, 17])
    assert _mined(source, target, "bytes", ids) == whole[ids].tolist() and (whole >= -1).all()


@pytest.mark.parametrize("on", ["bytes", "strings"])
def test_mined_equals_a_plain_search(on: Any) -> None:
    source = Vocabulary.from_tokenizer(sentencepiece_bpe(False))
    target = Vocabulary.from_tokenizer(byte_level())
    image = build_map("mined", source, target, on=on)
    for i in range(len(source)):
        passage, others = source.token_bytes[i], target.token_bytes
        if on == "strings":
            text = source.tokens[i].replace("▁", "Ġ")
            ranked = [(text != t, Levenshtein.distance(text, t), n) for n, t in enumerate(target.tokens)]
        elif passage is None:
            continue
        else:
            ranked = [
                (passage != t, Levenshtein.distance(passage, t), n) for n, t in enumerate(others) if t is not None
            ]
        assert image[i] == min(ranked)[2]


def test_first_piece() -> None:
    tokenizer = sentencepiece_bpe(True)
    target = Vocabulary.from_tokenizer(tokenizer)
    source = _strings("The", "ĠThe", "Ġ", "Ċ", "çĮ«", "çĮ", "Ġçļ", "Ġqqqq", "ðŁ", space="Ġ")
    image = build_map("first_piece", source, target, encode_target=partial(encode_all, tokenizer))
    passages = [target.token_bytes[i] or b"" for i in image]
    for passage, whole in zip(passages, source.token_bytes, strict=True):
        assert whole is not None and whole.startswith(passage) and passage
    # The text's own first token: no space that the tokenizer puts before a text.
    assert not passages[0].startswith(b" ") and passages[1].startswith(b" ") and passages[3] == b"\n"
    assert image[4] == encode(tokenizer, "a猫")[len(encode(tokenizer, "a"))]
    assert passages[5] == b"\xe7" and image[5] in target.byte_fallback and passages[8] == b"\xf0"


def test_first_piece_of_what_the_target_cannot_write() -> None:
    target = _strings("a", "b", "ab")
    source = _strings("abc", "c", "ba")
    # A tokenizer that normalises gives tokens that the bytes do not begin with; one that drops text gives none.
    for lost in ([1], list[int]()):

        def encode_target(texts: Sequence[str], lost: list[int] = lost) -> list[list[int]]:
            return [[target.ids[text]] if text in target.ids else lost for text in texts]

        assert build_map("first_piece", source, target, encode_target=encode_target).tolist() == [2, -1, 1]


def test_mistakes_are_named() -> None:
    v = _strings("a")
    with pytest.raises(UserError, match=r"no map 'minde' \(did you mean 'mined'"):
        build_map("minde", v, v)
    with pytest.raises(UserError, match="not 'chars'"):
        build_map("mined", v, v, on="chars")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="needs the target's tokenizer"):
        build_map("first_piece", v, v)
    with pytest.raises(UserError, match="works on bytes"):
        build_map("first_piece", v, v, on="strings", encode_target=lambda texts: [[0]] * len(texts))


def test_empty_sides() -> None:
    v, empty = _strings("a", ""), _strings("", "<s>", control={1})
    assert build_map("mined", v, empty).tolist() == [-1, -1]
    assert build_map("em", empty, v).tolist() == [-1, -1]


def _mined(source: Vocabulary, target: Vocabulary, on: Any, ids: np.ndarray) -> list[int]:
    """The images of some tokens of a vocabulary that is large."""
    return MAPS.choose("mined").value(MapTask(source, target, on, ids, None, lambda done, total: None)).tolist()


@cache
def _real(name: str) -> Vocabulary:
    read = json.loads(gzip.decompress(shared(f"oracle/vocabularies/{name}.json.gz").read_bytes()))
    control = [i for i in read["added_ids"] if name != "gemma" or i < 6]
    return Vocabulary.from_tokens(read["tokens"], space=read["space"], control=control)


@pytest.mark.parametrize("pair", ["gemma_to_smol", "qwen_to_smol", "smol_to_gemma", "smol_to_qwen"])
def test_mined_on_strings_equals_the_published_map(pair: str) -> None:
    oracle = json.loads(gzip.decompress(shared(f"oracle/mined/{pair}.json.gz").read_bytes()))
    expected = {int(i): image for i, image in oracle["map"].items()}
    ids = np.array(sorted(expected))
    images = _mined(_real(oracle["source"]), _real(oracle["target"]), "strings", ids)
    assert images == [expected[i] for i in ids.tolist()]


def test_mined_on_bytes_of_real_vocabularies() -> None:
    source, target = _real("gemma"), _real("smol")
    with_bytes = np.flatnonzero([passage is not None for passage in source.token_bytes])
    ids = np.random.default_rng(0).choice(with_bytes, 30, replace=False)
    for i, image in zip(ids.tolist(), _mined(source, target, "bytes", ids), strict=True):
        passage = source.token_bytes[i] or b""
        ranked = [(Levenshtein.distance(passage, t), n) for n, t in enumerate(target.token_bytes) if t is not None]
        assert image == min(ranked)[1]
