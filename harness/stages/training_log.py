"""What a training leaves behind besides its model: readable without torch."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVE_FILE = "curve.jsonl"
"""In the artifact of a curve: a line for every measurement."""
LOG_FILE = "log.json"
LOST_BYTE = math.log(256)
"""Nats of a byte that a tokenizer does not spell, so that nobody gains by losing text."""


def curve_files(folder: Path) -> list[Path]:
    """What a training has measured so far, in its own folder or in that of a checkpoint: a file for every curve."""
    return sorted(folder.glob("curve-*.jsonl"))


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The held-out measurements of a curve's artifact: step, tokens seen, and one record a document."""
    return [json.loads(line) for line in (folder / CURVE_FILE).read_text(encoding="utf-8").splitlines()]


def nats_per_byte(records: Sequence[Mapping[str, Any]]) -> float:
    """Nats of all documents over their bytes, given a record of each: `nats`, `bytes`, and `lost` of those bytes."""
    return float(sum(r["nats"] + LOST_BYTE * r["lost"] for r in records) / sum(r["bytes"] for r in records))


def tokens_seen(folder: Path) -> int | None:
    """The tokens that a finished training was trained on; None where its log does not tell."""
    path = folder / LOG_FILE
    history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return next((int(entry["tokens"]) for entry in reversed(history) if "tokens" in entry), None)
