"""Shards: the same numbers packed or not, small, and refused when their bytes have changed."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fusion.errors import UserError
from fusion.inference.top_k import TopKPredictions
from harness.data.shards import (
    Compression,
    Shard,
    checked,
    existing_shards,
    position_bytes,
    shard_path,
    shard_size,
    write_shard,
)
from tests.shared import shared

LOSSY = np.array([2, 2, 700, -1, -1], np.int32)  # byte ends, the last two unknown


def _said(rng: np.random.Generator, m: int, k: int, vocabulary: int) -> TopKPredictions:
    p = np.sort(rng.dirichlet(np.full(k + 1, 0.3), m).astype(np.float32), axis=1)[:, ::-1]
    return TopKPredictions(
        ids=rng.integers(vocabulary, size=(m, k)).astype(np.int32),
        log_p=np.log(p[:, :k] + np.float32(1e-9)),
        tail=p[:, k],
        nll=rng.exponential(3, m).astype(np.float32),
        prefix_nll=rng.exponential(3, rng.integers(0, 4 * m + 1)).astype(np.float32) if m else None,
        spread=rng.normal(3, 1, (m, 2)).astype(np.float32),
    )


def _written(path: Path, results: list[TopKPredictions], *, wide: bool, compression: Compression) -> Shard:
    ends = [LOSSY[: max(len(r.nll) - 1, 0)] for r in results]
    tokens = [range(len(r.nll)) for r in results]
    write_shard(path, path.with_suffix(".beside"), results, ends, tokens, wide=wide, compression=compression)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return checked(path)


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("lengths", [[6, 1, 0, 4], [0, 5], [3, 0], [0, 0]])
def test_what_is_written_is_read(tmp_path: Path, compression: Compression, wide: bool, lengths: list[int]) -> None:
    rng = np.random.default_rng(0)
    results = [_said(rng, m, 5, 2**17 if wide else 2**16) for m in lengths]
    shard = _written(tmp_path / "shard", results, wide=wide, compression=compression)
    steps = np.uint16([0, 2, 0, 698, 65535, 65535])
    for passage, said in enumerate(results):
        found, m = shard.columns(passage), len(said.nll)
        expected = {
            "ids": said.ids.astype(np.uint32 if wide else np.uint16),
            "log_p": said.log_p.astype(np.float16),
            "tail": said.tail.astype(np.float16),
            "nll": said.nll,
            "steps": steps[:m],
            "spread": said.spread,
            "prefix_nll": np.zeros(0, np.float16) if not m else said.prefix_nll.astype(np.float16),
        }
        assert found.keys() == expected.keys()
        for name, column in expected.items():
            assert found[name].dtype == column.dtype
            np.testing.assert_array_equal(found[name], column)
        stored = sum(column.nbytes for column in found.values())
        assert stored == m * position_bytes(5, 2**17 if wide else 2**16) + found["prefix_nll"].nbytes


def _real(name: str, rng: np.random.Generator) -> TopKPredictions:
    """A real model's top 10 on 1,000 tokens of text; the tail, which the oracle lacks, is drawn."""
    with gzip.open(shared(f"oracle/alignment/{name}.json.gz")) as file:
        oracle = json.load(file)
    ids, logits = np.array(oracle["top_k_ids"], np.int32), np.array(oracle["top_k_logits"])
    tail = rng.beta(1, 4, len(ids))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True)) + np.log1p(-tail[:, None])
    gold = np.append(oracle["source_ids"][1:], -1)[:, None] == ids
    nats = np.where(gold.any(1), -np.where(gold, log_p, 0).sum(1), 3 - np.log(tail))
    return TopKPredictions(ids, log_p.astype(np.float32), tail.astype(np.float32), nats.astype(np.float32))


@pytest.mark.parametrize(("source", "wide", "plain", "packed"), [("smol", False, 56, 36), ("gemma", True, 76, 50)])
def test_a_real_position_takes_little(tmp_path: Path, source: str, wide: bool, plain: int, packed: int) -> None:
    rng = np.random.default_rng(0)
    oracles = {"smol": "smol_to_gemma", "gemma": "gemma_to_smol"}
    said = [_real(f"{oracles[source]}_{number}", rng) for number in (0, 10)]
    passages = [  # as long as passages of 2,000 bytes are
        TopKPredictions(*(column[start : start + 500] for column in (whole.ids, whole.log_p, whole.tail, whole.nll)))
        for whole in said
        for start in (0, 500)
    ]
    n, sizes = sum(len(passage.nll) for passage in passages), {}
    for compression in ("zstd", "none"):
        path = tmp_path / compression / "shard"
        path.parent.mkdir()
        ends = [np.cumsum(rng.integers(1, 8, len(p.nll) - 1)).astype(np.int32) for p in passages]
        tokens = [range(len(passage.nll)) for passage in passages]
        write_shard(path, path.with_suffix(".beside"), passages, ends, tokens, wide=wide, compression=compression)
        sizes[compression] = (path.stat().st_size - 1000) / n  # less the file's header, which a whole shard shares
    assert position_bytes(10, 2**18 if wide else 2**15) == plain
    assert sizes["none"] <= plain and sizes["zstd"] <= packed


def test_one_listing_tells_what_is_complete(tmp_path: Path) -> None:
    names = ["shard-000001.safetensors.tmp", "shard-000002.lease", "manifest.json"]
    for path in (shard_path(tmp_path, 3), shard_path(tmp_path, 1_234_567), *(tmp_path / name for name in names)):
        path.touch()
    assert existing_shards(tmp_path) == {3, 1_234_567}


def test_a_corpus_of_any_size_is_a_few_thousand_files() -> None:
    assert shard_size(16, 10**8) == 16 and shard_size(None, 0) == shard_size(None, 2**20) == 256
    for passages in (2**20 + 1, 1_440_000, 2**22, 2**24):
        assert 2000 < passages / shard_size(None, passages) <= 4096
    assert shard_size(None, 10**9) == 4096


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_changed_bytes_are_refused_by_name(tmp_path: Path, compression: Compression) -> None:
    rng = np.random.default_rng(1)
    path = tmp_path / "shard-000003.safetensors"
    _written(path, [_said(rng, 6, 5, 300), _said(rng, 3, 5, 300)], wide=False, compression=compression)
    whole = path.read_bytes()
    damaged = [whole[:size] for size in (0, 7, 100, len(whole) // 2, len(whole) - 1)]
    for place in rng.integers(len(whole), size=200):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"shard-000003\.safetensors does not match its checksum: remove that file"):
            checked(path)


def test_token_ids_that_the_store_would_cut_are_refused(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    said = TopKPredictions(np.array([[70_000]], np.int32), -one[:, None], 0 * one, 0 * one)
    with pytest.raises(UserError, match="name token 70000, beyond the vocabulary"):
        _written(tmp_path / "shard", [said], wide=False, compression="none")
    assert not list(tmp_path.iterdir())
