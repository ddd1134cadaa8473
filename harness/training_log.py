"""What a training leaves behind besides its model: readable without torch."""

import json
from pathlib import Path
from typing import Any

CURVE_FILE = "curve.jsonl"


def whole_lines(path: Path) -> list[str]:
    """Lines of a file; the last one may have been cut short by a kill and is left out then."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The held-out measurements of a training: step, tokens seen, and one record a document."""
    return [json.loads(line) for line in whole_lines(folder / CURVE_FILE)]
