"""The Record: one example's result, the only thing that is stored; every aggregate is derived from records.

A record file is Parquet, written once and never changed; the schema's version lies in the file's metadata.
"""

import errno
import json
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from results.errors import UserError
from results.metrics import measure

SCHEMA_VERSION = "3"
NO_SEED = -1  # of a method without a seed, such as a model as it is
_VERSION_KEY = b"fusellm.records.schema"

_SCHEMA = pa.schema(
    [
        pa.field("experiment", pa.string(), nullable=False),
        pa.field("profile", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("suite", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("example", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("tokens", pa.int64(), nullable=True),
        pa.field("numerator", pa.float64(), nullable=False),
        pa.field("denominator", pa.float64(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("cluster", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
    ],
    metadata={_VERSION_KEY: SCHEMA_VERSION.encode()},
)
COLUMNS = tuple(_SCHEMA.names)
VALUES = ("numerator", "denominator", "weight")
KEY = tuple(name for name in COLUMNS if name not in (*VALUES, "cluster", "unit"))


@dataclass(frozen=True, slots=True)
class Record:
    """One example's result for one method.

    Stored beside it is `unit`, the units of numerator and denominator: "nats / bytes" for bits per byte.

    method is the row label in tables; seed is -1 for a method without one; task is the domain in the suite
    `perplexity`; example is a document's id or SHA-256. The metric says what numerator / denominator is
    (`bits_per_byte`: nats and bytes; a score: points and the most there are; `passed`: samples of a problem that pass,
    and all of them; `lost_bytes`, beside the others where there are any: bytes of the example that its tokens do not
    spell, and all of them). tokens counts the training tokens seen when it was measured along a training run, and is
    None for the final evaluation. cluster names what the example shares with others, of any task, that therefore do not
    vary independently: the passage that it asks about, the problem that it translates; '' for nothing.
    """

    experiment: str
    profile: str
    method: str
    seed: int
    suite: str
    task: str
    example: str
    metric: str
    numerator: float
    denominator: float
    weight: float = 1.0
    tokens: int | None = None
    cluster: str = ""

    @property
    def unit(self) -> str:
        """The units of numerator and denominator."""
        return measure(self.metric).stored


def write(path: Path | str, records: Iterable[Record], provenance: Mapping[str, object] | None = None) -> None:
    """Write one record file, complete or not at all; `provenance`, where given, lies beside it as `<name>.json`.

    Files are append-only: writing the same records again does nothing, writing others to a path that exists is
    refused. Raises UserError for a path that does not end in .parquet, for values that are no numbers, for a
    denominator or weight that is not positive, and for two different values of one example.
    """
    path = Path(path)
    if path.suffix != ".parquet":
        raise UserError(f"a record file ends in .parquet, so {path} would never be read; give it that ending")
    frame = _settle(_checked(_frame(records).assign(file=str(path), evaluation="")))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _refuse_other(path, frame)
        return
    if provenance is not None:
        # Before the records, so that there are no records without it.
        text = json.dumps(provenance, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.json")
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair as JSON has it
        _sync(temporary)
        temporary.replace(path.with_suffix(".json"))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:  # by name, pyarrow takes a folder with a colon for an address
            pq.write_table(pa.Table.from_pandas(frame, schema=_SCHEMA, preserve_index=False), file)
        _sync(temporary)  # data before the name: a power loss leaves no torn file of records
        try:
            os.link(temporary, path)  # unlike a rename it never replaces what another process has just written there
        except FileExistsError:
            _refuse_other(path, frame)
        except OSError:  # a file system without hard links
            temporary.replace(path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def read(paths: Path | str | Sequence[Path | str]) -> pd.DataFrame:
    """All records of the files and of the folders (searched through) in `paths`, in one order whatever theirs was.

    Exact duplicates count once. Columns are COLUMNS (tokens: Int64) and evaluation, the fingerprint of what was
    evaluated ('' where the file's provenance does not tell). Raises UserError for a path that does not exist, a file
    that is no record file, a schema version other than this one, and two files that disagree about one example.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    files = _files(Path(one) for one in listed)
    frames = [_checked(_load(file).assign(file=str(file), evaluation=_evaluation(file))) for file in files]
    if not frames:
        return _frame([]).assign(evaluation=pd.Series([], dtype="str"))
    return _settle(pd.concat(frames, ignore_index=True))


def _frame(records: Iterable[Record]) -> pd.DataFrame:
    rows = list(records)
    # No dtype is guessed: a file of evaluations without training tokens must read like one with them.
    dtypes = dict.fromkeys(COLUMNS, "str") | dict.fromkeys(VALUES, "float64") | {"seed": "int64", "tokens": "Int64"}
    return pd.DataFrame({name: pd.Series([getattr(row, name) for row in rows], dtype=dtypes[name]) for name in COLUMNS})


def _files(paths: Iterable[Path]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"there are no records at {path}; run the experiment first or name another folder")
        inside = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        files.update({file.resolve(): file for file in inside})
    return [files[resolved] for resolved in sorted(files)]


def _load(file: Path) -> pd.DataFrame:
    try:
        opened = pq.ParquetFile(file)
        metadata = opened.schema_arrow.metadata or {}
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet ({error}); remove it and evaluate again") from error
    with opened:
        if _VERSION_KEY not in metadata:
            raise UserError(
                f"{file} is no record file (it carries no record schema); move it out of the records folder"
            )
        version = metadata[_VERSION_KEY].decode()
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{file} has record schema {version!r} but this version reads only {SCHEMA_VERSION!r}; evaluate again "
                "or read it with the version of fusellm-harness that wrote it"
            )
        if not opened.schema_arrow.equals(_SCHEMA, check_metadata=False):
            raise UserError(f"{file} says record schema {version!r} but its columns differ from it; evaluate again")
        try:
            # Nullable integers, because by default pandas makes a column with nulls a float64.
            frame = opened.read().to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} is damaged ({error}); remove it and evaluate again") from error
    return frame.astype({"seed": "int64"})


def _evaluation(file: Path) -> str:
    beside = file.with_suffix(".json")
    if not beside.exists():
        return ""
    try:
        return str(json.loads(beside.read_text(encoding="utf-8")).get("evaluation", ""))
    except (ValueError, AttributeError) as error:
        raise UserError(f"{beside} is no provenance ({error}); remove it or evaluate again") from error


def _checked(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame itself if every number in it can be computed with; raises UserError naming the first that cannot."""
    good = np.isfinite(frame["numerator"]) & np.isfinite(frame["denominator"]) & np.isfinite(frame["weight"])
    good &= (frame["denominator"] > 0) & (frame["weight"] > 0) & (frame["seed"] >= NO_SEED)
    good &= frame["tokens"].fillna(0) >= 0
    if not good.all():
        bad = frame[~good].iloc[0]
        raise UserError(
            f"a record cannot be used in {bad['file']}: {_name(bad)} has numerator {bad['numerator']}, denominator "
            f"{bad['denominator']}, weight {bad['weight']}, seed {bad['seed']}, tokens {bad['tokens']} (these must be "
            "finite, denominator and weight positive, seed from -1, tokens from 0); evaluate it again"
        )
    return frame


def _settle(frame: pd.DataFrame) -> pd.DataFrame:
    """Records without exact duplicates, sorted by key; raises UserError, naming both files, where values disagree."""
    key = list(KEY)
    # Sorted, so that sums over the records (and so every printed digit) do not depend on the order of files.
    frame = frame.sort_values([*key, "evaluation"], kind="stable", ignore_index=True)
    frame = frame.drop_duplicates(
        [*key, *VALUES, "cluster"], keep="last", ignore_index=True
    )  # a copy may lack its provenance
    again = frame.duplicated(key, keep=False)
    if again.any():
        named = frame[again].sort_values([*key, "file"])
        first, second = named.iloc[0], named.iloc[1]
        where = f"{first['file']} twice" if first["file"] == second["file"] else f"{first['file']} and {second['file']}"
        values = " against ".join(
            f"{one['numerator']:.17g} / {one['denominator']:.17g}{one['cluster'] and ', cluster ' + one['cluster']}"
            for one in (first, second)
        )
        raise UserError(f"records disagree about {_name(first)}: {values}, in {where}; remove the wrong one")
    return frame.drop(columns="file")


def _name(row: pd.Series) -> str:
    at = "" if pd.isna(row["tokens"]) else f", at {row['tokens']} tokens"
    return (
        f"{row['metric']} of {row['method']} (seed {row['seed']}{at}) on {row['suite']}/{row['task']} example "
        f"{row['example']!r} in {row['experiment']} ({row['profile']})"
    )


def _refuse_other(path: Path, frame: pd.DataFrame) -> None:
    """Raises UserError unless the file at `path` holds exactly these records."""
    if not _settle(_checked(_load(path).assign(file=str(path), evaluation=""))).equals(frame):
        raise UserError(
            f"{path} exists and holds other records; record files are never changed, so move it away or choose another "
            "path"
        )
