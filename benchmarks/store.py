"""What a stored position takes, and how fast it is read."""

import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.support import machine
from benchmarks.support.inputs import SOURCE, TARGET, Inputs
from benchmarks.support.page import Result
from fusion.inference.top_k import TopKPredictions
from fusion.types import Predictions
from harness.data.shards import Compression, Shard, write_shard

_CASES: tuple[tuple[str, str, Compression, float], ...] = (
    ("below 65,536 ids", TARGET, "none", 48.0),
    ("below 65,536 ids", TARGET, "zstd", 36.0),
    ("above 65,536 ids", SOURCE, "none", 68.0),
    ("above 65,536 ids", SOURCE, "zstd", 50.0),
)


def store(inputs: Inputs, *, quick: bool) -> list[Result]:
    """A shard of real top tens, of a small and of a large vocabulary, plain and compressed."""
    passages = list(islice(cycle(inputs.passages), 4 if quick else 256))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for vocabulary, name, compression, goal in _CASES:
            what = f"a shard, {vocabulary}, {'plain' if compression == 'none' else 'compressed'}"
            predictions = [passage.predictions[name] for passage in passages]
            results += _measure(what, Path(folder), predictions, compression, goal, wide=name == SOURCE)
    return results


def _measure(
    what: str, folder: Path, predictions: Sequence[Predictions], compression: Compression, goal: float, *, wide: bool
) -> list[Result]:
    path, published = folder / "shard.safetensors", folder / "published.arrow"
    written = [TopKPredictions(r.ids, r.log_p, r.tail, r.nll) for r in predictions]
    ends = [r.byte_ends[1:] for r in predictions]
    tokens = [r.tokens for r in predictions]
    write_shard(path, folder / "beside", written, ends, tokens, wide=wide, compression=compression)
    for columns, passage in zip(_read(path, len(predictions)), predictions, strict=True):
        if not (columns["ids"] == passage.ids).all() or not (columns["nll"] == passage.nll).all():
            raise AssertionError("what is read from a shard is not what was written to it")
    _write_published(published, predictions)
    positions = sum(len(r.tokens) for r in predictions)
    taken = machine.seconds(partial(_read, path, len(predictions)))
    reference = machine.seconds(partial(_read_published, published), repeat=1)
    in_memory = sum(array.nbytes for columns in _read(path, 1) for array in columns.values()) / len(
        predictions[0].tokens
    )
    size = path.stat().st_size / positions
    return [
        Result(
            f"{what}: size",
            "bytes a position",
            round(size, 1),
            goal,
            reference=published.stat().st_size / positions,
            note=f"{positions:,} positions of {len(predictions)} passages, k = 10, header and offsets included, to a "
            "tenth of a byte: real top tens of four passages again and again (each is compressed by itself), with "
            "random tails, which were not recorded. Reference: an Arrow file of lists, 64-bit ids and 32-bit logits.",
        ),
        Result(
            f"{what}: loading",
            "million positions/s",
            positions / taken / 1e6,
            1.0,
            "more",
            reference=positions / reference / 1e6,
            roofline=machine.bandwidth() / (size + in_memory) / 1e6,
            note="passage by passage, from files in the page cache. Reference: the Arrow file's rows as Python lists, "
            "as the published collator takes them. Roofline: copying the bytes of the file to those of the arrays.",
        ),
    ]


def _read(path: Path, passages: int) -> list[dict[str, np.ndarray]]:
    shard = Shard(path)
    return [shard.columns(passage) for passage in range(passages)]


def _write_published(path: Path, predictions: Sequence[Predictions]) -> None:
    schema = pa.schema(
        [("per_step_indices", pa.list_(pa.list_(pa.int64()))), ("per_step_logits", pa.list_(pa.list_(pa.float32())))]
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for passage in predictions:
            row = {"per_step_indices": passage.ids.tolist(), "per_step_logits": passage.log_p.tolist()}
            file.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))


def _read_published(path: Path) -> list[dict[str, list]]:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all().to_pylist()
