"""The files of stored predictions. A shard holds a model's predictions on some passages and is complete or absent.

A shard is a safetensors file of the columns `ids`, `log_p`, `tail`, `nll`, `steps` and `spread` (and `log_z` where
temperatures were asked for), with the positions of all passages concatenated, of the passages' `offsets` in them, and
of `tokens`, a hash of each passage's token ids, which are not stored themselves. `prefix_nll` has several values a
token, and `prefix_offsets` the passages' first values. In a compressed shard the columns are empty and only
give types and shapes; `zstd` holds one frame a passage, so that each is read without its neighbours, and `frames` the
offsets of the frames.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fusion.errors import UserError
from harness.store.files import rename_durably

if TYPE_CHECKING:
    from fusion.inference.top_k import TopKPredictions

Compression = Literal["zstd", "none"]
StoreDType = Literal["float16", "float32"]
Columns = dict[str, np.ndarray]
LOST = np.uint16(65535)  # a step to where the tokens no longer spell the text
_PASSAGES_PER_SHARD = (256, 4096)  # a killed process loses a shard, so that it must not be large
_MOST_SHARDS = 4096  # file servers are slow with folders of many files
_SHARD = re.compile(r"shard-(\d+)\.safetensors")
_FLOATS = ("log_p", "tail", "nll", "log_z", "spread", "prefix_nll")
_COLUMNS = ("ids", "log_p", "tail", "nll", "steps", "log_z", "spread")


def shard_path(folder: Path, index: int) -> Path:
    """The file of a shard in the artifact of the predictions."""
    return folder / f"shard-{index:06d}.safetensors"


def shard_size(setting: int | None, passages: int) -> int:
    """The number of passages in one shard.

    Default: 256, doubled until there are at most 4,096 shards or a shard has 4,096 passages.
    """
    if setting is not None:
        return setting
    size, most = _PASSAGES_PER_SHARD
    while size < most and passages > size * _MOST_SHARDS:
        size *= 2
    return size


def existing_shards(folder: Path) -> set[int]:
    """The indices of the shards that are complete, by one listing of the folder."""
    with os.scandir(folder) as entries:
        return {int(match[1]) for entry in entries if (match := _SHARD.fullmatch(entry.name))}


def position_bytes(k: int, vocabulary: int, dtype: StoreDType = "float16", temperatures: int = 0) -> int:
    """Bytes of one position: ids, log-probabilities and tail in `dtype`, nll, spread and log_z in float32, uint16 step.

    Compressed with real models' top 10 in float16, a position takes about 43 of 56 bytes (vocabulary of at most
    65,536) and 45 of 76 bytes (larger vocabularies).
    """
    return k * (2 if vocabulary <= 65536 else 4) + np.dtype(dtype).itemsize * (k + 1) + 4 + 8 + 2 + 4 * temperatures


def write_shard(
    path: Path,
    beside: Path,
    results: "Sequence[TopKPredictions]",
    byte_ends: Sequence[np.ndarray],
    tokens: Sequence[Sequence[int] | np.ndarray],
    *,
    wide: bool,
    compression: Compression,
    dtype: StoreDType = "float16",
) -> None:
    """Writes a shard to `beside` and renames it to `path`.

    Args:
        path: The shard.
        beside: A temporary file on the same file system.
        results: The predictions of each passage; a skipped passage has none.
        byte_ends: Those of each passage's tokens.
        tokens: The token ids that the model read of each passage.
        wide: Ids are stored as uint32 instead of uint16.
        compression: `zstd` or `none`; the numbers are the same.
        dtype: Type of log-probabilities and tails.

    Raises:
        UserError: A token id does not fit, or a token stands for more than 65,534 bytes of text.
    """
    steps = [_steps(ends) for result, ends in zip(results, byte_ends, strict=True) if len(result.nll)]
    ids = np.concatenate([r.ids for r in results])
    width = np.uint32 if wide else np.uint16
    if ids.max(initial=0) > np.iinfo(width).max:  # a cast would wrap around and name other tokens
        raise UserError(
            f"the model's logits name token {ids.max()}, beyond the vocabulary of its config.json: correct vocab_size."
        )
    tensors = {
        "ids": ids.astype(width),
        "log_p": np.concatenate([r.log_p for r in results]).astype(dtype),
        "tail": np.concatenate([r.tail for r in results]).astype(dtype),
        "nll": np.concatenate([r.nll for r in results]).astype(np.float32),
        "steps": np.concatenate([np.zeros(0, np.uint16), *steps]),
        "offsets": np.cumsum([0, *(len(r.nll) for r in results)]).astype(np.int64),
        "tokens": np.array([token_digest(ids) for ids in tokens], np.uint64),
    }
    log_z = [r.log_z for r in results if r.log_z is not None]
    if log_z:
        tensors["log_z"] = np.concatenate(log_z).astype(np.float32)
    spread = [np.zeros((len(r.nll), 2), np.float32) if r.spread is None else r.spread for r in results]
    tensors["spread"] = np.concatenate(spread).astype(np.float32)
    prefix_nll = [np.zeros(0, np.float32) if r.prefix_nll is None else r.prefix_nll for r in results]
    tensors["prefix_nll"] = np.concatenate(prefix_nll).astype(dtype)
    tensors["prefix_offsets"] = np.cumsum([0, *map(len, prefix_nll)]).astype(np.int64)
    if compression == "zstd":
        tensors = _compressed(tensors)
    write_tensors(path, beside, tensors)


def write_tensors(path: Path, beside: Path, tensors: Columns) -> None:
    """Writes a safetensors file with its checksum (see `checked_tensors`) to `beside` and renames it to `path`."""
    from safetensors.numpy import save

    try:
        beside.write_bytes(save(tensors, {"sha256": _digest(tensors)}))
        rename_durably(beside, path)
    finally:  # a full disk needs the space
        beside.unlink(missing_ok=True)


def _steps(ends: np.ndarray) -> np.ndarray:
    """uint16[M], the bytes from each position to the next, by a passage's `byte_ends`[M - 1]."""
    steps = np.diff(ends, prepend=0).astype(np.int64)
    if steps[ends >= 0].max(initial=0) >= int(LOST):
        raise UserError("a token stands for more than 65,534 bytes of text: the store cannot hold it.")
    steps[ends < 0] = int(LOST)
    return np.concatenate([[0], steps]).astype(np.uint16)


def _compressed(tensors: Columns) -> Columns:
    import pyarrow as pa

    codec = pa.Codec("zstd", compression_level=1)
    columns = {name: tensors[name] for name in _COLUMNS if name in tensors}
    places = zip(pairwise(tensors["offsets"].tolist()), pairwise(tensors["prefix_offsets"].tolist()), strict=True)
    frames: list[bytes] = [
        codec.compress(
            _joined({name: column[start:end] for name, column in columns.items()})
            + _joined({"prefix_nll": tensors["prefix_nll"][first:last]}),
            asbytes=True,
        )
        for (start, end), (first, last) in places
    ]
    return {
        "offsets": tensors["offsets"],
        "tokens": tensors["tokens"],
        "prefix_offsets": tensors["prefix_offsets"],
        "prefix_nll": tensors["prefix_nll"][:0],
        "frames": np.cumsum([0, *map(len, frames)]).astype(np.int64),
        "zstd": np.frombuffer(b"".join(frames), np.uint8),
        **{name: column[:0] for name, column in columns.items()},
    }


def _joined(columns: Columns) -> bytes:
    """The bytes of all columns, rearranged so that they compress well: floats are stored byte plane by byte plane.

    The bits of log p grow little from a position's first entry to its last, so that only the differences are stored.
    """
    parts = []
    for name, column in columns.items():
        if name == "log_p":
            bits = column.view(f"u{column.itemsize}")
            column = np.diff(bits.T, axis=0, prepend=bits.dtype.type(0))
        if name in _FLOATS:
            column = np.ascontiguousarray(column).view(np.uint8).reshape(-1, column.itemsize).T
        parts.append(column.tobytes())
    return b"".join(parts)


def _parted(raw: memoryview, positions: int, empty: Columns) -> Columns:
    """The inverse of `_joined`; `empty` are the columns with no positions, which give types and shapes."""
    columns, start = {}, 0
    for name, like in empty.items():
        shape = (positions, *like.shape[1:])
        size = int(np.prod(shape)) * like.itemsize
        column = np.frombuffer(raw, np.uint8, size, start)
        if name in _FLOATS:
            column = np.ascontiguousarray(column.reshape(like.itemsize, -1).T).reshape(-1)
        if name == "log_p":
            grown = column.view(f"u{like.itemsize}").reshape(shape[::-1])
            column = np.ascontiguousarray(grown.cumsum(axis=0, dtype=grown.dtype).T).reshape(-1)
        columns[name] = column.view(like.dtype).reshape(shape)
        start += size
    return columns


def token_digest(tokens: Sequence[int] | np.ndarray) -> int:
    """A hash of 64 bits of a passage's token ids, in their order."""
    return int.from_bytes(hashlib.blake2b(np.asarray(tokens, "<i4").tobytes(), digest_size=8).digest(), "little")


def _digest(tensors: Columns) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tensors[name].shape};".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


class Shard:
    """An open, memory-mapped shard.

    `offsets` int64[passages + 1] are the passages' first positions, `tokens` uint64[passages] the hashes of their ids.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        self._file = safe_open(path, framework="numpy")
        self.offsets: np.ndarray = self._file.get_tensor("offsets")
        self.tokens: np.ndarray = self._file.get_tensor("tokens")
        self._prefix_offsets: np.ndarray = self._file.get_tensor("prefix_offsets")
        self._frames = self._empty = None
        there = self._file.keys()
        self._names = [name for name in _COLUMNS if name in there]
        if "frames" in there:
            self._frames = self._file.get_tensor("frames")
            self._empty = {name: self._file.get_tensor(name) for name in self._names}
            self._no_prefixes = {"prefix_nll": self._file.get_tensor("prefix_nll")}

    def columns(self, passage: int) -> Columns:
        """The stored columns of a passage: ids[M, k], log_p[M, k], tail[M], nll[M], steps[M], log_z[M, n],
        spread[M, 2], prefix_nll[P].
        """
        first_prefix, last_prefix = self._prefix_offsets[passage : passage + 2].tolist()
        start, end = self.offsets[passage : passage + 2].tolist()
        if start == end:
            return {name: self._file.get_tensor(name)[:0] for name in (*self._names, "prefix_nll")}
        if self._frames is None or self._empty is None:
            columns = {name: self._file.get_slice(name)[start:end] for name in self._names}
            columns["prefix_nll"] = np.zeros(0, columns["log_p"].dtype)
            if first_prefix < last_prefix:  # a slice of nothing is refused
                columns["prefix_nll"] = self._file.get_slice("prefix_nll")[first_prefix:last_prefix]
            return columns
        import pyarrow as pa

        first, last = self._frames[passage : passage + 2].tolist()
        size = (end - start) * sum(int(np.prod(e.shape[1:])) * e.itemsize for e in self._empty.values())
        prefixes = last_prefix - first_prefix
        whole = size + prefixes * self._no_prefixes["prefix_nll"].itemsize
        raw = memoryview(pa.decompress(self._file.get_slice("zstd")[first:last], whole, codec="zstd"))
        return _parted(raw[:size], end - start, self._empty) | _parted(raw[size:], prefixes, self._no_prefixes)


def checked(path: Path) -> Shard:
    """An open shard, after its bytes were compared with their checksum. Raises UserError where they differ."""
    checked_tensors(path)
    return Shard(path)


def checked_tensors(path: Path) -> Columns:
    """What `write_tensors` wrote. Raises UserError where the bytes differ from their checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
            sha256 = (file.metadata() or {}).get("sha256")
    except SafetensorError:
        tensors, sha256 = {}, "damaged"
    if _digest(tensors) != sha256:
        raise UserError(f"{path} does not match its checksum: remove that file to have it made again.")
    return tensors
