"""The rows of the benchmark: MultiPL-E's own for nine languages, HumanEval's in the same fields for Python."""

from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.multipl_e.languages import language_of

FIELDS = ("name", "language", "prompt", "tests", "stop_tokens")
_HUMANEVAL = ("task_id", "prompt", "test", "entry_point")
_PYTHON_STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]  # Chen et al. 2021, section 2.2


def rows_file(language: str, data_root: Path) -> Path:
    """The Parquet or JSON lines file of a language's rows below `data_root`; raises UserError where it is missing."""
    name = language_of(language).name
    path = "openai/openai_humaneval/openai_humaneval" if name == "python" else f"nuprl/MultiPL-E/humaneval-{name}"
    stem = data_root.expanduser() / path / "test"
    found = next((file for suffix in (".parquet", ".jsonl") if (file := stem.with_suffix(suffix)).exists()), None)
    if found is None:
        raise UserError(
            f"{stem}.parquet (or .jsonl) is missing, which holds the rows of {language_of(language).title}."
        )
    return found


def read_rows(language: str, data_root: Path) -> list[dict[str, Any]]:
    """A language's problems in the fields FIELDS; raises UserError for rows that lack a column."""
    from harness.multipl_e.files import json_lines

    file = rows_file(language, data_root)
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        rows = pq.read_table(file).to_pylist()
    else:
        rows = [row for _, row in json_lines(file)]
    python = language_of(language).name == "python"
    for number, row in enumerate(rows, 1):
        missing = [key for key in (_HUMANEVAL if python else FIELDS) if row.get(key) is None]
        if missing:
            raise UserError(f"{file}, row {number} lacks {', '.join(missing)}: take the rows as they are published.")
    return [_of_humaneval(row) if python else {key: row[key] for key in FIELDS} for row in rows]


def _of_humaneval(row: dict[str, Any]) -> dict[str, Any]:
    call = f"check({row['entry_point']})"
    calls = row["test"].rstrip().endswith(call)  # not as published, but some copies do
    return {
        "name": f"{row['task_id'].replace('/', '_')}_{row['entry_point']}",
        "language": "python",
        "prompt": row["prompt"],
        "tests": row["test"] if calls else f"{row['test']}\n{call}\n",
        "stop_tokens": list(_PYTHON_STOPS),
    }
