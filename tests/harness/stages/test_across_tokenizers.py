"""Rows that learn across tokenizers, through the whole line: their losses fall, and an empty row teaches nothing."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.errors import UserError
from harness.experiment.candidates import candidates
from harness.experiment.plan import plan
from tests.harness.bigrams import Bigrams, experiment, other
from tests.harness.listening import rows_of

TEXTS = ["abcdab", "acbdcd", "ddabc"]
TARGET = Bigrams({"<s>": {"a": 0.3, "ab": 0.2}, "ab": {"cd": 0.3, "c": 0.05}, "a": {"c": 0.4}, "d": {"d": 0.6}})
TEACHER = other(
    {"<s>": {"ab": 0.5, "x": 0.25}, "ab": {"c": 0.5, "cd": 0.2}, "c": {"d": 0.8}, "d": {"a": 0.5, "ab": 0.2}}
)
ROWS: dict[str, dict[str, Any]] = {
    "gold": {"method": "gold"},
    "gold, observed": {"method": "gold", "merge": "observed"},
    "bpm": {"method": "bpm"},
    "simct": {"method": "simct"},
    "strict": {"method": "strict", "span_weight": 0.1},
    "xtoken, P-KL": {"method": "xtoken", "lambda": 0, "balance": "none"},
    "xtoken, H-KL": {"method": "xtoken", "objective": "h_kl", "lambda": 0, "balance": "none"},
}
every_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


@every_row
def test_the_loss_falls(row: dict[str, Any], tmp_path: Path) -> None:
    """From two teachers, one of them with the target's own tokens."""
    sources = {"s": TEACHER, "t": Bigrams({"ab": {"cd": 0.7}, "d": {"d": 0.3, "ab": 0.5}})}
    training = ("training.learning_rate=0.05", "training.epochs=6")
    small = experiment(tmp_path, TEXTS, sources, f"methods.X={json.dumps(row)}", *training, target=TARGET)
    (made,) = candidates(small)
    log = json.loads((made.candidate.training / "log.json").read_text())
    nats = [step["fusion_nats_per_token"] for step in log if "tokens" in step]
    assert len(nats) == 6 and all(map(math.isfinite, nats))
    assert 0 < nats[-1] < 0.95 * nats[0]


@every_row
def test_an_empty_row_teaches_nothing(row: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks share rows unevenly, some read one."""
    rows = rows_of(experiment(tmp_path, TEXTS, {"s": TEACHER}, f"methods.X={json.dumps(row)}"), monkeypatch)
    full, empty = rows[0], rows[len(rows)]
    assert full.keys() == empty.keys() and (full["weight"] != 0).any()
    for name in full.keys() - {"input_ids", "position_ids", "labels"}:
        assert len(empty[name]) == 0 and empty[name].dtype == full[name].dtype
        assert np.isfinite(full[name]).all()


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"method": "strict", "top": 4, "renormalise": False}, "methods.X: top renormalises"),
        ({"method": "gold", "temperature": 2}, "temperature 2, and those extracted are 1: add it to"),
        ({"method": "simct", "divergence": "rkl"}, "no divergence 'rkl'"),
        ({"method": "gold", "teacher_weights": [1, 2]}, "teacher_weights has 2 numbers for 1 teachers"),
    ],
)
def test_what_cannot_be_had_is_refused_by_a_plan(row: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=sentence):
        plan(experiment(tmp_path, TEXTS, {"s": TEACHER}, f"methods.X={json.dumps(row)}").config, tmp_path / "root")
