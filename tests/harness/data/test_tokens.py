"""The stored tokens of passages: what encoding each passage gives, whoever reads them."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from fusion.errors import UserError
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends
from fusion.vocabulary.tokenization import encode
from harness.data import tokens
from harness.data.corpus import Document
from harness.data.passages import Passages, write_passages
from harness.data.tokens import Tokens, complete_tokens, part_path, write_tokens
from tests.harness.tiny_models import sentences, tokenizer

TEXTS = ["".join(sentences(n, n)) for n in range(1, 6)] + ["x", "naïve 猫\n"]


def written(folder: Path, texts: list[str], max_bytes: int = 10_000) -> tuple[Passages, Tokens]:
    write_passages(folder, [Document(str(n), "all", text, str(n)) for n, text in enumerate(texts)], max_bytes)
    return Passages(folder), write_tokens(folder, Passages(folder), tokenizer(300))


@pytest.mark.parametrize("per_part", [1, 3, 100])
@pytest.mark.parametrize("batch_bytes", [1, 2**20])
def test_stored_tokens_are_those_of_each_passage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, per_part: int, batch_bytes: int
) -> None:
    monkeypatch.setattr(tokens, "PASSAGES_PER_PART", per_part)
    monkeypatch.setattr(tokens, "_BATCH_BYTES", batch_bytes)
    passages, stored = written(tmp_path, TEXTS)
    own = tokenizer(300)
    vocabulary = Vocabulary.from_tokenizer(own)
    assert len(stored) == len(passages) and len(list(tmp_path.glob("part-*"))) == -(-len(passages) // per_part)
    for reader in (stored, pickle.loads(pickle.dumps(stored))):
        for passage in range(len(passages)):
            ids = encode(own, passages.text(passage))
            ends = byte_ends(ids, vocabulary, passages.text(passage).encode())
            for got, expected in ((reader.ids(passage), ids), (reader.byte_ends(passage), ends)):
                assert got.dtype == np.int32 and got.tolist() == list(expected)
            assert reader.counts[passage] == len(ids)
    assert stored.largest_id == max(max(encode(own, text)) for text in TEXTS)


def test_long_passages_have_wide_byte_ends(tmp_path: Path) -> None:
    text = "seven wizards brew potent ale " * 1200
    _, stored = written(tmp_path, [text], 10**6)
    assert stored.byte_ends(0)[-1] == len(text) > 2**15


def test_a_corpus_without_passages_has_no_tokens(tmp_path: Path) -> None:
    passages, stored = written(tmp_path, [])
    assert len(passages) == len(stored) == 0 and stored.largest_id == -1


def test_a_damaged_part_is_refused(tmp_path: Path) -> None:
    written(tmp_path, TEXTS)
    raw = bytearray(part_path(tmp_path, 0).read_bytes())
    raw[-1] ^= 1
    part_path(tmp_path, 0).write_bytes(raw)
    with pytest.raises(UserError, match=r"part-000000\.safetensors does not match its checksum"):
        complete_tokens(tmp_path, 1)
