"""Rows of a data set's files: read, or refused in a sentence that names the file and the line."""

import errno
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.store.files import parse_json


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file of Parquet, JSON lines or a JSON list.

    Raises UserError, naming the file and the line, for what cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".parquet":
        try:
            with pq.ParquetFile(path) as file:
                rows: list[dict[str, Any]] = file.read().to_pylist()
                return rows
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{path} is no Parquet file, or is damaged: copy it again.") from None
    raw, rows = path.read_bytes(), []
    is_list = path.suffix == ".json" and raw.lstrip().startswith(b"[")
    for number, line in enumerate([raw] if is_list else raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError as reason:
            raise UserError(f"{path}, line {number} is not JSON in UTF-8 ({reason}): correct that line.") from None
        rows += value if is_list else [value]
        if not all(isinstance(row, dict) for row in rows[-1:]):
            raise UserError(f"{path}, line {number} is no JSON object: correct that line.")
    return rows


def first_line(error: BaseException) -> str:
    """Class and message of an error, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def refuse_cache(error: BaseException | None, variable: str = "HF_DATASETS_CACHE") -> None:
    """Raises UserError where the cause of an error is that the folder that `variable` names cannot be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{error.filename or 'The folder of ' + variable} cannot be written ({error.strerror}): set "
                f"{variable} to a folder that can be."
            ) from None
        error = error.__cause__ or error.__context__
