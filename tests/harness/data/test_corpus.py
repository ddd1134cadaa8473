"""Documents and passages."""

import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.errors import UserError
from harness.config.schema import CorpusConfig
from harness.data import corpus
from harness.data.corpus import CorpusSummary, documents, expected_bytes, first_bytes
from harness.data.passages import Passages, corpus_summary, make_passages, split_text
from harness.store.artifacts import Store

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=300)


@given(TEXT, st.integers(4, 60))
def test_passages_join_and_fit(text: str, limit: int) -> None:
    passages = split_text(text, limit)
    assert "".join(passages) == text
    assert all(0 < len(p.encode()) <= limit for p in passages)


@given(TEXT, st.integers(1, 60))
def test_first_bytes_end_at_a_character(text: str, limit: int) -> None:
    start = first_bytes(text, limit)
    assert text.startswith(start) and len(start.encode()) <= limit
    assert start == text or len(text[: len(start) + 1].encode()) > limit


def test_cuts_fall_after_lines_and_before_spaces() -> None:
    assert split_text("one line here\nand another one here", 19) == ["one line here\n", "and another one", " here"]


def test_the_size_is_known_before_the_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 500)
    assert expected_bytes(CorpusConfig(path=str(tmp_path)), None) == 500
    assert expected_bytes(CorpusConfig(path=str(tmp_path), max_bytes=70), None) == 70
    assert expected_bytes(CorpusConfig(path="some/set", expected_bytes=9), None) == 9
    assert expected_bytes(CorpusConfig(path="some/set"), None) == 0


def test_stored_passages_are_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("naïve 猫 text " * 20, encoding="utf-8")
    (tmp_path / "b.txt").write_text("x", encoding="utf-8")
    _, folder = make_passages(Store(tmp_path / "store"), CorpusConfig(path=str(tmp_path)), 50, None)
    passages = Passages(folder)
    assert "".join(passages.text(i) for i in range(len(passages) - 1)) == "naïve 猫 text " * 20
    assert [bool(x) for x in passages.last[-2:]] == [True, True] and sum(passages.last) == 2
    assert all(passages.n_bytes[i] == len(passages.text(i).encode()) for i in range(len(passages)))


def test_a_document_that_was_cut_has_no_last_passage(tmp_path: Path) -> None:
    """After it an end of text would be trained on in the middle of a sentence."""
    (tmp_path / "a.txt").write_text("The harbour lies beyond the hills.")
    (tmp_path / "b.txt").write_text("The harb")
    _, folder = make_passages(Store(tmp_path / "store"), CorpusConfig(path=str(tmp_path), first_bytes=8), 50, None)
    passages = Passages(folder)
    assert [passages.text(i) for i in range(2)] == ["The harb"] * 2
    assert [bool(last) for last in passages.last] == [False, True]


@pytest.mark.parametrize(
    ("limits", "taken", "n_bytes", "counts"),
    [
        ({}, 6, 600, {}),
        ({"max_bytes": 250}, 3, 300, {"max_bytes": 3}),
        ({"per_domain": 2}, 4, 400, {"per_domain": 2}),
        ({"domain_bytes": 150}, 4, 400, {"domain_bytes": 2}),
        ({"first_bytes": 40}, 6, 240, {"first_bytes": 6}),
        ({"domains": ["b"], "first_bytes": 40}, 3, 120, {"domains": 4, "first_bytes": 3}),
        ({"domains": ["a", "b"], "first_bytes": 100}, 6, 600, {}),
    ],
)
def test_a_manifest_tells_how_much_was_taken_and_which_limit_cut(
    tmp_path: Path, limits: dict[str, object], taken: int, n_bytes: int, counts: dict[str, int]
) -> None:
    """Six distinct documents of 100 bytes in two domains, and one of them twice."""
    rows = [{"text": f"{i} " + "ä" * 49, "name": f"n{i}", "source": "ab"[i % 2]} for i in range(6)]
    _parquet(tmp_path / "some/set/default/train.parquet", [*rows, rows[0]])
    config = CorpusConfig.model_validate({"path": "some/set", "domain_column": "source", **limits})
    _, folder = make_passages(Store(tmp_path / "store"), config, 50, tmp_path)
    summary = corpus_summary(folder)
    assert (summary.documents, summary.n_bytes) == (7, 700)
    assert (summary.documents_taken, summary.n_bytes_taken) == (taken, n_bytes)
    assert summary.n_bytes_taken == Passages(folder).n_bytes.sum()
    assert summary.limits == counts
    assert summary.duplicates == (0 if limits.get("domains") == ["b"] else 1)


def test_the_summary_of_a_corpus_is_one_line() -> None:
    summary = CorpusSummary(140, 118_345, 12, 6_012, 2, {"max_bytes": 125, "first_bytes": 1})
    assert summary.sentence("The corpus set") == (
        "The corpus set: 6,012 of 118,345 bytes and 12 of 140 documents are taken, 2 are duplicates; "
        "max_bytes left out 125, first_bytes shortened 1."
    )


def test_documents_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    """Of a corpus of a million documents nobody takes them out by hand; where there is no other they are refused."""
    _parquet(tmp_path / "a.parquet", [{"text": text} for text in ("", "one", "", "two")])
    config = CorpusConfig(path=str(tmp_path / "a.parquet"))
    for limits in ({}, {"max_bytes": 100}):
        summary = CorpusSummary()
        taken = list(documents(config.model_copy(update=limits), None, summary))
        assert [document.text for document in taken] == ["one", "two"]
        assert (summary.documents, summary.documents_taken, summary.empty) == (4, 2, 2)
    assert summary.sentence("It") == "It: 6 of 6 bytes and 2 of 4 documents are taken, 2 have no text."


def _parquet(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_data_root_maps_a_hub_id(tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "name": f"n{i}", "source": "ab"[i % 2]} for i in range(10)]
    _parquet(tmp_path / "some/set/default/train.parquet", [*rows, rows[0]])
    config = CorpusConfig(path="some/set", name_column="name", domain_column="source")
    found = list(documents(config, tmp_path))
    assert [d.name for d in found] == [f"n{i}" for i in range(10)]  # the same text counts once
    limited = list(documents(config.model_copy(update={"per_domain": 2}), tmp_path))
    assert sorted(d.domain for d in limited) == ["a", "a", "b", "b"]
    other = list(documents(config.model_copy(update={"per_domain": 2, "seed": 3}), tmp_path))
    assert {d.name for d in limited} != {d.name for d in other}
    with pytest.raises(UserError, match=r"validation\.parquet is missing"):
        list(documents(config.model_copy(update={"split": "validation"}), tmp_path))
    with pytest.raises(UserError, match="no column 'nome'"):
        list(documents(config.model_copy(update={"name_column": "nome"}), tmp_path))


def test_the_domains_of_a_corpus_add_up_to_it(tmp_path: Path) -> None:
    """What is drawn of several domains is what is drawn of each, so that their continuations and it see the same."""
    rows = [{"text": f"text {i} " + "x" * (i % 5 * 20), "name": f"n{i}", "source": "aab"[i % 3]} for i in range(60)]
    _parquet(tmp_path / "some/set/default/train.parquet", rows)
    whole = CorpusConfig(path="some/set", domain_column="source", domains=["a", "b"], domain_bytes=200)
    parts = [list(documents(whole.model_copy(update={"domains": [domain]}), tmp_path)) for domain in "ab"]
    assert {d.sha256 for d in documents(whole, tmp_path)} == {d.sha256 for part in parts for d in part}
    for part in parts:
        sizes = [len(d.text.encode()) for d in part]
        assert 200 <= sum(sizes) < 200 + max(sizes)
    assert expected_bytes(whole, tmp_path) == 400


@pytest.mark.parametrize(
    ("name", "raw", "sentence"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"words": "x"}\n', "line 1 has no 'text'"),
        ("a.jsonl", json.dumps({"text": ""}).encode(), "has no text"),
        ("a.jsonl", b"", "has no document"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "not valid Unicode"),
        ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("a.parquet", b"no parquet", "is no Parquet file"),
        ("a.csv", b"text\nx\n", "neither .parquet"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, raw: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=sentence):
        list(documents(CorpusConfig(path=str(tmp_path / name)), None))


def test_a_text_is_hashed_once_and_again_when_it_may_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "texts" / "a.txt"
    text.parent.mkdir()
    text.write_text("one", encoding="utf-8")
    hashed: list[str] = []
    sha256 = corpus.file_sha256
    monkeypatch.setattr(corpus, "file_sha256", lambda file: (hashed.append(file.name), sha256(file))[1])

    def fingerprints() -> set[str]:
        configs = [CorpusConfig(path=str(path)) for path in (text, text.parent)]
        return {corpus.content_fingerprint(config, None, tmp_path / "models" / "record") for config in configs}

    before = fingerprints()
    assert fingerprints() == before and len(before) == 2  # a folder of one file is not that file
    assert hashed == ["a.txt"] * 2
    text.write_text("two", encoding="utf-8")  # of the same size
    os.utime(text, ns=(0, 0))
    after = fingerprints()
    assert not after & before and len(hashed) == 4
    text.write_text("six", encoding="utf-8")
    os.utime(text, ns=(0, 0))  # of the same time, too
    assert not fingerprints() & {*before, *after}
    other = tmp_path / "other"
    other.write_text("ten", encoding="utf-8")
    os.utime(other, ns=(0, 0))
    other.replace(text)
    assert not fingerprints() & {*before, *after}


def test_a_row_without_a_name_or_domain_has_the_default(tmp_path: Path) -> None:
    nothing = [None, float("nan"), ""]
    rows = [{"text": f"text {i}", "name": none, "domain": none} for i, none in enumerate(nothing)]
    pq.write_table(pa.Table.from_pylist(rows[:1] + rows[2:]), tmp_path / "texts.parquet")
    pq.write_table(
        pa.table({"text": ["a", "b"], "name": [math.nan, 0.0], "domain": [math.nan, 0.0]}), tmp_path / "n.parquet"
    )
    (tmp_path / "texts.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in [*rows, {"text": "0", "name": 0, "domain": 0}])
    )
    for file, expected in {
        "texts.parquet": [("0", "text"), ("1", "text")],
        "n.parquet": [("0", "text"), ("0.0", "0.0")],
        "texts.jsonl": [("0", "text"), ("1", "text"), ("2", "text"), ("0", "0")],
    }.items():
        config = CorpusConfig(path=str(tmp_path / file), name_column="name", domain_column="domain", domain="text")
        assert [(d.name, d.domain) for d in documents(config, None)] == expected
