import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from results.errors import UserError
from results.records import COLUMNS, Record, read, write
from tests.results.sample import curve, final

ONE = Record("main", "small", "CLM", 0, "perplexity", "code", "doc", "bits_per_byte", 70.0, 100.0)


def test_round_trip_keeps_every_column_and_the_missing_tokens(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [ONE, replace(ONE, tokens=2**53 + 1)])
    frame = read(tmp_path / "a.parquet")
    assert tuple(frame.columns) == (*COLUMNS, "evaluation")
    assert frame["tokens"].isna().tolist() == [False, True]
    assert int(frame["tokens"].iloc[0]) == 2**53 + 1
    assert str(frame["seed"].dtype) == "int64"
    assert frame["numerator"].tolist() == [70.0, 70.0]


def test_an_empty_folder_reads_like_a_full_one(tmp_path: Path) -> None:
    empty = read(tmp_path)
    write(tmp_path / "a.parquet", [ONE])
    full = read(tmp_path)
    assert empty.empty
    assert empty.dtypes.to_dict() == full.dtypes.to_dict()


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(1, 6))
def test_order_split_and_duplication_of_files_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, rng: random.Random, files: int
) -> None:
    folder = tmp_path_factory.mktemp("records")
    records = final("CLM", seeds=(0, 1), documents={"code": 6, "news": 4}) + curve("CLM", {0: 0.8, 10: 0.7})
    write(folder / "whole.parquet", records)
    paths = []
    for i in range(files):
        part = [one for one in records if rng.random() < 0.5] if i else list(records)
        rng.shuffle(part)
        write(folder / "parts" / f"{i}.parquet", part)
        paths.append(folder / "parts" / f"{i}.parquet")
    rng.shuffle(paths)
    assert read([*paths, folder / "parts"]).equals(read(folder / "whole.parquet"))


def test_disagreement_names_both_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [ONE])
    write(tmp_path / "b.parquet", [replace(ONE, numerator=71.0)])
    with pytest.raises(
        UserError, match=r"disagree about .*doc.*: 70 / 100 against 71 / 100, in .*a\.parquet and .*b\.parquet"
    ):
        read(tmp_path)


def test_disagreement_inside_one_write_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="twice"):
        write(tmp_path / "a.parquet", [ONE, replace(ONE, denominator=99.0)])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_schema_version_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [ONE])
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.replace_schema_metadata({b"fusellm.records.schema": b"99"}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet has record schema '99'"):
        read(tmp_path)


@pytest.mark.parametrize("metadata", [{}, {b"fusellm.records.schema": b"1"}])
def test_another_parquet_file_is_refused(tmp_path: Path, metadata: dict[bytes, bytes]) -> None:
    table = pa.table({"x": [1]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet"):
        read(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", final("CLM"))
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.parquet cannot be read"):
        read(tmp_path)


@pytest.mark.parametrize(
    "bad",
    [
        {"numerator": float("nan")},
        {"numerator": float("inf")},
        {"denominator": 0.0},
        {"weight": -1.0},
        {"seed": -2},
        {"tokens": -1},
    ],
)
def test_values_that_cannot_be_computed_with_are_refused(tmp_path: Path, bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        write(tmp_path / "a.parquet", [replace(ONE, **bad)])  # type: ignore[arg-type]


def test_files_are_append_only(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [ONE, replace(ONE, example="other")])
    before = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "a.parquet", [replace(ONE, example="other"), ONE])
    with pytest.raises(UserError, match="holds other records"):
        write(tmp_path / "a.parquet", [ONE])
    assert (tmp_path / "a.parquet").read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["a.parquet"]


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    records = final("CLM")
    write(tmp_path / "a.parquet", records)
    write(tmp_path / "b.parquet", records[::-1])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_provenance_lies_beside(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [ONE], provenance={"artifact": "abc"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"artifact": "abc"}


def test_the_evaluation_is_known_of_each_record_though_a_copy_lacks_its_provenance(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [ONE], provenance={"evaluation": "abc"})
    write(tmp_path / "z.parquet", [ONE])
    assert read(tmp_path)["evaluation"].tolist() == ["abc"]
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(UserError, match=r"a\.json is no provenance"):
        read(tmp_path)


@pytest.mark.slow
def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from results.records import Record, write\n"
        "for i in range(40):\n"
        "    for name in (f'{sys.argv[1]}-{i}', f'both-{i}'):\n"
        "        one = Record('main', 'small', name, 0, 'perplexity', 'code', 'doc', 'bits_per_byte', 70.0, 100.0)\n"
        f"        write({str(tmp_path)!r} + f'/{{name}}.parquet', [one], {{'evaluation': name}})"
    )
    root = Path(__file__).parents[2]
    running = [subprocess.Popen([sys.executable, "-c", code, name], cwd=root) for name in ("one", "two")]
    assert [process.wait() for process in running] == [0, 0]
    found = read(tmp_path)
    assert set(found["method"]) == {f"{name}-{i}" for name in ("one", "two", "both") for i in range(40)}
    assert (found["method"] == found["evaluation"]).all()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_wrong_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records at"):
        read(tmp_path / "none")
    with pytest.raises(UserError, match=r"ends in \.parquet"):
        write(tmp_path / "a.csv", [ONE])
