"""Documents and passages: where text comes from, which of it is taken, and how it is cut.

A document is what the corpus holds, known by the SHA-256 of its whole text. A passage is a document or a part of it,
cut at a character boundary, at most so many bytes, whatever the tokenizers; passages join to the document byte for
byte.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from fusion.errors import UserError, did_you_mean
from harness.store.artifacts import Estimate, Spec, Store
from harness.store.fingerprint import file_sha256

if TYPE_CHECKING:
    pass

VERSION = 1
PASSAGES_FILE = "passages.arrow"
_BATCH = 1024  # passages written at once, so that memory stays bounded


class CorpusConfig(BaseModel):
    """A set of documents: where they lie and how many of them are taken."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="hub dataset id, Parquet, .jsonl or .txt file, folder of .txt files, or 'stdlib'")
    configuration: str = Field("default", description="the hub dataset's configuration")
    split: str = Field("train", description="the split that is read")
    revision: str = Field("main", description="the hub dataset's revision; a commit keeps the text from changing")
    text_column: str = "text"
    name_column: str | None = Field(None, description="the document's name; its number in the file without")
    domain_column: str | None = Field(None, description="column that gives the domain; a.b for b in a structure")
    domain: str = Field("all", description="the domain where no column gives it")
    domains: list[str] | dict[str, str] | None = Field(
        None, description="only documents of these domains; a mapping also says what they are called here"
    )
    first_bytes: int | None = Field(None, gt=0, description="only the first so many bytes of each document")
    max_bytes: int | None = Field(None, gt=0, description="stop at so many bytes of text (bytes)")
    per_domain: int | None = Field(None, gt=0, description="at most so many documents a domain")
    domain_bytes: int | None = Field(None, gt=0, description="stop a domain at so many bytes of text (bytes)")
    expected_bytes: int | None = Field(None, gt=0, description="size for estimates, where the text is not here (bytes)")
    seed: int = Field(0, description="which documents are taken where a limit is set")


@dataclass(frozen=True)
class Document:
    """One document as it is taken: `text` may be its first bytes only, `sha256` is the whole document's."""

    name: str
    domain: str
    text: str
    sha256: str


def local_path(config: CorpusConfig, data_root: Path | None) -> Path | None:
    """The file or folder that holds the corpus on this machine; None where only the hub has it.

    Raises UserError when `data_root` knows the dataset but not the split.
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
    if plain.suffix in (".parquet", ".jsonl", ".txt") or plain.is_absolute():
        raise UserError(f"The corpus {config.path} does not exist: correct corpus.path.")
    return None


def expected_bytes(config: CorpusConfig, data_root: Path | None) -> float:
    """The size of the text (bytes), for estimates: as limited or as said, else that of the files; 0 where unknown."""
    of_domains = config.domain_bytes * len(config.domains) if config.domain_bytes and config.domains else None
    known = config.max_bytes or of_domains or config.expected_bytes
    path = None if known or _is_stdlib(config) else local_path(config, data_root)
    if path is None:
        return float(known or 0)
    return float(sum(f.stat().st_size for f in (path.rglob("*.txt") if path.is_dir() else [path])))


def is_on_hub(config: CorpusConfig, data_root: Path | None) -> bool:
    """Whether the text must be fetched from the hub."""
    return not _is_stdlib(config) and local_path(config, data_root) is None


def _is_stdlib(config: CorpusConfig) -> bool:
    return config.path == "stdlib" or config.path.startswith("stdlib:")


def content_fingerprint(config: CorpusConfig, data_root: Path | None) -> str:
    """What identifies the text itself: the file's SHA-256, the Python release for `stdlib`, else the hub id."""
    if _is_stdlib(config):
        import sys

        return f"{config.path}:{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    path = local_path(config, data_root)
    if path is None:
        return f"hub:{config.path}:{config.configuration}:{config.split}:{config.revision}"
    if path.is_dir():
        files = sorted(p for p in path.rglob("*.txt"))
        return hashlib.sha256("".join(f"{p.relative_to(path)}:{file_sha256(p)};" for p in files).encode()).hexdigest()
    return file_sha256(path)


def _stdlib_rows(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    from harness.models.tiny.recipe import tiny_recipe

    recipe = tiny_recipe(config.path.partition(":")[2] or "tiny")
    for document in recipe.documents():
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
                    f"{', '.join(columns)}): set corpus.*_column."
                )
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                yield from batch.to_pylist()
    except UnicodeDecodeError:
        raise UserError(f"{path} has text that is not UTF-8: write the file anew.") from None
    except (pa.ArrowException, OSError) as error:  # OSError: what a damaged page gives
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{path} is no Parquet file, or is damaged: copy it again or correct corpus.path.") from None


def _json_rows(path: Path, config: CorpusConfig) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError):
                raise UserError(f"{path}, line {number} is not JSON in UTF-8: correct that line.") from None
            for column in (config.text_column, config.name_column, config.domain_column):
                if column and (not isinstance(row, dict) or not {column, column.partition(".")[0]} & row.keys()):
                    raise UserError(f"{path}, line {number} has no {column!r}: set corpus.*_column.")
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


def _hub_rows(config: CorpusConfig) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            config.path, config.configuration, split=config.split, revision=config.revision, streaming=True
        )
        yield from rows
    except (OSError, ValueError, ConnectionError) as error:
        raise UserError(
            f"The corpus {config.path} ({config.configuration}, {config.split}) cannot be read from the hub: set "
            f"data.root to a folder that holds {config.path}/{config.configuration}/{config.split}.parquet "
            f"({type(error).__name__})."
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
    raise UserError(f"{path} is neither .parquet, .jsonl, .txt nor a folder of .txt files: correct corpus.path.")


def _value(row: dict[str, Any], column: str) -> Any:
    """What a row has in a column, or in a field of a structure; None where there is none."""
    value: Any = row
    for part in [column] if column in row else column.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _all_documents(config: CorpusConfig, data_root: Path | None) -> Iterator[Document]:
    name_column, domain_column = config.name_column or "name", config.domain_column or "domain"
    wanted = dict(config.domains) if isinstance(config.domains, dict) else {d: d for d in config.domains or ()}
    there: set[str] = set()
    for number, row in enumerate(_rows(config, data_root)):
        domain = str(_value(row, domain_column) or config.domain)
        there.add(domain)
        if wanted and domain not in wanted:
            continue
        domain = wanted.get(domain, domain)
        found = _value(row, name_column)
        name = str(number if found is None else found)
        text = _value(row, config.text_column)
        if not isinstance(text, str) or not text:
            raise UserError(f"Document {name!r} of {config.path} ({config.split}) has no text: remove it.")
        try:
            raw, *_ = (part.encode("utf-8") for part in (text, name, domain))
        except UnicodeEncodeError:
            raise UserError(f"Document {name!r} of {config.path} is not valid Unicode: correct or remove it.") from None
        yield Document(name, domain, text, hashlib.sha256(raw).hexdigest())
    if absent := sorted(wanted.keys() - there):
        raise UserError(
            f"The corpus {config.path} ({config.split}) has no domain {absent[0]!r}{did_you_mean(absent[0], there)}: "
            f"it has {', '.join(sorted(there)) or 'none'}."
        )


def documents(config: CorpusConfig, data_root: Path | None) -> Iterator[Document]:
    """The documents that are taken, each distinct text once, in the corpus' order.

    Where a limit is set, documents are drawn in the order of a keyed hash of their text, so that the choice depends on
    the seed and the text alone. Raises UserError for an empty corpus and for documents that cannot be used.
    """
    chosen: set[str] | None = None
    if config.max_bytes or config.per_domain or config.domain_bytes:
        chosen = _draw(config, data_root)
    seen: set[str] = set()
    for document in _all_documents(config, data_root):
        if document.sha256 in seen or (chosen is not None and document.sha256 not in chosen):
            continue
        seen.add(document.sha256)
        if config.first_bytes:
            document = Document(
                document.name, document.domain, first_bytes(document.text, config.first_bytes), document.sha256
            )
        yield document
    if not seen:
        raise UserError(f"The corpus {config.path} ({config.split}) has no document: correct the corpus section.")


def _draw(config: CorpusConfig, data_root: Path | None) -> set[str]:
    sizes: dict[str, tuple[str, str, int]] = {}
    for d in _all_documents(config, data_root):
        size = len(first_bytes(d.text, config.first_bytes).encode()) if config.first_bytes else len(d.text.encode())
        key = hashlib.sha256(f"{config.seed}:{d.sha256}".encode()).hexdigest()
        sizes.setdefault(d.sha256, (key, d.domain, size))
    chosen: set[str] = set()
    of_domain: dict[str, int] = {}
    bytes_of_domain: dict[str, int] = {}
    total = 0
    for sha256, (_, domain, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
        if config.max_bytes and total >= config.max_bytes:
            break
        if config.per_domain and of_domain.get(domain, 0) >= config.per_domain:
            continue
        if config.domain_bytes and bytes_of_domain.get(domain, 0) >= config.domain_bytes:
            continue
        of_domain[domain] = of_domain.get(domain, 0) + 1
        bytes_of_domain[domain] = bytes_of_domain.get(domain, 0) + size
        total += size
        chosen.add(sha256)
    return chosen


def first_bytes(text: str, limit: int) -> str:
    """The longest beginning of `text` of at most `limit` bytes of UTF-8 that ends at a character boundary."""
    return text.encode("utf-8")[:limit].decode("utf-8", errors="ignore")


def cut(text: str, max_bytes: int) -> list[str]:
    """Passages of at most `max_bytes` bytes of UTF-8 that join to `text`.

    A cut falls after a line or before a space where one lies in the second half of the passage, since a word torn in
    two is read as two rare tokens; else between any two characters.
    """
    raw = text.encode("utf-8")
    passages = []
    start = 0
    while len(raw) - start > max_bytes:
        head = raw[start : start + max_bytes].decode("utf-8", errors="ignore").encode("utf-8")
        at = head.rfind(b"\n") + 1
        if at <= len(head) // 2:
            at = head.rfind(b" ", 1)
        if at <= len(head) // 2:
            at = len(head)
        passages.append(head[:at].decode("utf-8"))
        start += at
    if start < len(raw):
        passages.append(raw[start:].decode("utf-8"))
    return passages


class Passages:
    """A stored list of passages, read through a memory map."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._table: pa.Table = pa.ipc.open_file(pa.memory_map(str(folder / PASSAGES_FILE))).read_all()
        self.n_bytes = self._table["n_bytes"].to_numpy()
        self.last = self._table["last"].to_numpy()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def text(self, passage: int) -> str:
        return str(self._table["text"][passage].as_py())

    def domain(self, passage: int) -> str:
        return str(self._table["domain"][passage].as_py())

    def name(self, passage: int) -> str:
        """The passage's document and its place there, for messages."""
        return f"{self._table['name'][passage].as_py()} (bytes from {self._table['start'][passage].as_py()})"

    def document_hashes(self) -> set[str]:
        return set(self._table["sha256"].to_pylist())


def write_passages(folder: Path, texts: Iterable[Document], max_bytes: int) -> None:
    """Cuts documents into passages and stores them in `folder`, however many there are."""
    import pyarrow as pa

    schema = pa.schema(
        [
            ("document", pa.int32()),
            ("sha256", pa.string()),
            ("name", pa.string()),
            ("domain", pa.string()),
            ("text", pa.string()),
            ("start", pa.int64()),
            ("n_bytes", pa.int32()),
            ("last", pa.bool_()),
        ]
    )
    with pa.OSFile(str(folder / PASSAGES_FILE), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        rows: list[dict[str, Any]] = []
        for number, document in enumerate(texts):
            start = 0
            parts = cut(document.text, max_bytes)
            for i, text in enumerate(parts):
                size = len(text.encode("utf-8"))
                rows.append(
                    {
                        "document": number,
                        "sha256": document.sha256,
                        "name": document.name,
                        "domain": document.domain,
                        "text": text,
                        "start": start,
                        "n_bytes": size,
                        "last": i + 1 == len(parts),
                    }
                )
                start += size
            if len(rows) >= _BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def passages_spec(config: CorpusConfig, max_bytes: int, data_root: Path | None) -> Spec:
    # What came later is a part of it where it is set, so that what was made before is still known.
    later = {name for name in ("domains", "domain_bytes") if getattr(config, name) is None}
    params = config.model_dump(exclude={"path", "expected_bytes", *later}) | {"max_passage_bytes": max_bytes}
    content = content_fingerprint(config, data_root)
    return Spec("passages", Path(config.path).name, VERSION, {"text": content}, params, {"path": config.path})


def make_passages(store: Store, config: CorpusConfig, max_bytes: int, data_root: Path | None) -> tuple[Spec, Path]:
    """The corpus cut into passages, as an artifact."""

    def build(folder: Path) -> None:
        write_passages(folder, documents(config, data_root), max_bytes)

    spec = passages_spec(config, max_bytes, data_root)
    size = expected_bytes(config, data_root)
    return spec, store.ensure(spec, build, Estimate(disk=1.2 * size, seconds=size / 5e6))
