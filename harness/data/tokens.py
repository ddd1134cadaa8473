"""The tokens of all passages for one tokenizer: made once, and read through memory maps.

A part is a safetensors file of the `ids` and `byte_ends` of the tokens of consecutive passages, one passage after the
other, and of the passages' `offsets` in them. No prefix token is among them, so that roles with other prefixes share
the tokens. A summary holds the number of tokens of every passage and the largest id.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fusion.vocabulary.token_bytes import Vocabulary, byte_ends
from fusion.vocabulary.tokenization import encode_all
from harness.data.passages import Passages
from harness.data.shards import checked_tensors, write_tensors

PASSAGES_PER_PART = 4096
"""Part of the format: another number is another version of the stage."""
_SUMMARY_FILE = "summary.safetensors"
_BATCH_BYTES = 2**20  # of text that is encoded at once: enough for all cores, and memory stays bounded
_OPEN_PARTS = 128  # file handles kept open; they hold no memory


def part_path(folder: Path, index: int) -> Path:
    """The file of a part."""
    return folder / f"part-{index:06d}.safetensors"


def part_members(passages: Passages) -> list[range]:
    """The indices of the passages of each part."""
    starts = range(0, len(passages), PASSAGES_PER_PART)
    return [range(start, min(start + PASSAGES_PER_PART, len(passages))) for start in starts]


def write_part(
    path: Path, beside: Path, passages: Passages, members: range, tokenizer: Any, vocabulary: Vocabulary
) -> None:
    """Encodes the passages `members` on all cores and writes them to `beside`, which is renamed to `path`.

    `vocabulary` is the tokenizer's own.
    """
    counts = [0]
    ids, ends = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for texts in _batches(passages, members):
        for text, of_text in zip(texts, encode_all(tokenizer, texts), strict=True):
            counts.append(len(of_text))
            ids.append(np.array(of_text, np.int32))
            ends.append(byte_ends(of_text, vocabulary, text.encode("utf-8")))
    # The types follow from the whole, so that they are the same in every part.
    longest = int(passages.n_bytes.max(initial=0))
    tensors = {
        "offsets": np.cumsum(counts, dtype=np.int64),
        "ids": np.concatenate(ids).astype(np.uint16 if len(vocabulary) <= 65536 else np.uint32),
        "byte_ends": np.concatenate(ends).astype(np.int16 if longest < 2**15 else np.int32),
    }
    write_tensors(path, beside, tensors)


def _batches(passages: Passages, members: range) -> Iterator[list[str]]:
    texts: list[str] = []
    size = 0
    for passage in members:
        texts.append(passages.text(passage))
        size += int(passages.n_bytes[passage])
        if size >= _BATCH_BYTES:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def complete_tokens(folder: Path, n_parts: int) -> int:
    """Checks the bytes of all parts, writes the summary and returns the number of tokens.

    Raises UserError for a damaged part.
    """
    counts, largest = [np.zeros(0, np.int32)], -1
    for index in range(n_parts):
        part = checked_tensors(part_path(folder, index))
        counts.append(np.diff(part["offsets"]).astype(np.int32))
        largest = max(largest, int(part["ids"].max(initial=0))) if len(part["ids"]) else largest
    summary = {"counts": np.concatenate(counts), "largest_id": np.array([largest])}
    write_tensors(folder / _SUMMARY_FILE, folder / ".summary", summary)
    return int(summary["counts"].sum(dtype=np.int64))


def write_tokens(folder: Path, passages: Passages, tokenizer: Any) -> "Tokens":
    """Writes the tokens of passages to `folder` in one process, and opens them."""
    vocabulary, parts = Vocabulary.from_tokenizer(tokenizer), part_members(passages)
    for index, members in enumerate(parts):
        write_part(part_path(folder, index), folder / ".part", passages, members, tokenizer, vocabulary)
    complete_tokens(folder, len(parts))
    return Tokens(folder)


class Tokens:
    """The stored tokens of passages.

    `counts` int32[N] are the numbers of tokens of the passages, without prefix; `largest_id` is that of all tokens, -1
    where there are none.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file

        self.folder = folder
        summary = load_file(folder / _SUMMARY_FILE)
        self.counts: np.ndarray = summary["counts"]
        self.largest_id = int(summary["largest_id"][0])
        self._part = lru_cache(_OPEN_PARTS)(lambda index: _Part(part_path(folder, index)))

    def __reduce__(self) -> tuple[type["Tokens"], tuple[Path]]:
        return Tokens, (self.folder,)  # another process opens the files itself

    def __len__(self) -> int:
        return len(self.counts)

    def ids(self, passage: int) -> np.ndarray:
        """The token ids int32[T] of a passage."""
        return self._column("ids", passage)

    def byte_ends(self, passage: int) -> np.ndarray:
        """int32[T], the byte at which each token of a passage ends (see `fusion.vocabulary.token_bytes.byte_ends`)."""
        return self._column("byte_ends", passage)

    def _column(self, name: str, passage: int) -> np.ndarray:
        return self._part(passage // PASSAGES_PER_PART).column(name, passage % PASSAGES_PER_PART)


class _Part:
    """An open, memory-mapped part."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework="numpy")
        self._offsets: np.ndarray = self._file.get_tensor("offsets")

    def column(self, name: str, passage: int) -> np.ndarray:
        start, end = self._offsets[passage : passage + 2].tolist()
        if start == end:  # a slice of nothing is refused
            return np.zeros(0, np.int32)
        column: np.ndarray = self._file.get_slice(name)[start:end]
        return column.astype(np.int32)
