"""What is measured again takes the place of what was measured before, in the run's tables as well."""

import json
from pathlib import Path
from typing import Any

import pytest

from harness.config.loading import load
from harness.evaluation import perplexity, standalone
from harness.evaluation.suite import SUITES, SuiteResult, suite_config
from harness.experiment import run
from harness.models.resolution import ModelSpec
from harness.reporting.runs import open_run
from harness.store.paths import RECORDS, RUN_FILE, SUITES_FILE
from harness.store.run_files import list_measured, read_run_file


def entry(row: str, seed: int | None, file: str | None, suite: str = "bbh") -> dict[str, Any]:
    return {"row": row, "seed": seed, "suite": suite, "file": file, "missing": {}, "notes": []}


def test_an_entry_replaces_that_of_its_row_seed_and_suite(tmp_path: Path) -> None:
    (tmp_path / RECORDS).mkdir()
    for name in "abcde":
        for end in ("parquet", "json"):
            (tmp_path / RECORDS / f"{name}.{end}").write_text(name)
    first = [entry("CLM", 0, "a.parquet"), entry("CLM", 1, "b.parquet"), entry("CLM", 0, "c.parquet", "perplexity")]
    before = list_measured(tmp_path, {}, first)
    assert set(before["records"]) == {f"{name}.{end}" for name in "abc" for end in ("parquet", "json")}
    (tmp_path / RECORDS / "b.parquet").write_text("damaged since")

    again = [entry("CLM", 0, "d.parquet"), entry("FuseLLM", 0, None)]
    after = list_measured(tmp_path, before, again)
    assert [one["file"] for one in after["measured"]] == ["d.parquet", "b.parquet", "c.parquet", None]
    assert set(after["records"]) == {f"{name}.{end}" for name in "bcd" for end in ("parquet", "json")}
    assert after["records"]["b.parquet"] == before["records"]["b.parquet"]  # what was hashed is not hashed again


@pytest.fixture
def settings() -> list[str]:
    rows = ["CLM.method=as_is", "FuseLLM=null", "FuseLLM published=null"]
    return [*(f"methods.{row}" for row in rows), "curve.per_domain=0"]


@pytest.mark.slow
def test_a_run_that_computes_otherwise_than_before_has_its_table(
    experiment_file: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever changed without changing the name of the run: a package, a method's own artifacts, a default."""
    config = load(str(experiment_file), overrides=settings)
    monkeypatch.setattr(run, "run_fingerprint", lambda experiment: "f" * 64)
    before = open_run(run.run(config, tmp_path)).records
    measured = perplexity.measure_documents

    def otherwise(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        return [{**row, "nats": 2 * row["nats"]} for row in measured(*arguments, **options)]

    monkeypatch.setattr(perplexity, "measure_documents", otherwise)
    monkeypatch.setattr(perplexity, "VERSION", 99)
    after = open_run(run.run(config, tmp_path)).records
    assert len(after) == len(before) and (after["numerator"] == 2 * before["numerator"]).all()


def test_reasons_of_every_seed_are_kept(
    experiment_file: Path, settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.experiment import pipeline

    config = load(str(experiment_file), overrides=settings, seeds=[0, 1])
    made = run.candidates

    def with_seeds(*arguments: Any, **options: Any) -> Any:
        for row in made(*arguments, **options):
            for seed in (0, 1):
                yield type(row)(row.label, seed, row.candidate)

    count = iter(range(100))

    def measure(experiment: pipeline.Experiment, evaluated: Any) -> dict[str, SuiteResult]:
        number = next(count)
        missing = {"all": f"why {number}"} if number % 2 == 0 else {}
        return {"perplexity": SuiteResult(lambda: iter(()), missing=missing, notes=[f"note {number}"])}

    monkeypatch.setattr(run, "candidates", with_seeds)
    monkeypatch.setattr(run, "measure", measure)
    folder, _ = run.make_records(config, tmp_path)
    noted = read_run_file(folder / SUITES_FILE)["perplexity"]
    assert sorted(reasons["all"] for reasons in noted["missing"].values()) == ["why 0", "why 2", "why 4"]
    assert noted["notes"] == [f"note {number}" for number in range(6)]


def test_an_evaluation_that_is_begun_again_keeps_what_it_lists(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"documents": {"path": str(made / "test"), "split": "test", "per_domain": 3}, "window": 64}
    suites = {"perplexity": SUITES.get("perplexity")(suite_config("perplexity", section), None)}
    spec = ModelSpec(name=str(made / "llama"), dtype="float32")
    folder = standalone.evaluate(spec, suites, tmp_path, device="cpu")
    listed = json.loads((folder / RUN_FILE).read_text())
    assert len(listed["records"]) == 2 and len(open_run(folder).records) == 3

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(standalone, "write_records", killed)
    with pytest.raises(KeyboardInterrupt):
        standalone.evaluate(spec, suites, tmp_path, device="cpu")
    assert json.loads((folder / RUN_FILE).read_text()) == listed
    monkeypatch.undo()
    assert standalone.evaluate(spec, suites, tmp_path, device="cpu") == folder
    assert len(open_run(folder).records) == 3
