"""The profile `rehearsal`, and the rehearsal itself."""

import json
import shutil
from pathlib import Path

import yaml

from benchmarks import rehearsal
from benchmarks.rehearsal import Kill, check_tables, recomputed
from harness.store.paths import PRESETS
from results.records import Record, write


def test_the_profile_is_the_papers_in_small() -> None:
    """Whatever the profile `paper` sets the profile `rehearsal` sets, too; roles, context and strategy are the same."""
    paper, small = (
        yaml.safe_load((PRESETS / "profiles" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("paper", "rehearsal")
    )
    assert paper.keys() <= small.keys() and paper["training"].keys() <= small["training"].keys()
    for key in ("sequence_length", "deepspeed", "gradient_checkpointing", "micro_batch_size"):
        assert small["training"][key] == paper["training"][key]
    assert small["roles"]["sources"].keys() == paper["roles"]["sources"].keys()
    assert small["passages"] == paper["passages"]
    assert small["suites"]["perplexity"]["window"] == paper["suites"]["perplexity"]["window"]
    experiments = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in PRESETS.glob("experiments/*.yaml")]
    tables = [one for one in experiments if "rehearsal" in one["profiles"]]
    assert len(tables) == 9
    for one in tables:
        of = one.get("per_profile", {})
        assert ("paper" in of) == ("rehearsal" in of)


def test_values_that_the_records_do_not_give_are_named(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x" / "rehearsal" / "0"
    about = {"experiment": "x", "profile": "rehearsal", "method": "CLM", "seed": 0}
    records = [
        Record(**about, suite="bbh", task="snarks", example=str(n), metric="exact_match", numerator=n, denominator=1)
        for n in (0, 1)
    ]
    write(run / "records" / "a.parquet", records)
    table = {"rows": ["CLM"], "columns": [{"label": "snarks", "parts": [["bbh", "snarks", "exact_match"]]}]}
    for value, wrong in ((50.0, 0), (51.0, 1)):
        (run / "table.json").write_text(json.dumps({**table, "cells": [[{"value": value}]]}), encoding="utf-8")
        cells, sentences = check_tables(run)
        assert (cells, len(sentences)) == (1, wrong)
    assert sentences == ["x/table.json, CLM, snarks: the table has 51.0, the records give 50.0."]
    assert recomputed(rehearsal.read(run / "records" / "a.parquet")) == {("CLM", "bbh", "snarks", "exact_match"): 50.0}


def test_a_run_is_killed_in_the_middle_of_an_artifact(tmp_path: Path) -> None:
    kill = Kill("one rank", "train", 1, "checkpoints/checkpoint-*/*")
    unfinished = tmp_path / "artifacts" / "train" / ".0123.partial" / "checkpoints" / "checkpoint-1"
    unfinished.mkdir(parents=True)
    (unfinished / "weights").touch()
    assert not kill.due(tmp_path)
    (tmp_path / "artifacts" / "train" / "CLM-4567").mkdir()
    assert kill.due(tmp_path)
    shutil.rmtree(unfinished)
    assert not kill.due(tmp_path)
