"""A data root of a few self-written rows in the schemas of the suites' data sets."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_WORDS = ["fox", "dog", "wizard", "ale"]


def write_rows(root: Path, place: str, rows: Sequence[dict[str, Any]]) -> Path:
    """Writes HUB ID/CONFIGURATION/SPLIT.parquet or .jsonl below `root`."""
    path = root / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _choices(n: int) -> dict[str, list[str]]:
    return {"text": [f"the {word} {n}" for word in _WORDS], "label": ["A", "B", "C", "D"]}


def make_data_root(root: Path, n: int = 5) -> Path:
    """n rows of each data set."""
    numbers = range(n)
    write_rows(
        root,
        "SaylorTwift/bbh/boolean_expressions/test.parquet",
        [{"input": f"{'not ' * i}True is", "target": str(i % 2 == 0)} for i in numbers],
    )
    write_rows(
        root,
        "SaylorTwift/bbh/navigate/test.jsonl",
        [{"input": f"Take {i} steps.\nOptions:\n- Yes\n- No", "target": "No"} for i in numbers],
    )
    for name in ("ARC-Easy", "ARC-Challenge"):
        rows = [{"question": f"Who jumps {i}?", "choices": _choices(i), "answerKey": "ABCD"[i % 4]} for i in numbers]
        write_rows(root, f"allenai/ai2_arc/{name}/test.parquet", rows)
    write_rows(
        root,
        "allenai/openbookqa/main/test.parquet",
        [{"question_stem": f"What sleeps {i}", "choices": _choices(i), "answerKey": "ABCD"[i % 4]} for i in numbers],
    )
    hellaswag = [
        {
            "activity_label": "Brewing",
            "ctx_a": f"Seven wizards brew {i} ale.",
            "ctx_b": "they",
            "endings": [f"drink the {word} slowly" for word in _WORDS],
            "label": str(i % 4),
        }
        for i in numbers
    ]
    write_rows(root, "Rowan/hellaswag/default/validation.parquet", hellaswag)
    write_rows(
        root,
        "aps/super_glue/boolq/validation.jsonl",
        [{"passage": f"The fox is {i}.", "question": "is the fox lazy", "label": i % 2} for i in numbers],
    )
    write_rows(
        root,
        "EleutherAI/lambada_openai/default/test.parquet",
        [{"text": f"the quick brown fox {i} jumps over"} for i in numbers],
    )
    write_rows(
        root,
        "mandarjoshi/trivia_qa/rc.nocontext/validation.jsonl",
        [{"question": f"Who is lazy {i}", "answer": {"aliases": ["dog", "the dog"], "value": "dog"}} for i in numbers],
    )
    javascript = [
        {
            "name": f"HumanEval_{i}_half",
            "language": "js",
            "prompt": f"// the half of x, {i}\nfunction half(x) {{\n",
            "tests": "const assert = require('node:assert');\nassert.equal(half(4), 2);",
            "stop_tokens": ["\nfunction ", "\n//"],
        }
        for i in numbers
    ]
    write_rows(root, "nuprl/MultiPL-E/humaneval-js/test.parquet", javascript)
    python = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def half(x):\n    # {i}\n",
            "test": "def check(half):\n    assert half(4) == 2",
            "entry_point": "half",
        }
        for i in numbers
    ]
    write_rows(root, "openai/openai_humaneval/openai_humaneval/test.parquet", python)
    return root
