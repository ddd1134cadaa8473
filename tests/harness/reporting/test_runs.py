"""The tables of finished runs, from run folders as a run leaves them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fusion.errors import UserError
from harness.reporting import export, runs
from harness.reporting.runs import open_run
from harness.reporting.tables import run_table, summary, tables
from harness.store.files import write_json
from harness.store.fingerprint import file_sha256
from harness.store.paths import RUN_FILE, SUITES_FILE
from harness.store.run_files import read_run_file
from results.errors import UserError as RecordsError
from results.formats import FORMATS, render
from results.records import Record, write
from tests.harness.command import answer
from tests.results.sample import final, scores

METHODS = {
    "SmolLM2": {"method": "as_is", "role": "target"},
    "Gemma": {"method": "as_is", "role": "Gemma"},
    "CLM": {"method": "clm"},
    "FuseLLM": {"method": "fusellm"},
}


def finished(root: Path, experiment: str, records: list[Record], profile: str = "small", finished: float = 1.0) -> Path:
    """The folder of a run that left these records."""
    folder = root / "runs" / experiment / profile / f"{finished:.0f}"
    path = folder / "records" / "all.parquet"
    write(path, records, {"evaluation": "abc"})
    config = {
        "experiment": experiment, "profile": profile, "title": f"about {experiment}",
        "reference": "CLM", "banner": None,
        "methods": METHODS,
    }  # fmt: skip
    description = {"configuration": config, "records": {path.name: file_sha256(path)}, "finished": finished}
    write_json(folder / RUN_FILE, description)
    return folder


def commonsense() -> list[Record]:
    rates = {"SmolLM2": 0.4, "Gemma": 0.3, "CLM": 0.5, "FuseLLM": 0.8}
    return [
        one
        for i, (method, rate) in enumerate(rates.items())
        for task, metric in (("arc_easy", "acc_norm"), ("boolq", "acc"))
        for one in scores(
            method,
            task,
            [float(j < 30 * rate) for j in range(30)],
            -1 if i < 2 else 0,
            metric=metric,
            experiment="table2",
        )
    ]


def main() -> list[Record]:
    return [one for i, method in enumerate(METHODS) for one in final(method, (-1,) if i < 2 else (0,), 0.01 * i)]


@pytest.mark.slow
def test_a_table_of_the_paper_has_its_layout_and_another_the_main_one(tmp_path: Path) -> None:
    folder = finished(tmp_path, "table2", commonsense())
    noted = {"commonsense": {"metrics": {}, "missing": {"Gemma": {"hellaswag": "its rows cannot be had"}}}}
    write_json(folder / SUITES_FILE, noted)
    table = run_table(runs.open_run(runs.find_run(tmp_path, "table2", None)), with_paper=True)
    assert [one.label for one in table.columns] == ["Gemma", "SmolLM2", "CLM", "FuseLLM"]
    assert table.cells[0][3].published == 75.04 and table.cells[0][3].evaluations == ("abc",)
    by_row = dict(zip(table.rows, table.cells, strict=True))
    assert by_row["hellaswag"][0].note == "Gemma was not run on hellaswag: its rows cannot be had"
    assert any("`fusellm experiment run table2 --profile small`" in note for note in table.notes)

    finished(tmp_path, "main", main())
    table = run_table(runs.open_run(runs.find_run(tmp_path, "main", "small")), reference="SmolLM2")
    assert (table.title, table.reference, table.rows) == ("about main (main, small)", "SmolLM2", tuple(METHODS))
    with pytest.raises(UserError, match="The paper has no table 'main'"):
        run_table(runs.open_run(runs.find_run(tmp_path, "main", None)), with_paper=True)

    # Nothing of what the paper measured, but bits per byte.
    folder = finished(tmp_path, "table6", main())
    run = runs.open_run(folder)
    assert run_table(run).title == "about table6 (table6, small)"
    assert run_table(run, with_paper=True).title.startswith("table6, profile small")


def test_captions_say_unit_direction_and_precision(tmp_path: Path) -> None:
    run = open_run(finished(tmp_path, "main", main()))
    entries = [("perplexity", "float32"), ("perplexity", "bfloat16+float32"), ("bbh", "bfloat16"), ("vote", "")]
    measured = [{"suite": suite, "dtype": dtype} for suite, dtype in entries]
    run = replace(run, description={**run.description, "measured": measured})
    assert [run.precision(*some) for some in (("bbh", "vote"), ("vote",), ("perplexity", "bbh"))] == [
        "bfloat16", "", "bfloat16 and float32",
    ]  # fmt: skip
    table = run_table(run)
    expected = f"{table.title} (bits per byte, lower is better, bfloat16 and float32)"
    assert f"<figcaption>\n{expected}\n</figcaption>" in render(table, "html")
    assert f"caption{{{expected}}}" in render(table, "latex")
    assert json.loads(render(table, "json"))["precision"] == "bfloat16 and float32"


def test_the_newest_run_counts(tmp_path: Path) -> None:
    new = finished(tmp_path, "main", main(), finished=7)
    finished(tmp_path, "main", main(), profile="tiny", finished=3)
    assert runs.find_run(tmp_path, "main", None) == new
    assert runs.find_run(tmp_path, "main", "tiny").parent.name == "tiny"


@pytest.mark.slow
def test_all_names_what_was_not_run(tmp_path: Path) -> None:
    finished(tmp_path, "table2", commonsense())
    finished(tmp_path, "mine", main())
    found = tables(tmp_path, [], None)
    assert list(found.by_name) == ["table2", "mine"]
    assert any("`fusellm experiment run quickstart`" in one for one in found.absent)
    assert any("table1" in one for one in found.absent)
    beside = tables(tmp_path, ["all"], None, with_paper=True)
    assert list(beside.by_name)[:3] == ["paper/table1", "table2", "paper/table3"] and "mine" in beside.by_name
    with pytest.raises(UserError, match="no finished runs below"):
        tables(tmp_path / "nowhere", [], None)


@pytest.mark.slow
def test_out_gets_every_format_and_the_figure_the_same_each_time(tmp_path: Path) -> None:
    finished(tmp_path, "table2", commonsense())
    found = tables(tmp_path, ["table2", "paper/table7"], None)
    for out in ("one", "two"):
        export.write(found, tmp_path / out, list(FORMATS))
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {
        *(f"{name}.{ending}" for name in ("table2", "paper-table7") for ending in ("md", "csv", "json", "tex", "html")),
        "table2-differences.png", "table2-differences.svg",
    }  # fmt: skip
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "table2.md").read_text() == render(found.by_name["table2"], "md")


def test_a_damaged_run_is_named_and_the_others_have_their_tables(tmp_path: Path) -> None:
    finished(tmp_path, "table2", commonsense())
    older = finished(tmp_path, "main", main(), finished=3)
    newer = finished(tmp_path, "main", main(), finished=7)
    (finished(tmp_path, "mine", main()) / "records" / "all.parquet").write_bytes(b"torn")
    root = ["--root", str(tmp_path)]

    status, printed, said = answer("tables", "--format", "csv", *root)
    assert status == 0 and "FuseLLM" in printed
    assert "mine is left out: " in said and "all.parquet does not match its SHA-256" in said
    status, _, said = answer("tables", "mine", *root)
    assert status == 2 and "all.parquet does not match" in said

    (newer / RUN_FILE).write_text("{")
    status, printed, said = answer("run", "list", "--format", "json", *root)
    assert status == 0 and len(json.loads(printed)) == 3
    assert "".join(f"A run is left out: {newer / RUN_FILE} is damaged".split()) in "".join(said.split())
    assert runs.find_run(tmp_path, "main", None) == older


def test_a_report_of_all_runs_leaves_a_damaged_one_out(tmp_path: Path) -> None:
    finished(tmp_path, "main", main())
    (finished(tmp_path, "mine", main()) / "records" / "all.parquet").write_bytes(b"torn")
    status, printed, said = answer("report", "--out", str(tmp_path / "out"), "--root", str(tmp_path))
    assert status == 0 and "about main" in Path(printed.strip()).read_text()
    assert "A run is left out: " in said


def test_a_report_compares_with_the_row_asked_for_and_says_what_it_wrote(tmp_path: Path) -> None:
    folder = finished(tmp_path, "main", main())
    options = ["--out", str(tmp_path / "out"), "--root", str(tmp_path)]
    status, printed, _ = answer("report", "main", "--reference", "Gemma", "--json", *options)
    page = tmp_path / "out" / "report.html"
    assert status == 0 and json.loads(printed) == {"report": str(page), "runs": [str(folder)]}
    assert "worse than Gemma" in page.read_text() and "worse than CLM" not in page.read_text()
    status, _, said = answer("report", "main", "--reference", "Gema", *options)
    assert status == 2 and "There is no reference row 'Gema' (did you mean 'Gemma'?)" in said


@pytest.mark.slow
def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    finished(tmp_path, "table2", commonsense())
    root = ["--root", str(tmp_path)]
    status, printed, _ = answer("tables", "table2", "paper/table5", "--format", "json", *root)
    assert status == 0
    ours, theirs = json.loads(printed)
    assert ours["title"].startswith("table2, profile small") and theirs["title"].startswith("table5 as published")
    status, printed, _ = answer("tables", "table2", "--format", "latex", "--reference", "Gemma", *root)
    assert status == 0 and r"\toprule" in printed and "worse than Gemma" in printed
    status, printed, _ = answer("tables", "--format", "csv", "--out", str(tmp_path / "out"), *root)
    assert status == 0 and str(tmp_path / "out" / "table2.csv") in printed
    assert (tmp_path / "out" / "table2.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tabel2"], "There is no table 'tabel2' (did you mean 'table2'?): there are all, table1, "),
        (["table2", "--profile", "paper"], "run `fusellm experiment run table2 --profile paper`"),
        (["quickstart"], "run `fusellm experiment run quickstart`"),
        (["table10"], "`fusellm tables paper/table10` prints the published table"),
        (["paper/table11"], "There is no published table 'table11' (did you mean 'table1"),
        (["table2", "--reference", "CML"], "There is no reference row 'CML' (did you mean 'CLM'?): there are "),
        (["table2", "--reference", "clm"], "There is no reference row 'clm' (did you mean 'CLM'?): there are "),
        (["table2", "--profile", "smal"], "There is no profile of table2 'smal' (did you mean 'small'?): there are "),
        (["main", "--with-paper"], "The paper has no table 'main'"),
        (["damaged"], "was made by another version"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    finished(tmp_path, "table2", commonsense())
    finished(tmp_path, "main", main())
    folder = finished(tmp_path, "damaged", main())
    write_json(folder / RUN_FILE, {"configuration": {}, "finished": 1, "records": {}})
    status, _, said = answer("tables", *arguments, "--root", str(tmp_path))
    assert (status, len(said.strip().splitlines())) == (2, 1), said
    assert sentence in said


def test_records_that_disagree_about_the_data_are_refused_naming_both(tmp_path: Path) -> None:
    folder = finished(tmp_path, "table2", commonsense())
    write(folder / "records" / "more.parquet", scores("CLM", "boolq", [0.0], metric="acc", experiment="table2"))
    description = read_run_file(folder / RUN_FILE)
    records = {path.name: file_sha256(path) for path in (folder / "records").glob("*.parquet")}
    write_json(folder / RUN_FILE, {**description, "records": records})
    with pytest.raises(RecordsError, match=r"disagree about .*all\.parquet and .*more\.parquet"):
        runs.open_run(folder)


def test_nothing_heavy_is_imported() -> None:
    import subprocess
    import sys

    code = (
        "import sys, harness.reporting.tables, harness.reporting.runs, results.paper_layouts; "
        "print({'torch', 'transformers', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[3])
    assert done.stdout.strip() == b"set()"


@pytest.mark.slow
def test_the_tables_of_a_run_are_those_that_the_run_printed(tmp_path: Path) -> None:
    records = [*main(), *(one for one in commonsense() if one.task == "boolq")]
    folder = finished(tmp_path, "main", records)
    suite = {"metrics": {"boolq": "acc"}, "missing": {}, "k": 1, "notes": []}
    write_json(folder / SUITES_FILE, {"perplexity": {**suite, "metrics": {}}, "commonsense": suite})
    run = runs.open_run(folder)
    printed = summary(run, export.write_run(run))
    assert list(printed) == ["table", "table-commonsense"]
    assert list(printed.values()) == list(tables(tmp_path, ["main"], None).by_name.values())
    assert list(tables(tmp_path, ["main"], None).by_name) == ["main", "main-commonsense"]
