"""Rows of a data set's files: read, or refused in a sentence that names the file and the line."""

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.evaluation.overflow import WrongRow
from harness.store.files import parse_json

_MARK = "\ue000null\ue000"  # of a private use character, which no row has


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


@contextmanager
def naming_the_row(task: Any) -> Iterator[None]:
    """Inside the block, an error of a task of lm-eval becomes a WrongRow where one of its rows by itself gives one."""
    try:
        yield
    except Exception:
        for number, doc in enumerate(task.eval_docs, 1):
            try:
                task.doc_to_text(doc), task.doc_to_target(doc)
                if task.config.doc_to_choice is not None:
                    task.doc_to_choice(doc)
            except Exception as error:
                raise WrongRow(f"row {number}: {first_line(error)}") from error
        raise


def first_failing(rows: Sequence[Mapping[str, Any]], process: Callable[[Any], Any]) -> int | None:
    """The number, from 1, of the first row for which a task's own `process` raises an error; None where none does.

    It is given data sets of some of the rows, and the row is looked for by halves.
    """
    import datasets

    def fails(start: int, end: int) -> bool:
        try:
            process(datasets.Dataset.from_list(list(rows[start:end])))
        except Exception:  # whatever a task's own code raises
            return True
        return False

    start, end = 0, len(rows)
    if not rows or not fails(start, end):
        return None
    while end - start > 1:
        middle = (start + end) // 2
        start, end = (start, middle) if fails(start, middle) else (middle, end)
    return start + 1


def wrong_target(task: Any, doc: Mapping[str, Any]) -> str | None:
    """Why no answer to a question with choices can be right; None where one can. lm-eval scores such a row as 0."""
    from lm_eval.api.task import ConfigurableTask

    own = type(task).process_results is not ConfigurableTask.process_results or callable(task.config.process_results)
    if own or task.OUTPUT_TYPE != "multiple_choice":
        return None
    choices = task.doc_to_choice(doc)
    target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    for one in target if isinstance(target, list) else [target]:
        if not (one in choices if isinstance(one, str) else isinstance(one, int) and 0 <= one < len(choices)):
            return f"its answer {one!r} is none of its {len(choices)} choices"
    return None


def null_as_text(task: Any, doc: Mapping[str, Any]) -> str | None:
    """Why a question, one of its choices or its answer has the word None in it; None where no null is asked so.

    The templates of most tasks write a null so. One that is not written, or that a task has a case for, is no mistake.
    """
    for column in (name for name, value in doc.items() if _null_replaced(value) != value):
        marked = {**doc, column: _null_replaced(doc[column])}
        for what, write in (
            ("question", task.doc_to_text),
            ("choices", _choices(task)),
            ("answer", task.doc_to_target),
        ):
            with suppress(Exception):  # of a task's own code that expects null, or no text
                written = _text(write(marked))
                if _MARK in written and written.replace(_MARK, "None") == _text(write(doc)):
                    return f"its {column!r} is null, and its {what} would say None"
    return None


def _text(written: Any) -> str:
    return "\n".join(map(str, written)) if isinstance(written, list) else str(written)


def _null_replaced(value: Any) -> Any:
    """The value with a mark in the place of every null."""
    if isinstance(value, Mapping):
        return {key: _null_replaced(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_null_replaced(one) for one in value]
    return _MARK if value is None else value


def _choices(task: Any) -> Callable[[Any], Any]:
    return task.doc_to_choice if task.config.doc_to_choice is not None else lambda doc: None


def refuse_wide_integers(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises UserError naming the row and column of an integer beyond 64 bits, which no table can hold."""
    for number, row in enumerate(rows, 1):
        for column, value in row.items():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise UserError(
                    f"{path}, row {number} has an integer beyond 64 bits as its {column!r}: correct that row."
                )


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
