import csv
import io
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from results.errors import UnknownName, UserError
from results.formats import plain_rich, plain_table, render, to_rich
from results.layout import Cell, Column
from results.records import Record, read, write
from results.table import Table
from results.tables import AVERAGE, main_table
from tests.results.sample import final

AVERAGE_WITH_INTERVAL = "average of domains with an interval"
ORDER = ["Target as it is", "Gemma", "CLM", "FuseLLM corrected"]
SMALL = {"code": 24, "news": 30, "wiki": 7}


def run(documents: dict[str, int] = SMALL, profile: str = "small") -> dict[str, list[Record]]:
    return {
        "Target as it is": final("Target as it is", (-1,), 0.03, documents, profile),
        "Gemma": final("Gemma", (-1,), -0.05, documents, profile),
        "CLM": final("CLM", (0, 1), 0.0, documents, profile),
        "FuseLLM corrected": final("FuseLLM corrected", (0, 1), -0.02, documents, profile),
    }


def table(folder: Path, records: dict[str, list[Record]], **options: object) -> Table:
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(records.values()):
        write(folder / f"{i}.parquet", part)
    return main_table(read(folder), ORDER, **options)  # type: ignore[arg-type]


def shown(made: Table, width: int = 160) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(to_rich(made))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_rows_in_order_columns_domains_then_averages(tmp_path: Path) -> None:
    made = table(tmp_path, run())
    assert list(made.rows) == ORDER
    assert [one.label for one in made.columns] == ["code", "news", "wiki", AVERAGE, AVERAGE_WITH_INTERVAL]
    assert [one.n for one in made.columns] == [24, 30, 7, 61, 54]
    assert made.columns[-1].tasks == ("code", "news")
    for row in made.cells:
        assert all(
            (cell.interval is None) == (column.label in ("wiki", AVERAGE))
            for cell, column in zip(row, made.columns, strict=True)
        )
    fused = made.cells[3][4]
    assert fused.difference is not None and fused.difference_interval is not None
    assert fused.difference_interval[0] < fused.difference < fused.difference_interval[1] < 0
    assert (fused.seeds, fused.difference_seeds) == ((0, 1), (0, 1))
    assert fused.spread is not None
    assert made.cells[3][3].difference_interval is None
    assert made.cells[2][4].difference is None


def test_one_average_where_every_domain_is_large_enough(tmp_path: Path) -> None:
    made = table(tmp_path, run({"code": 24, "news": 20}))
    assert [one.label for one in made.columns] == ["code", "news", AVERAGE]
    assert made.cells[3][2].difference_interval is not None


def test_no_interval_anywhere_below_twenty(tmp_path: Path) -> None:
    made = table(tmp_path, run({"code": 19, "wiki": 7}))
    assert [one.label for one in made.columns] == ["code", "wiki", AVERAGE]
    assert all(cell.interval is None and cell.difference_interval is None for row in made.cells for cell in row)
    body = "".join(line for line in render(made, "md").splitlines() if line.startswith("|"))
    assert "[" not in body


def test_markdown_reads_as_the_numbers_say(tmp_path: Path) -> None:
    made = table(tmp_path, run())
    lines = render(made, "md").splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    assert head.count("|") == 2 + 1 + 5 + 2
    assert "| code (n=24) |" in head and f"| {AVERAGE} − CLM |" in head
    gemma = next(line for line in lines if line.startswith("| Gemma"))
    low, high = made.cells[1][0].interval or (0, 0)
    assert f"**{made.cells[1][0].value:.4f}** [{low:.4f}, {high:.4f}]" in gemma
    assert gemma.startswith("| Gemma | none |")
    clm = next(line for line in lines if line.startswith("| CLM"))
    assert clm.startswith("| CLM | 2 |") and clm.endswith("| reference | reference |")


def test_csv_and_json_carry_everything_at_full_precision(tmp_path: Path) -> None:
    made = table(tmp_path, run(), banner="a banner")
    lines = list(csv.DictReader(io.StringIO(render(made, "csv"))))
    assert len(lines) == len(made.rows) * len(made.columns)
    cell = made.cells[3][4]
    line = lines[-1]
    assert (line["method"], line["column"], line["seeds"], line["n"]) == (ORDER[3], AVERAGE_WITH_INTERVAL, "0 1", "54")
    assert (float(line["value"]), (float(line["low"]), float(line["high"]))) == (cell.value, cell.interval)
    assert (float(line["difference_low"]), float(line["difference_high"])) == cell.difference_interval
    whole = json.loads(render(made, "json"))
    assert whole["banner"] == "a banner"
    assert whole["cells"][3][4]["value"] == cell.value
    assert whole["cells"][3][4]["difference_interval"] == list(cell.difference_interval or ())
    assert [row[0]["best"] for row in whole["cells"]] == [False, True, False, False]


@pytest.mark.parametrize("form", ["md", "json"])
def test_a_tiny_profile_says_that_it_is_no_result(tmp_path: Path, form: str) -> None:
    made = table(tmp_path, run(profile="tiny"))
    text = render(made, form)
    assert "plumbing, not a result" in text.lower()
    if form == "md":
        assert text.startswith("**PLUMBING, NOT A RESULT**")
    assert shown(made).startswith("PLUMBING, NOT A RESULT")


def test_what_is_missing_says_so_and_nothing_else_changes(tmp_path: Path) -> None:
    records = run()
    whole = table(tmp_path / "whole", records)
    records["Gemma"] = [one for one in records["Gemma"] if one.task != "wiki"]
    records["Target as it is"] = []
    part = table(tmp_path / "part", records)
    assert part.columns == whole.columns
    for i, row in enumerate(part.rows):
        for j, column in enumerate(part.columns):
            gone = row == "Target as it is" or (row == "Gemma" and "wiki" in column.tasks)
            if gone:
                assert part.cells[i][j].value is None
                assert part.cells[i][j].note.startswith(f"no records of {row}")
            else:
                before, now = whole.cells[i][j], part.cells[i][j]
                # A correction for several tests depends on them all; without one it can only be more cautious.
                assert (now.p_corrected or 0) >= (before.p_corrected or 0)
                assert replace(now, p_corrected=before.p_corrected, verdict=before.verdict) == before
    text = render(part, "md")
    assert "| — (1) |" in text and "(1) no records of Target as it is: not run" in text
    assert "no records of Gemma on wiki" in text


def test_without_the_baseline_the_values_stand_and_the_differences_say_why(tmp_path: Path) -> None:
    records = run()
    whole = table(tmp_path / "whole", records)
    records["CLM"] = []
    part = table(tmp_path / "part", records)
    cell = part.cells[3][3]
    assert cell.value == whole.cells[3][3].value
    assert cell.difference is None
    assert "no records of CLM" in cell.difference_note


def test_a_seed_missing_in_one_domain_costs_the_average_only(tmp_path: Path) -> None:
    records = run()
    records["FuseLLM corrected"] = [one for one in records["FuseLLM corrected"] if one.task != "news" or one.seed == 0]
    made = table(tmp_path, records)
    code, news, _, average, _ = made.cells[3]
    assert (code.seeds, news.seeds) == ((0, 1), (0,))
    assert news.difference_seeds == (0,)
    assert average.value is None and "no average can be given" in average.note


def test_no_seed_in_common_says_so_in_the_difference(tmp_path: Path) -> None:
    records = run() | {"FuseLLM corrected": final("FuseLLM corrected", (7,), -0.02, SMALL)}
    cell = table(tmp_path, records).cells[3][0]
    assert cell.value is not None and cell.difference is None
    assert "no seed in common" in cell.difference_note


def test_seeds_in_common_are_named_where_they_are_not_all(tmp_path: Path) -> None:
    records = run() | {"FuseLLM corrected": final("FuseLLM corrected", (1, 2), -0.02, SMALL)}
    cell = table(tmp_path, records).cells[3][0]
    assert cell.difference_note == "compared over the seeds in common with CLM: 1"


def test_order_and_duplication_of_files_change_no_byte(tmp_path: Path) -> None:
    records = run()
    once = table(tmp_path / "once", records)
    everything = [one for part in records.values() for one in part]
    random.Random(0).shuffle(everything)
    for i in range(5):
        write(tmp_path / "again" / f"{9 - i}.parquet", everything[i::5])
    write(tmp_path / "again" / "twice.parquet", everything[::2])
    again = main_table(read(tmp_path / "again"), ORDER)
    for form in ("md", "csv", "json"):
        assert render(once, form).encode() == render(again, form).encode()
    assert shown(once) == shown(again)


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(tmp_path: Path) -> None:
    made = table(tmp_path, run())
    code = (
        "import sys; from results.records import read; from results.formats import render; "
        "from results.tables import main_table; "
        f"sys.stdout.write(render(main_table(read({str(tmp_path)!r}), {ORDER!r}), 'json'))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, env={"PYTHONHASHSEED": "7", "PYTHONUTF8": "1"},
        cwd=Path(__file__).parents[2],
    ).stdout  # fmt: skip
    assert out == render(made, "json").encode()


def test_curve_records_and_other_methods_stay_out(tmp_path: Path) -> None:
    records = run()
    before = table(tmp_path, records)
    write(tmp_path / "more.parquet", final("ablation", documents={"extra": 30}))
    along = [Record("main", "small", "CLM", 0, "perplexity", "code", "x", "bits_per_byte", 1.0, 2.0, tokens=5)]
    write(tmp_path / "curve.parquet", along)
    assert main_table(read(tmp_path), ORDER) == before


def test_rows_measured_on_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Gemma .* same examples of code"):
        table(tmp_path, run() | {"Gemma": final("Gemma", (-1,), documents=SMALL)[1:]})


def test_wrong_names_and_no_records_are_one_sentence(tmp_path: Path) -> None:
    for i, part in enumerate(run().values()):
        write(tmp_path / f"{i}.parquet", part)
    records = read(tmp_path)
    with pytest.raises(UnknownName, match=r"There is no reference row 'CLMM': there are .*CLM"):
        main_table(records, ORDER, "CLMM")
    with pytest.raises(UserError, match="asked for twice"):
        main_table(records, ["CLM", "CLM"])
    with pytest.raises(UserError, match="no final bits_per_byte records"):
        main_table(records.iloc[:0], ORDER)
    with pytest.raises(UnknownName, match="There is no table format 'markdown': there are md, "):
        render(main_table(records, ORDER), "markdown")


def test_the_terminal_shows_the_same_numbers(tmp_path: Path) -> None:
    made = table(tmp_path, run())
    text = shown(made)
    for row in made.cells:
        for cell in row:
            assert cell.value is not None and f"{cell.value:.4f}" in text
    assert all(label.split()[0] in text for label in ORDER)


def test_plain_tables(tmp_path: Path) -> None:
    rows: list[list[object]] = [["a|b", 1, 0.98765, None], ["c\nd", 20, float("nan"), "x"]]
    columns = ["name", "n", "share", "note"]
    assert plain_table(columns, rows, "md") == (
        "| name | n | share | note |\n| --- | --- | --- | --- |\n| a\\|b | 1 | 0.9877 |  |\n| c d | 20 |  | x |\n"
    )
    assert plain_table(columns, rows, "csv") == 'name,n,share,note\na|b,1,0.98765,\n"c\nd",20,,x\n'
    assert json.loads(plain_table(columns, rows, "json"))[1] == {"name": "c\nd", "n": 20, "share": None, "note": "x"}
    with pytest.raises(UnknownName, match="There is no list format 'cvs': there are md, csv, json"):
        plain_table(columns, rows, "cvs")
    with pytest.raises(ValueError, match="zip"):
        plain_table(columns, [["short"]], "md")
    console = Console(width=80, file=io.StringIO())
    console.print(plain_rich(["[red]name"], [["[b]x"]], title="[i]t"))
    assert "[b]x" in console.file.getvalue()  # type: ignore[attr-defined]


def test_listing_things_imports_no_heavy_package() -> None:
    code = (
        "import sys, results.formats, results.paper_numbers; "
        "print({'numpy', 'pandas', 'scipy', 'rich'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == b"set()"


def test_means_of_the_same_in_another_order_are_all_best() -> None:
    values = (sum([36.8, 36.4]) / 2, sum([36.2, 37.0]) / 2, 36.0)
    assert values[0] != values[1]
    table = Table("t", ("a", "b", "c"), (Column("x"),), tuple((Cell(one),) for one in values), True, 2)
    assert table.best() == {(0, 0), (1, 0)}


def test_a_row_whose_tokens_do_not_spell_the_text_is_no_measure_of_it(tmp_path: Path) -> None:
    """Text that is lost costs nothing: the number is said to be none, is never the best, and is not compared."""
    records = run()
    records["Gemma"] += [replace(r, metric="lost_bytes", numerator=8.0) for r in records["Gemma"] if r.task == "code"]
    for row in ("CLM", "FuseLLM corrected"):  # of one tokenizer, which loses the same bytes
        lost = [replace(r, metric="lost_bytes", numerator=1.0) for r in records[row] if r.task == "news"]
        records[row] += [r for r in lost if r.example < "doc002"]
    made = table(tmp_path, records)
    gemma, _, fused = made.cells[1:]
    assert "the tokens of Gemma do not spell the text of 24 of 24 documents (192 of their" in gemma[0].note
    assert "24 of 61 documents" in gemma[3].note and gemma[0].value is not None
    assert gemma[0].lossy and gemma[3].lossy and not gemma[1].lossy and gemma[3].interval is None
    assert gemma[4].p is None and gemma[4].verdict is None and "not compared" in gemma[4].difference_note
    assert fused[4].lossy and fused[4].verdict == "better" and not fused[0].lossy
    assert not made.best() & {(1, 0), (1, 3), (2, 3), (3, 3)} and (1, 1) in made.best()
    assert "so that this is no measure of it" in render(made, "md")
    assert table(tmp_path / "clean", run()).cells[1][0].note == ""
