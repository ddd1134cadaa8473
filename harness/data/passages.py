"""Passages: documents cut at character boundaries, stored as an Arrow file and read through a memory map.

A passage is a document or a part of it, of at most so many bytes whatever the tokenizers are. The passages of a
document join to its text byte for byte.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from harness.config.schema import CorpusConfig
from harness.data.corpus import (
    CorpusSummary,
    Document,
    check_corpus,
    check_readable,
    content_fingerprint,
    documents,
    expected_bytes,
)
from harness.store.artifacts import Estimate, Spec, Store, read_manifest

VERSION = 3
PASSAGES_FILE = "passages.arrow"
_BATCH = 1024  # passages written at once, so that memory stays bounded


def split_text(text: str, max_bytes: int) -> list[str]:
    """Passages of at most `max_bytes` bytes of UTF-8 that join to `text`.

    A cut falls after a line or before a space where there is one in the second half of the passage, since a word cut
    in two becomes two rare tokens; otherwise it falls between any two characters.
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
    """A stored list of passages, read through a memory map.

    `n_bytes` int32[N] are the sizes of the passages, `last` bool[N] is True for the last passage of each document that
    was taken to its end.
    """

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        self._folder = folder
        self._table: pa.Table = pa.ipc.open_file(pa.memory_map(str(folder / PASSAGES_FILE))).read_all()
        self._text = self._table["text"]  # looking up a column takes longer than a value of it
        self.n_bytes = self._table["n_bytes"].to_numpy()
        self.last = self._table["last"].to_numpy()

    def __reduce__(self) -> "tuple[type[Passages], tuple[Path]]":
        return Passages, (self._folder,)  # another process maps the file itself

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def text(self, passage: int) -> str:
        """The text of a passage, by its index."""
        return str(self._text[passage].as_py())

    def domain(self, passage: int) -> str:
        """The domain of the passage's document."""
        return str(self._table["domain"][passage].as_py())

    def name(self, passage: int) -> str:
        """The name of the passage's document and the byte at which it starts there, for messages."""
        return f"{self._table['name'][passage].as_py()} (bytes from {self._table['start'][passage].as_py()})"

    def holds_any(self, hashes: Collection[str]) -> set[str]:
        """Those of some SHA-256 that are of the whole text of a document that a passage is of."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column, wanted = self._table["sha256"], pa.array(hashes, pa.string())
        return {
            sha256 for chunk in column.chunks for sha256 in chunk.filter(pc.is_in(chunk, value_set=wanted)).to_pylist()
        }


def write_passages(folder: Path, texts: Iterable[Document], max_bytes: int) -> None:
    """Cuts documents into passages of at most `max_bytes` bytes and writes them to `folder` with bounded memory."""
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
            parts = split_text(document.text, max_bytes)
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
                        "last": document.whole and i + 1 == len(parts),
                    }
                )
                start += size
            if len(rows) >= _BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
                rows = []
        if rows:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))


def passages_spec(config: CorpusConfig, max_bytes: int, data_root: Path | None, record: Path) -> Spec:
    """What the passages of a corpus are made of: the identity of its text, its limits and the cut (bytes).

    The hash of its files is remembered in `record`.
    """
    # Optional settings are part of the identity only where they are set.
    unset = {name for name in ("domains", "domain_bytes") if getattr(config, name) is None}
    params = config.model_dump(exclude={"path", "expected_bytes", *unset}) | {"max_passage_bytes": max_bytes}
    content = content_fingerprint(config, data_root, record)
    return Spec("passages", Path(config.path).name, VERSION, {"text": content}, params, {"path": config.path})


def make_passages(store: Store, config: CorpusConfig, max_bytes: int, data_root: Path | None) -> tuple[Spec, Path]:
    """The corpus cut into passages of at most `max_bytes` bytes, as an artifact.

    Its manifest holds how much of the corpus was taken (see `corpus_summary`).
    """
    spec = passages_spec(config, max_bytes, data_root, store.hashes)

    def build(folder: Path) -> dict[str, Any]:
        summary = CorpusSummary()
        write_passages(folder, documents(config, data_root, summary), max_bytes)
        return {"corpus": summary.to_json()}

    size = expected_bytes(config, data_root)
    if store.dry and not store.path(spec).exists():
        check_corpus(config, data_root)
        if not config.expected_bytes:  # else a plan needs no text
            check_readable(config, data_root)
    return spec, store.ensure(spec, build, Estimate(disk=1.2 * size, seconds=size / 5e6))


def sample_of(n_passages: int, n: int) -> list[int]:
    """The indices of at most `n` passages, drawn by seed 0, in order."""
    if n >= n_passages:
        return list(range(n_passages))
    indices: list[int] = np.sort(np.random.default_rng(0).choice(n_passages, n, replace=False)).tolist()
    return indices


def sample_passages(store: Store, passages: Spec, folder: Path, n: int) -> tuple[Spec, Path]:
    """`n` of the passages in `folder`, drawn by seed 0, as an artifact of the same form."""
    spec = Spec(
        "passages",
        f"{passages.label}-sample",
        VERSION,
        {"passages": passages.fingerprint},
        {"n": n, "seed": 0},
        passages.info,
    )

    def build(sample: Path) -> dict[str, Any]:
        import pyarrow as pa

        table = Passages(folder)._table
        # Row by row: `take` joins all text first, which in one Arrow array must not exceed 2 GB.
        some = pa.concat_tables([table.slice(i, 1) for i in sample_of(len(table), n)]).combine_chunks()
        with pa.OSFile(str(sample / PASSAGES_FILE), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(some)
        return {"corpus": corpus_summary(folder).to_json()}

    return spec, store.ensure(spec, build)


def corpus_summary(folder: Path) -> CorpusSummary:
    """How much of its corpus the passages in `folder` were cut from. Raises UserError for a damaged manifest."""
    return CorpusSummary(**read_manifest(folder)["info"]["corpus"])


def corpus_sentence(config: CorpusConfig, folder: Path) -> str:
    """One line for the user: how much of the corpus the passages in `folder` were cut from, and what limited it."""
    return corpus_summary(folder).sentence(f"The corpus {Path(config.path).name} ({config.split})")
