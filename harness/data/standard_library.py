"""A corpus that every Python carries: the text of its own standard library, in three domains that differ strongly.

`code`        the statements of a module, written by `ast.unparse`: no comment and no docstring
`docstrings`  the docstrings of a module, and nothing else of it
`manual`      the language reference that `help()` shows (`pydoc_data.topics`), one document a section

The same patch version of Python gives the same documents. Folders that some distributions leave out or change (`test`,
`idlelib`, `distutils`, ...) are not read, so that a distribution's Python gives nearly the same text as the original.
"""

import ast
import hashlib
import importlib
import math
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from fusion.errors import UnknownName, UserError
from harness.data.awkward_text import awkward_texts, long_line

DOMAINS = ("code", "docstrings", "manual")
SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
MIN_DOCUMENT_BYTES = 300
MAX_DOCUMENT_BYTES = 12_000  # no module gives more, so that none dominates its domain
SECTION_BYTES = 1_200  # sections of the manual are cut at a paragraph near this size, which gives some 300 of them

# Tests and tables are not prose or code to learn from; the others are missing or changed in some distributions.
_SKIPPED_FOLDERS = re.compile(
    "__phello__|__pycache__|config-.*|dist-packages|distutils|encodings|ensurepip|idlelib|lib-dynload|lib2to3|"
    "pydoc_data|site-packages|tests?|tkinter|turtledemo"
)
_SKIPPED_MODULES = re.compile(r"_sysconfigdata.*|sitecustomize|sysconfig|_sysconfig|__hello__|site")
_HEADING = re.compile(r"\n(?=[^\n]+\n(?:\*{3,}|={3,}|-{3,}|~{3,}|\^{3,}|\"{3,})\n)")

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class LibraryDocument:
    """One document: `name` starts with its domain, as in `code/asyncio/queues.py`; `split` follows from the name."""

    name: str
    domain: str
    split: Split
    text: str


@lru_cache(maxsize=4)  # reading the library takes some ten seconds, and each tiny model asks for it
def library_documents(
    max_bytes: int | None = None, *, max_document_bytes: int = MAX_DOCUMENT_BYTES, min_test: int = 20
) -> tuple[LibraryDocument, ...]:
    """The documents of the running Python, in order of their names, no two with the same text.

    About 80, 10 and 10 % of a domain are `train`, `validation` and `test`, by a hash of the name. `max_bytes` is the
    size of each domain (bytes of UTF-8), divided in the same ratio and exceeded by less than a document a split.
    Default: all text, some 3.5 MB. The choice of documents also follows from their names.
    Raises UserError where a domain has fewer than `min_test` test documents, or no validation or training document.
    """
    domains = {domain: _Domain(domain, max_bytes) for domain in DOMAINS}
    seen_docstrings: set[str] = set()
    for path, module in _modules():
        if domains["code"].full and domains["docstrings"].full:
            break
        docstrings = _docstrings(module, seen_docstrings)
        domains["docstrings"].add(path, _first_parts(docstrings, "\n\n", max_document_bytes))
        domains["code"].add(path, _first_parts(_statements(module), "\n", max_document_bytes))
    for name, text in _manual(min(SECTION_BYTES, max_document_bytes)):
        domains["manual"].add(name, text)
    for domain in domains.values():
        domain.check(min_test)
    documents = [document for domain in domains.values() for document in domain.documents]
    return tuple(sorted(documents, key=lambda document: document.name))


@dataclass(frozen=True)
class StandardLibrary:
    """A corpus of a fixed size: the arguments of `library_documents` under a name."""

    name: str
    max_bytes: int | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    min_test: int = 20
    awkward: bool = False
    """Whether the documents of `harness.data.awkward_text` follow, in the domains `awkward` and `line`."""

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains of its documents."""
        return (*DOMAINS, "awkward", "line") if self.awkward else DOMAINS

    def documents(self, split: Split | None = None) -> list[LibraryDocument]:
        """All documents in order of their names, awkward ones last, or those of one split."""
        library = library_documents(self.max_bytes, max_document_bytes=self.max_document_bytes, min_test=self.min_test)
        documents = [*library, *(_awkward_documents() if self.awkward else ())]
        return [document for document in documents if split in (None, document.split)]


CORPORA = {
    corpus.name: corpus
    for corpus in (
        StandardLibrary("tiny"),
        StandardLibrary("micro", max_bytes=12_000, max_document_bytes=2_000, min_test=1),
        StandardLibrary("rehearsal", max_bytes=75_000, min_test=1, awkward=True),
    )
}


def _awkward_documents() -> list[LibraryDocument]:
    """Awkward documents of every split, and the long line, which is training text."""
    splits: tuple[Split, ...] = ("train", "validation", "test")
    awkward = [
        LibraryDocument(f"awkward/{split}/{name}", "awkward", split, text)
        for split in splits
        for name, text in awkward_texts(split)
    ]
    return [*awkward, LibraryDocument("line/records", "line", "train", long_line())]


def standard_library(name: str) -> StandardLibrary:
    """The corpus `tiny` (all there is), `micro` (a few documents, for tests) or `rehearsal` (some, and awkward ones).

    Raises UserError for another name.
    """
    if name not in CORPORA:
        raise UnknownName("corpus", f"stdlib:{name}", [f"stdlib:{corpus}" for corpus in CORPORA])
    return CORPORA[name]


class _Domain:
    """Collects the documents of one domain until each split has its part of `max_bytes`."""

    def __init__(self, name: str, max_bytes: int | None) -> None:
        self.name = name
        self.documents: list[LibraryDocument] = []
        self.left = {split: math.inf if max_bytes is None else max_bytes * share for split, share in SHARES.items()}
        self.texts: set[str] = set()

    @property
    def full(self) -> bool:
        """True if every split has its part."""
        return all(left <= 0 for left in self.left.values())

    def add(self, name: str, text: str) -> None:
        """Takes a document unless it is too short, a duplicate, not encodable as UTF-8, or its split is full."""
        name = f"{self.name}/{name}"
        split = _split(name)
        text = text.strip("\n") + "\n"
        if self.left[split] <= 0 or text in self.texts or any("\ud800" <= letter <= "\udfff" for letter in text):
            return
        size = len(text.encode())
        if size >= MIN_DOCUMENT_BYTES:
            self.texts.add(text)
            self.left[split] -= size
            self.documents.append(LibraryDocument(name=name, domain=self.name, split=split, text=text))

    def check(self, min_test: int) -> None:
        """Raises UserError where a split has too few documents."""
        count = Counter(document.split for document in self.documents)
        if count["test"] < min_test or not count["validation"] or not count["train"]:
            raise UserError(
                f"this Python carries too little text of the domain '{self.name}' ({count['train']} training, "
                f"{count['validation']} validation and {count['test']} test documents, {min_test} test documents are "
                f"needed): use a Python with its whole standard library (on Debian the package libpython3-stdlib)"
            )


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _split(name: str) -> Split:
    bucket = _hash("split of " + name) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _modules() -> Iterator[tuple[str, ast.Module]]:
    """(path below the library, syntax tree) of every module, by hash of the path; parsed lazily."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not any(map(_SKIPPED_FOLDERS.fullmatch, relative.parts)) and not _SKIPPED_MODULES.fullmatch(path.stem):
            paths.append(relative.as_posix())
    for name in sorted(paths, key=lambda path: (_hash(path), path)):
        with tokenize.open(root / name) as file:  # heeds the coding line
            yield name, ast.parse(file.read())


def _docstring_owners(
    module: ast.Module,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(module):
        if (
            isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            yield node


def _docstrings(module: ast.Module, seen: set[str]) -> list[str]:
    """The docstrings of a module in the order of `ast.walk`, without those in `seen`, to which they are added."""
    texts = dict.fromkeys(ast.get_docstring(node) or "" for node in _docstring_owners(module))
    fresh = [text for text in texts if text not in seen]
    seen.update(fresh)
    return fresh


def _statements(module: ast.Module) -> Iterator[str]:
    """The source of the module's statements without docstrings, which are removed from `module` itself."""
    for node in _docstring_owners(module):
        del node.body[0]
        if not node.body and not isinstance(node, ast.Module):
            node.body.append(ast.Pass())
    for statement in module.body:
        definition = isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield ast.unparse(statement) + ("\n" if definition else "")


def _first_parts(parts: Iterable[str], between: str, max_bytes: int) -> str:
    """As many of the first parts as fit whole into `max_bytes`; empty where the first does not fit."""
    taken: list[str] = []
    size = 0
    for part in parts:
        size += len(part.encode("utf-8", errors="replace")) + len(between)
        if size > max_bytes:
            break
        taken.append(part)
    return between.join(taken)


def _manual(section_bytes: int) -> list[tuple[str, str]]:
    """(topic/number, text) of the language reference, by hash of the name, cut near `section_bytes`.

    Topics overlap (`typesseq` contains all of `typesmutable`): a paragraph is kept only where it comes first, so that
    no test document is contained in a training document.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    seen: set[str] = set()
    sections: list[tuple[str, str]] = []
    for topic in sorted(topics):
        parts: list[list[str]] = []
        for section in re.split(_HEADING, "\n" + topics[topic]):
            size = section_bytes
            for paragraph in section.strip("\n").split("\n\n"):
                if paragraph in seen:
                    continue
                seen.add(paragraph)
                if size >= section_bytes:
                    parts.append([])
                    size = 0
                parts[-1].append(paragraph)
                size += len(paragraph)
        sections += [(f"{topic}/{number:02d}", "\n\n".join(part)) for number, part in enumerate(parts)]
    return sorted(sections, key=lambda section: (_hash(section[0]), section[0]))
