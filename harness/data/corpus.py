"""A corpus: where its documents come from, which of them are taken, and what a limit left out.

A document is identified by the SHA-256 of its whole text. It is cut into passages in `harness.data.passages`.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fusion.errors import UnknownName, UserError, did_you_mean
from harness.config.schema import CorpusConfig
from harness.data.hub import dataset_commit, dataset_fingerprint, offline_unless_reachable
from harness.data.standard_library import SHARES, standard_library
from harness.store.files import parse_json, remembered
from harness.store.fingerprint import file_sha256

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # of a data set; a few have no owner
_SET_COLUMNS = "set text_column, name_column or domain_column to one that is there"


@dataclass(frozen=True)
class Document:
    """One document as it is taken: `text` may be its first bytes only, `sha256` is that of the whole document."""

    name: str
    domain: str
    text: str
    sha256: str
    whole: bool = True
    """False where the text was cut, so that it does not end where the document does."""


@dataclass
class CorpusSummary:
    """How much of a corpus was taken: documents, and bytes of their text in UTF-8.

    `limits` counts, by the setting of the corpus that is responsible, the documents that were left out or shortened.
    """

    documents: int = 0
    n_bytes: int = 0
    documents_taken: int = 0
    n_bytes_taken: int = 0
    duplicates: int = 0
    """Documents left out since an earlier one has the same text."""
    limits: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    """Documents left out since they have no text."""

    def limit(self, setting: str) -> None:
        """Counts one document that `setting` left out or shortened."""
        self.limits[setting] = self.limits.get(setting, 0) + 1

    def to_json(self) -> dict[str, Any]:
        """As a manifest holds it (see `CorpusSummary(**...)`)."""
        return asdict(self)

    def sentence(self, name: str) -> str:
        """One line about the corpus of that name, with the limits that cut it."""
        text = (
            f"{name}: {self.n_bytes_taken:,} of {self.n_bytes:,} bytes and {self.documents_taken:,} of "
            f"{self.documents:,} documents are taken"
        )
        if self.duplicates:
            text += f", {self.duplicates:,} are duplicates"
        if self.empty:
            text += f", {self.empty:,} have no text"
        if self.limits:
            text += "; " + ", ".join(
                f"{setting} {'shortened' if setting == 'first_bytes' else 'left out'} {count:,}"
                for setting, count in self.limits.items()
            )
        return text + "."


def local_path(config: CorpusConfig, data_root: Path | None) -> Path | None:
    """The file or folder that holds the corpus on this machine; None where only the hub has it.

    Raises UserError when `data_root` has the data set but not this configuration and split.
    """
    plain = Path(config.path).expanduser()
    if plain.exists():
        return plain
    if data_root is not None:
        dataset = data_root.expanduser() / config.path
        file = dataset / config.configuration / f"{config.split}.parquet"
        if not data_root.expanduser().is_dir():
            raise UserError(f"data.root {data_root} is no folder: correct it, so that {file} is there.")
        if dataset.is_dir():
            if not file.exists():
                raise UserError(f"{file} is missing: data.root has {config.path} but not this configuration and split.")
            return file
    if plain.suffix in (".parquet", ".jsonl", ".txt") or not _HUB_ID.fullmatch(config.path):
        raise UserError(f"The corpus {config.path} does not exist: correct that path.")
    return None


def expected_bytes(config: CorpusConfig, data_root: Path | None) -> float:
    """The size of the text (bytes), for estimates: its limit, else `expected_bytes`, else the files' size; else 0."""
    of_domains = config.domain_bytes * len(config.domains) if config.domain_bytes and config.domains else None
    known = config.max_bytes or of_domains or config.expected_bytes
    path = None if known or _is_stdlib(config) else local_path(config, data_root)
    if path is None:
        return float(known or 0)
    return float(sum(f.stat().st_size for f in (path.rglob("*.txt") if path.is_dir() else [path])))


def is_on_hub(config: CorpusConfig, data_root: Path | None) -> bool:
    """True if the text must be fetched from the hub."""
    return not _is_stdlib(config) and local_path(config, data_root) is None


def check_corpus(config: CorpusConfig, data_root: Path | None) -> None:
    """Raises UserError for a corpus that is not on this machine and cannot be on the hub.

    Of the standard library splits and domains are checked, too.
    """
    if not _is_stdlib(config):
        local_path(config, data_root)
        return
    domains = standard_library(_fold(config)).domains
    for kind, wanted, known in (("split", [config.split], SHARES), ("domain", config.domains or [], domains)):
        for name in wanted:
            if name not in known:
                raise UnknownName(f"{kind} of the corpus {config.path}", name, known)


def _fold(config: CorpusConfig) -> str:
    return config.path.partition(":")[2] or "tiny"


def _is_stdlib(config: CorpusConfig) -> bool:
    return config.path == "stdlib" or config.path.startswith("stdlib:")


def content_fingerprint(config: CorpusConfig, data_root: Path | None, record: Path) -> str:
    """Identifies the text itself: SHA-256 of the files, the Python release for `stdlib`, or the hub id and commit.

    The hash of files is remembered in `record`, until one has another `stamp`.
    """
    if _is_stdlib(config):
        import sys

        return f"{config.path}:{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    path = local_path(config, data_root)
    if path is None:
        return f"{dataset_fingerprint(config.path, config.revision)}:{config.configuration}:{config.split}"
    folder, path = path.is_dir(), path.resolve()
    files = sorted(path.rglob("*.txt"))

    def sha256() -> str:
        if not folder:
            return file_sha256(path)
        return hashlib.sha256("".join(f"{p.relative_to(path)}:{file_sha256(p)};" for p in files).encode()).hexdigest()

    return remembered(record, [path, *files], sha256)


def _stdlib_rows(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    for document in standard_library(_fold(config)).documents():
        if document.split == config.split:
            yield {"text": document.text, "name": document.name, "domain": document.domain}


def _parquet_rows(path: Path, config: CorpusConfig) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = [c for c in (config.text_column, config.name_column, config.domain_column) if c]
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if missing := sorted({c if c in columns else c.partition(".")[0] for c in wanted} - set(columns)):
                raise UserError(
                    f"{path} has no column {missing[0]!r}{did_you_mean(missing[0], columns)} (it has "
                    f"{', '.join(columns)}): {_SET_COLUMNS}."
                )
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                yield from batch.to_pylist()
    except UnicodeDecodeError:
        raise UserError(f"{path} has text that is not UTF-8: write the file anew.") from None
    except (pa.ArrowException, OSError) as error:  # a damaged page raises OSError without a number
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is no Parquet file, or is damaged: copy it again or correct that path.") from None


def _json_rows(path: Path, config: CorpusConfig) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as reason:
                raise UserError(f"{path}, line {number} is not JSON in UTF-8 ({reason}): correct that line.") from None
            for column in (config.text_column, config.name_column, config.domain_column):
                if column and (not isinstance(row, dict) or not {column, column.partition(".")[0]} & row.keys()):
                    raise UserError(f"{path}, line {number} has no {column!r}: {_SET_COLUMNS}.")
            yield row


def _text_rows(path: Path, config: CorpusConfig) -> Iterator[dict[str, Any]]:
    for file in sorted(path.rglob("*.txt")) if path.is_dir() else [path]:
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 at byte {error.start}: convert the file.") from None
        domain = file.parent.name if path.is_dir() and file.parent != path else config.domain
        yield {
            config.text_column: text,
            config.name_column or "name": file.name,
            config.domain_column or "domain": domain,
        }


def check_readable(config: CorpusConfig, data_root: Path | None) -> None:
    """Raises UserError for text that is neither on this machine nor on the hub, nor in its cache; reads no text."""
    if is_on_hub(config, data_root):
        import datasets

        with _reading_hub(config), offline_unless_reachable():
            datasets.load_dataset_builder(config.path, config.configuration, revision=config.revision)


def _hub_rows(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    import datasets

    with _reading_hub(config):
        revision = dataset_commit(config.path, config.revision) or config.revision
        rows = datasets.load_dataset(
            config.path, config.configuration, split=config.split, revision=revision, streaming=True
        )
        yield from rows


@contextmanager
def _reading_hub(config: CorpusConfig) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ConnectionError) as error:
        raise UserError(
            f"The corpus {config.path} ({config.configuration}, {config.split}) is neither a file or folder here nor "
            f"can it be read from the hub ({type(error).__name__}): correct that path, or set data.root to a folder "
            f"that holds {config.path}/{config.configuration}/{config.split}.parquet."
        ) from None


def _rows(config: CorpusConfig, data_root: Path | None) -> Iterator[dict[str, Any]]:
    if _is_stdlib(config):
        return _stdlib_rows(config)
    path = local_path(config, data_root)
    if path is None:
        return _hub_rows(config)
    if path.is_file() and path.suffix == ".parquet":
        return _parquet_rows(path, config)
    if path.is_file() and path.suffix in (".jsonl", ".json"):
        return _json_rows(path, config)
    if path.is_dir() or path.suffix == ".txt":
        return _text_rows(path, config)
    raise UserError(f"{path} is neither .parquet, .jsonl, .txt nor a folder of .txt files: correct that path.")


def _value(row: dict[str, Any], column: str) -> Any:
    """The value of a row in a column, or in a field of a structure (`column.field`); None where there is none."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _label(value: Any, default: str) -> str:
    """A name or domain as text; the default for null, NaN (as some tools write null) and empty text."""
    return default if value is None or value == "" or value != value else str(value)


def _all_documents(
    config: CorpusConfig, data_root: Path | None, summary: CorpusSummary | None = None
) -> Iterator[Document]:
    """The documents of the wanted domains, whole, but those without text; `summary` counts those of all domains.

    Raises UserError where there are only documents without text.
    """
    name_column, domain_column = config.name_column or "name", config.domain_column or "domain"
    wanted = dict(config.domains) if isinstance(config.domains, dict) else {d: d for d in config.domains or ()}
    domains: set[str] = set()
    empty, given = "", False
    for number, row in enumerate(_rows(config, data_root)):
        domain = _label(_value(row, domain_column), config.domain)
        domains.add(domain)
        text = _value(row, config.text_column)
        if summary is not None:
            summary.documents += 1
            summary.n_bytes += len(text.encode("utf-8", errors="ignore")) if isinstance(text, str) else 0
        if wanted and domain not in wanted:
            if summary is not None:
                summary.limit("domains")
            continue
        domain = wanted.get(domain, domain)
        name = _label(_value(row, name_column), str(number))
        where = f"Document {name!r} (row {number + 1}) of {config.path} ({config.split})"
        if not isinstance(text, str):
            raise UserError(f"{where} has no text: remove it.")
        if not text:
            empty = empty or where
            if summary is not None:
                summary.empty += 1
            continue
        try:
            raw, *_ = (part.encode("utf-8") for part in (text, name, domain))
        except UnicodeEncodeError:
            raise UserError(f"{where} is not valid Unicode: correct or remove it.") from None
        given = True
        yield Document(name, domain, text, hashlib.sha256(raw).hexdigest())
    if absent := sorted(wanted.keys() - domains):
        raise UnknownName(f"domain of the corpus {config.path} ({config.split})", absent[0], sorted(domains))
    if empty and not given:
        raise UserError(f"{empty} has no text: remove it, or choose text of which some has.")


def documents(config: CorpusConfig, data_root: Path | None, summary: CorpusSummary | None = None) -> Iterator[Document]:
    """The documents that are taken, each distinct text once, in the corpus' order.

    Where a limit is set, documents are drawn in the order of a keyed hash of their text, so that the draw depends on
    the seed and the text alone. `summary` is complete when the iterator is exhausted. Raises UserError for an empty
    corpus and for documents that cannot be used.
    """
    summary = CorpusSummary() if summary is None else summary
    excluded: dict[str, str] = {}
    if config.max_bytes or config.per_domain or config.domain_bytes:
        excluded = _exclusions(config, data_root)
    seen: set[str] = set()
    for document in _all_documents(config, data_root, summary):
        if document.sha256 in seen:
            summary.duplicates += 1
            continue
        seen.add(document.sha256)
        if document.sha256 in excluded:
            summary.limit(excluded[document.sha256])
            continue
        if config.first_bytes:
            text = first_bytes(document.text, config.first_bytes)
            if not text:
                raise UserError(
                    f"Document {document.name!r} of {config.path} has no whole character in its first "
                    f"{config.first_bytes} bytes: raise first_bytes."
                )
            if text != document.text:
                summary.limit("first_bytes")
            document = replace(document, text=text, whole=text == document.text)
        summary.documents_taken += 1
        summary.n_bytes_taken += len(document.text.encode())
        yield document
    if not seen:
        raise UserError(f"The corpus {config.path} ({config.split}) has no document: correct the corpus section.")


def _exclusions(config: CorpusConfig, data_root: Path | None) -> dict[str, str]:
    """The setting that excludes a document, by the SHA-256 of each document that is not drawn."""
    sizes: dict[str, tuple[str, str, int]] = {}
    for d in _all_documents(config, data_root):
        size = len(first_bytes(d.text, config.first_bytes).encode()) if config.first_bytes else len(d.text.encode())
        key = hashlib.sha256(f"{config.seed}:{d.sha256}".encode()).hexdigest()
        sizes.setdefault(d.sha256, (key, d.domain, size))
    excluded: dict[str, str] = {}
    documents_of_domain: dict[str, int] = {}
    bytes_of_domain: dict[str, int] = {}
    total = 0
    for sha256, (_, domain, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
        if config.max_bytes and total >= config.max_bytes:
            excluded[sha256] = "max_bytes"
        elif config.per_domain and documents_of_domain.get(domain, 0) >= config.per_domain:
            excluded[sha256] = "per_domain"
        elif config.domain_bytes and bytes_of_domain.get(domain, 0) >= config.domain_bytes:
            excluded[sha256] = "domain_bytes"
        else:
            documents_of_domain[domain] = documents_of_domain.get(domain, 0) + 1
            bytes_of_domain[domain] = bytes_of_domain.get(domain, 0) + size
            total += size
    return excluded


def first_bytes(text: str, limit: int) -> str:
    """The longest beginning of `text` of at most `limit` bytes of UTF-8 that ends at a character boundary."""
    return text.encode("utf-8")[:limit].decode("utf-8", errors="ignore")
