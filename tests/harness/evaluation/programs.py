"""Problems of MultiPL-E and completions of them, for tests that run or read them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.evaluation.multipl_e.execute import Executed
from harness.evaluation.sandbox import Limits
from tests.shared import shared

LIMITS = Limits(cpu=2, wall=20.0)
PROMPT = {
    "name": "HumanEval_53_add",
    "language": "python",
    "prompt": "def add(x, y):\n",
    "tests": "assert add(2, 3) == 5\n",
    "stop_tokens": ["\ndef", "\n#"],
}
RIGHT, WRONG = "    return x + y\n", "    return x - y\n"


def rows_of(name: str) -> dict[str, dict[str, Any]]:
    """A language's problems by name, Python's from HumanEval."""
    import pyarrow.parquet as pq

    if name != "python":
        table = pq.read_table(shared(f"data/hub/nuprl/MultiPL-E/humaneval-{name}/test.parquet"))
        return {row["name"]: row for row in table.to_pylist()}
    table = pq.read_table(shared("data/hub/openai/openai_humaneval/openai_humaneval/test.parquet"))
    rows = {}
    for row in table.to_pylist():
        key = f"{row['task_id'].replace('/', '_')}_{row['entry_point']}"
        rows[key] = {**PROMPT, "name": key, "prompt": row["prompt"], "tests": f"{row['test']}\n"}
    return rows


def problem(*completions: str, **changed: Any) -> dict[str, Any]:
    return {**PROMPT, "completions": list(completions), **changed}


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    return path


def results_of(done: Executed) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in done.results.read_text(encoding="ascii").splitlines()]
    return [result for line in lines for result in line["results"]]
