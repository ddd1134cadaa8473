"""The corpus that every Python carries: its domains, its splits and its fixed sizes."""

import ast
import importlib
from collections import Counter

import pytest

from fusion.errors import UserError
from harness.data.standard_library import DOMAINS, LibraryDocument, library_documents, standard_library

MICRO = standard_library("micro")


@pytest.fixture(scope="module")
def documents() -> list[LibraryDocument]:
    return MICRO.documents()


def test_corpus_has_three_domains_with_three_splits(documents: list[LibraryDocument]) -> None:
    assert Counter((d.domain, d.split) for d in documents).keys() == {
        (domain, split) for domain in DOMAINS for split in ("train", "validation", "test")
    }
    assert [d.name for d in documents] == sorted(d.name for d in documents)
    assert len({d.text for d in documents}) == len({d.name for d in documents}) == len(documents)
    for document in documents:
        assert 300 <= len(document.text.encode()) <= MICRO.max_document_bytes + 1 or document.domain == "manual"
        assert document.name.startswith(document.domain + "/")
    assert MICRO.documents("test") == [d for d in documents if d.split == "test"]


def test_domains_hold_what_they_say(documents: list[LibraryDocument]) -> None:
    code = "".join(d.text for d in documents if d.domain == "code")
    assert "import " in code
    assert not any(line.lstrip().startswith("# ") for line in code.splitlines())
    for document in documents:
        if document.domain == "code":
            tree = ast.parse(document.text)
            owners = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
            assert not any(map(ast.get_docstring, owners))


def test_corpus_is_the_same_twice(documents: list[LibraryDocument]) -> None:
    library_documents.cache_clear()
    assert MICRO.documents() == documents


def test_a_larger_corpus_contains_the_smaller(documents: list[LibraryDocument]) -> None:
    larger = library_documents(20_000, max_document_bytes=MICRO.max_document_bytes, min_test=1)
    assert set(documents) < set(larger)


@pytest.mark.slow
def test_the_whole_corpus_suffices_for_intervals() -> None:
    documents = standard_library("tiny").documents()
    count = Counter((d.domain, d.split) for d in documents)
    for domain in DOMAINS:
        assert count[domain, "test"] >= 25
        total = sum(count[domain, split] for split in ("train", "validation", "test"))
        assert 0.7 < count[domain, "train"] / total < 0.9
    # Topics of the manual overlap: no paragraph of some length may stand on both sides.
    sides: dict[bool, set[str]] = {True: set(), False: set()}
    for document in documents:
        if document.domain == "manual":
            sides[document.split == "test"].update(p for p in document.text.split("\n\n") if len(p) > 200)
    assert not sides[True] & sides[False]


def test_a_python_without_the_manual_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    library_documents.cache_clear()
    with pytest.raises(UserError, match=r"too little text of the domain 'manual' .*0 test documents"):
        library_documents(2_000, max_document_bytes=1_000, min_test=1)


def test_a_corpus_of_another_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"no corpus 'stdlib:mircro' .did you mean 'stdlib:micro'"):
        standard_library("mircro")


def test_the_rehearsals_corpus_has_what_a_large_corpus_has() -> None:
    corpus = standard_library("rehearsal")
    for split in ("train", "validation", "test"):
        awkward = {d.name.split("/")[-1]: d.text for d in corpus.documents(split) if d.domain == "awkward"}
        assert awkward["nothing"] == "" and awkward["digits"].isdigit()
        assert any("一" <= character <= "鿿" for character in awkward["ideographs"])
        assert len({d.text for d in corpus.documents(split)}) == len(corpus.documents(split))
    (line,) = (d for d in corpus.documents() if d.domain == "line")
    assert line.split == "train" and len(line.text) == 3_000_000 and "\n" not in line.text
    assert {d.domain for d in corpus.documents()} == set(corpus.domains)
