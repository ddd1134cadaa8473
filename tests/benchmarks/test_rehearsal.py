"""The profile `rehearsal`: one table of each kind by two ranks under ZeRO-2, killed on the way."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from benchmarks import rehearsal
from benchmarks.rehearsal import Kill, Rehearsal, check_tables, recomputed
from harness.config.loading import load
from harness.store.paths import PRESETS
from results.records import Record, write

# Less text (no line of 3 MB), fewer tasks, and the paper's precision.
SMALL = [
    "corpus.domains=[code,awkward]",
    "corpus.domain_bytes=20000",
    "protocols.bbh.tasks=[boolean_expressions,date_understanding]",
    "protocols.commonsense.tasks=[boolq]",
    "protocols.multipl_e.tasks=[python]",
    "training.dtype=bfloat16",
    "training.global_batch_size=4",
    "training.save_every=1",
    "curve.points=2",
]
NAMES = ("table1", "table5", "table6", "figure3")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a rehearsal of one table of each kind."""
    root: Path = tmp_path_factory.mktemp("rehearsal")
    small = Rehearsal(root, 2, NAMES, [word for setting in SMALL for word in ("--set", setting)])
    steps = [small.run(f"killed {kill.what}", kill) for kill in rehearsal.KILLS]
    steps.append(small.run("run"))
    assert all(step.expected for step in steps), (root / "logs", [step for step in steps if not step.expected])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_each_kind_by_two_ranks(root: Path, name: str) -> None:
    (run,) = (path for path in rehearsal.runs(root) if path.parent.parent.name == name)
    description = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert description["failures"] == []
    assert {entry["row"] for entry in description["measured"]} == set(load(name, profile="rehearsal").methods)
    cells, wrong = check_tables(run)
    assert cells > len(description["configuration"]["methods"]) and not wrong


def test_the_profile_is_the_papers_in_small() -> None:
    """Whatever the profile `paper` sets the profile `rehearsal` sets, too; roles, context and strategy are the same."""
    paper, small = (
        yaml.safe_load((PRESETS / "profiles" / f"{name}.yaml").read_text(encoding="utf-8"))
        for name in ("paper", "rehearsal")
    )
    assert paper.keys() <= small.keys() and paper["training"].keys() <= small["training"].keys()
    for key in ("sequence_length", "deepspeed", "micro_batch_size"):
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
