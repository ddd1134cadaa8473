"""The control: on tiny models fusion teaches what the sources know, and nothing where their knowledge is destroyed."""

import os
from pathlib import Path

import pytest

import harness

SEEDS = range(int(os.environ.get("FUSELLM_CONTROL_SEEDS", "1")))
"""`make control` trains three."""


@pytest.mark.slow
def test_what_the_sources_know_is_taught(tmp_path: Path) -> None:
    rows = ["CLM", "FuseLLM", "FuseLLM shuffled"]
    config = harness.load("quickstart", profile="tiny", seeds=SEEDS)
    for name in set(config.methods) - {*rows, "target", "coder", "reader"}:
        config.methods.pop(name)
    table = harness.tables(harness.run(config, root=tmp_path))["table"].to_frame()
    ahead = {row: table.loc["CLM", "average"] - table.loc[row, "average"] for row in rows}
    assert ahead["FuseLLM"] >= 0.01, ahead
    assert ahead["FuseLLM shuffled"] < ahead["FuseLLM"] / 2, ahead
