"""The figures of a finished run, from run folders as a run and an audit leave them."""

import math
from pathlib import Path

import pandas as pd
import pytest

from harness.reporting.figures import AUDIT, _series, drawings
from harness.reporting.tables import tables
from harness.store.files import write_json
from harness.store.paths import RUN_FILE
from harness.store.run_files import read_run_file
from results.formats import plain_table
from results.records import Record
from tests.harness.command import answer
from tests.harness.reporting.test_runs import finished
from tests.results.sample import curve, final

METHODS = {
    "target": {"method": "as_is", "role": "target"},
    "CLM": {"method": "clm"},
    "FuseLLM": {"method": "fusellm", "preset": "corrected"},
    "FuseLLM published": {"method": "fusellm", "preset": "published"},
    "FuseLLM published lambda=0.5": {"method": "fusellm", "preset": "published", "lambda": 0.5},
    "FuseLLM lambda=0": {"method": "fusellm", "lambda": 0},
    "FuseLLM lambda=0.5": {"method": "fusellm", "lambda": 0.5},
    "FuseLLM k=2": {"method": "fusellm", "k": 2},
    "FuseLLM from a": {"method": "fusellm", "sources": ["a"]},
    "FuseLLM from b": {"method": "fusellm", "sources": ["b"]},
}
CONFIGURATION = {"methods": METHODS, "extraction": {"k": 10}, "roles": {"sources": {"a": {}, "b": {}}}}


def _records() -> list[Record]:
    along = [one for method in ("CLM", "FuseLLM") for one in curve(method, {0: 1.0, 10: 0.9})]
    return [*along, *(one for i, name in enumerate(METHODS) for one in final(name, (0,) if i else (-1,), -0.01 * i))]


def _ablation(root: Path) -> Path:
    folder = finished(root, "ablations", _records())
    description = read_run_file(folder / RUN_FILE)
    description["configuration"] |= CONFIGURATION
    write_json(folder / RUN_FILE, description)
    return folder


def _audit(folder: Path) -> None:
    stages = ["native", "aligned", "projected", "kept", "selected", "in_loss"]
    rows = [
        {"source": source, "kind": kind, "domain": domain, "paired": 0.5, "chosen": 0.5, "ahead_of_target": math.nan}
        | dict.fromkeys(stages, 0.25)
        for source, kind in (("target (target)", "target"), ("a", "source"), ("fused", "fused"))
        for domain in ("code", "news")
    ]
    frame = pd.DataFrame(rows)
    (folder / AUDIT).parent.mkdir()
    (folder / AUDIT).write_text(plain_table(list(frame.columns), frame.values.tolist(), "json"))


def test_rows_are_in_a_series_that_differ_in_nothing_else() -> None:
    assert _series(CONFIGURATION) == {
        "lambda": {"FuseLLM": 0.9, "FuseLLM lambda=0": 0, "FuseLLM lambda=0.5": 0.5},
        "k": {"FuseLLM": 10, "FuseLLM k=2": 2},
        "number of sources": {"FuseLLM": 2, "FuseLLM from a": 1, "FuseLLM from b": 1},
    }


@pytest.mark.slow
def test_tables_write_every_figure_from_what_is_stored(tmp_path: Path) -> None:
    folder = _ablation(tmp_path)
    _audit(folder)
    for out in ("one", "two"):
        status, _, said = answer("tables", "ablations", "--format", "csv", "--out", tmp_path / out, "--root", tmp_path)
        assert status == 0, said
    shown = ["audit", "coverage", "differences", "learning-curves", "selection"]
    shown += ["by-k", "by-lambda", "by-number-of-sources"]
    names = {path.name for path in (tmp_path / "one").iterdir()} - {"ablations.csv"}
    assert names == {f"ablations-{name}.{ending}" for name in shown for ending in ("png", "svg")}
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_the_report_shows_the_same_figures(tmp_path: Path) -> None:
    folder = _ablation(tmp_path)
    _audit(folder)
    ablations = tables(tmp_path, ["ablations"], None)
    captions = [one.caption for one in drawings(ablations.runs["ablations"], ablations.by_name["ablations"])]
    status, printed, said = answer("report", "ablations", "--out", tmp_path / "out", "--root", tmp_path)
    assert status == 0, said
    page = Path(printed.strip()).read_text()
    assert len(captions) == page.count("data:image/svg+xml") == 8
    assert all(caption.replace("'", "&#39;") in page for caption in captions)


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    _ablation(tmp_path)
    ablations = tables(tmp_path, ["ablations"], None, reference="FuseLLM")
    names = {one.name for one in drawings(ablations.runs["ablations"], ablations.by_name["ablations"])}
    assert not names & {"selection", "coverage", "audit", "by-k"}  # of two rows the reference has no difference
