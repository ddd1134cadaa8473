"""What a training leaves behind besides its model: readable without torch."""

import json
from pathlib import Path
from typing import Any

CURVE_FILE = "curve.jsonl"


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The held-out measurements of a finished training: step, tokens seen, and one record a document."""
    return [json.loads(line) for line in (folder / CURVE_FILE).read_text(encoding="utf-8").splitlines()]
