import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from results.errors import UnknownName, UserError
from results.formats import FORMATS, render, render_all
from results.paper_layouts import BBH, COMMONSENSE, LAYOUTS, MULTIPL_E, comparison
from results.paper_numbers import NAMES, load
from results.records import Record, read, write
from results.table import Table
from tests.results.sample import final, scores

ROLES = {"target": "SmolLM2", "OpenLLaMA-7B-v2": "OpenLLaMA-7B-v2", "Gemma": "Gemma"}
METHODS = ["SmolLM2", "OpenLLaMA-7B-v2", "Gemma", "CLM", "FuseLLM"]
RATES = {"SmolLM2": 0.4, "OpenLLaMA-7B-v2": 0.3, "Gemma": 0.35, "CLM": 0.45, "FuseLLM": 0.75}


def run(experiment: str, n: int = 40, methods: dict[str, float] = RATES, seeds: tuple[int, ...] = (0,)) -> list[Record]:
    """Answers of `methods` with their rates of being right, to the same `n` questions of every task."""
    records = []
    for method, rate in methods.items():
        for seed in (-1,) if method in ROLES.values() else seeds:
            for part in (*BBH.values(), *COMMONSENSE.values(), *MULTIPL_E.values()):
                luck = np.random.default_rng([sum(part.task.encode()), seed + 1]).random(n)
                of = 4 if part.suite == "multipl_e" else 1
                found = np.round(luck < rate) * of
                metrics = (
                    ["passed", "passed_exit"]
                    if of > 1
                    else ["acc", "acc_norm"]
                    if part.suite == "commonsense"
                    else [part.metric]
                )
                for metric in metrics:
                    values = np.minimum(found + (metric == "passed_exit"), of)
                    records += scores(method, part.task, values.tolist(), seed, part.suite, metric, of, experiment)
    return records


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    folder = tmp_path_factory.mktemp("records")
    for name in ("table2", "table4"):
        write(folder / name / "a.parquet", run(name), {"evaluation": "abc123"})
    return {name: read(folder / name) for name in ("table2", "table4")}


def made(name: str, frame: pd.DataFrame, **options: object) -> Table:
    return comparison(name, frame, METHODS, ROLES, profile="small", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tables(frames: dict[str, pd.DataFrame]) -> dict[tuple[str, bool], Table]:
    """Tables of the whole frames, by name and whether they have the paper's values."""
    return {
        (name, paper): made(name, frame, with_paper=paper) for name, frame in frames.items() for paper in (False, True)
    }


@pytest.fixture(scope="module")
def shuffled(frames: dict[str, pd.DataFrame]) -> Table:
    """Table 2 with the paper's values from records in another order."""
    return made("table2", frames["table2"].sample(frac=1, random_state=1), with_paper=True)


def test_tasks_down_methods_across_as_the_paper_has_them(tables: dict[tuple[str, bool], Table]) -> None:
    table = tables["table2", False]
    assert table.rows == ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "average")
    assert [one.label for one in table.columns] == ["OpenLLaMA-7B-v2", "Gemma", "SmolLM2", "CLM", "FuseLLM"]
    target, clm, fused = (table.cells[-1][j] for j in (2, 3, 4))
    assert clm.value == pytest.approx(np.mean([row[3].value or 0 for row in table.cells[:-1]]))
    assert fused.change == pytest.approx((fused.value or 0) / (target.value or 1) - 1)
    assert target.change is None and table.cells[0][0].change is None
    assert (fused.n, fused.evaluations) == (200, ("abc123",))
    lines = render(table, "md").splitlines()
    assert "| task | OpenLLaMA-7B-v2 | Gemma | SmolLM2 | CLM | FuseLLM |" in lines
    average = next(line for line in lines if line.startswith("| average"))
    assert average.startswith("| average (n=200) |") and f"**{fused.value:.2f}** ({fused.change:+.2%}) ▲ [" in average


def test_better_is_said_only_where_it_holds_after_correction(tables: dict[tuple[str, bool], Table]) -> None:
    table = tables["table2", False]
    cells = [cell for row in table.cells for cell in row]
    assert sum(cell.p_corrected is not None for cell in cells) == 6
    assert {cell.verdict for cell in cells} == {"better", None}
    for cell in cells:
        assert (cell.verdict is not None) == (cell.p_corrected is not None and cell.p_corrected <= 0.05)
        if cell.p is not None and cell.p_corrected is not None:
            assert cell.p_corrected >= cell.p
    families = "1 comparison of averages and 5 comparisons of single tasks"
    assert any(families in note and "these checkpoints only" in note for note in table.notes)


def test_models_as_they_are_are_compared_and_not_tested(
    frames: dict[str, pd.DataFrame], tables: dict[tuple[str, bool], Table]
) -> None:
    table = tables["table2", False]
    for row in table.cells:
        assert all(cell.difference_interval is not None and cell.p is None and cell.verdict is None for cell in row[:3])
    assert "Shown and not tested, being models as they are: OpenLLaMA-7B-v2, Gemma, SmolLM2." in table.notes
    # Where there is nothing else they are what the table is about.
    models = comparison("table2", frames["table2"], METHODS[:3], ROLES, profile="small", reference="SmolLM2")
    assert {cell.verdict for row in models.cells for cell in row[:1]} == {"worse", None}


def test_five_seeds_let_it_be_said_of_the_method(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", run("table2", seeds=(0, 1, 2, 3, 4)))
    table = made("table2", read(tmp_path))
    fused = table.cells[-1][4]
    assert fused.seeds == (0, 1, 2, 3, 4) and fused.general and fused.verdict == "better"
    assert "▲▲" in render(table, "md")
    assert "Seeds: CLM 5, FuseLLM 5." in table.notes
    assert any("doubled where 5 seeds or more" in note for note in table.notes)


def test_another_baseline(frames: dict[str, pd.DataFrame]) -> None:
    table = made("table2", frames["table2"], reference="SmolLM2")
    assert table.cells[-1][2].difference is None
    assert table.cells[-1][3].difference == pytest.approx(
        (table.cells[-1][3].value or 0) - (table.cells[-1][2].value or 0)
    )
    with pytest.raises(UnknownName, match=r"There is no reference row 'Smol': there are .*SmolLM2"):
        made("table2", frames["table2"], reference="Smol")


def test_published_values_stand_beside_ours_where_both_exist(tables: dict[tuple[str, bool], Table]) -> None:
    table = tables["table2", True]
    assert table.published == ("OpenLLaMA, paper", "", "Llama-2, paper", "Llama-2 CLM, paper", "FuseLLM, paper")
    assert [cell.published for cell in table.cells[-1]] == [59.78, None, 63.76, 63.86, 64.56]
    assert table.cells[-1][4].published_change == pytest.approx(64.56 / 63.76 - 1)
    text = render(table, "md")
    assert "| **64.56** (+1.25%) |" in text
    assert any(note.startswith("Published with open-instruct") for note in table.notes)
    assert tables["table2", False].published == ()


def test_beside_the_paper_multipl_e_is_scored_by_exit_status(tables: dict[tuple[str, bool], Table]) -> None:
    strict, beside = tables["table4", False], tables["table4", True]
    assert [one.label for one in strict.columns] == ["bbh", "commonsense", "multipl_e"]
    assert {part.metric for part in strict.columns[2].parts} == {"passed"}
    assert {part.metric for part in beside.columns[2].parts} == {"passed_exit"}
    rows = dict(zip(strict.rows, strict.cells, strict=True))
    assert (rows["CLM"][2].value or 0) + 10 < (dict(zip(beside.rows, beside.cells, strict=True))["CLM"][2].value or 0)


def test_methods_down_and_what_was_not_run(frames: dict[str, pd.DataFrame]) -> None:
    command = "fusellm experiment run table4 --profile small"
    table = made("table4", frames["table4"], with_paper=True, command=command)
    assert table.rows == (
        "OpenLLaMA-7B-v2", "Gemma", "SmolLM2", "CLM", "FuseLLM from OpenLLaMA-7B-v2", "FuseLLM from Gemma", "FuseLLM"
    )  # fmt: skip
    gone = table.cells[4][0]
    assert gone.value is None and gone.note.startswith("no records of FuseLLM from OpenLLaMA-7B-v2: not run")
    assert gone.published == 41.00
    assert table.cells[5][0].published is None
    assert any(command in note for note in table.notes)
    assert "| FuseLLM from OpenLLaMA-7B-v2 |  | — (1) | 41.00 (+3.27%) |" in render(table, "md")


def test_a_method_that_the_layout_does_not_know_follows(frames: dict[str, pd.DataFrame]) -> None:
    frame = frames["table4"]
    more = pd.concat([frame, frame[frame["method"] == "CLM"].assign(method="mine")])
    table = comparison("table4", more, [*METHODS, "mine"], ROLES, profile="small")
    assert table.rows[-1] == "mine"
    assert table.cells[-1][0].value == table.cells[3][0].value


def test_a_task_that_nobody_ran_costs_the_average_and_gives_another(frames: dict[str, pd.DataFrame]) -> None:
    frame = frames["table2"]
    table = made("table2", frame[frame["task"] != "boolq"], with_paper=True)
    assert table.rows[-2:] == ("average", "average of tasks with an interval")
    assert {cell.note for cell in table.cells[2]} == {
        f"no records of {method} on boolq: not evaluated, or its records were removed" for method in METHODS
    }
    assert all(cell.value is None for cell in table.cells[-2])
    assert all(cell.value is not None and cell.published is None for cell in table.cells[-1])


def test_a_suite_that_was_not_run_says_so_once(frames: dict[str, pd.DataFrame]) -> None:
    frame = frames["table4"]
    table = made("table4", frame[(frame["suite"] != "bbh") | (frame["method"] != "CLM")])
    assert table.cells[3][0].note == "no bbh records of CLM: not evaluated, or its records were removed"


def test_perplexity_tables_take_the_domains_of_the_records(tmp_path: Path) -> None:
    documents = {"phil": 24, "nih": 24, "uspto": 24}
    for method, seeds in (("Pythia-1B", (-1,)), ("CLM", (0,)), ("FuseLLM", (0,))):
        write(tmp_path / f"{method}.parquet", final(method, seeds, documents=documents))
    roles = {"target": "Pythia-1B"}
    table = comparison(
        "table7", read(tmp_path), ["Pythia-1B", "CLM", "FuseLLM"], roles, profile="small", with_paper=True
    )
    assert [one.label for one in table.columns] == ["nih", "phil", "uspto", "average"]
    assert table.rows == ("Pythia-1B", "Ensemble", "Weight Merging", "FuseLLM", "CLM")
    assert [cell.published for cell in table.cells[3]] == [0.6569, 0.8463, 0.6068, 0.7034]
    assert not table.higher_is_better and table.digits == 4
    other = read(tmp_path).replace({"task": {"phil": "poems"}})
    fewer = comparison("table7", other, ["Pythia-1B", "CLM", "FuseLLM"], roles, profile="small", with_paper=True)
    assert [cell.published for cell in fewer.cells[3]] == [0.6569, None, 0.6068, None]


@pytest.mark.parametrize("name", NAMES)
def test_every_published_method_and_task_has_its_place(name: str) -> None:
    layout, published = LAYOUTS[name], load(name)
    methods, tasks = (
        (published.columns, published.rows) if layout.methods_across else (published.rows, published.columns)
    )
    if layout.columns:
        assert tuple(column.label for column in layout.columns) == tasks
    by_role = [line.published for line in layout.lines if "{source}" not in line.published]
    assert set(by_role) <= set(methods)
    # What is left are the sources, and the target fused with one of them.
    assert all(any(source in one for source in published.as_is[1:]) for one in set(methods) - set(by_role))


def test_records_that_disagree_about_the_data_are_refused_naming_both(frames: dict[str, pd.DataFrame]) -> None:
    frame = frames["table2"]
    gone = (frame["method"] == "FuseLLM") & (frame["task"] == "boolq") & (frame["example"] == "0003")
    with pytest.raises(UserError, match=r"OpenLLaMA-7B-v2 .* and FuseLLM .* same examples of boolq: 40 and 39"):
        made("table2", frame[~gone])


def test_wrong_names_are_one_sentence(frames: dict[str, pd.DataFrame]) -> None:
    with pytest.raises(UnknownName, match=r"There is no table 'tabel2': there are .*table2"):
        made("tabel2", frames["table2"])
    with pytest.raises(UserError, match="no final perplexity records"):
        made("table7", frames["table2"])


def test_machine_readable_formats_carry_all_that_is_known(tables: dict[tuple[str, bool], Table]) -> None:
    table = tables["table2", True]
    lines = list(csv.DictReader(io.StringIO(render(table, "csv"))))
    assert len(lines) == 6 * 5
    last, cell = lines[-1], table.cells[-1][-1]
    assert (last["task"], last["column"], last["n"], last["evaluations"]) == ("average", "FuseLLM", "200", "abc123")
    for name, number in (
        ("value", cell.value),
        ("p", cell.p),
        ("p_corrected", cell.p_corrected),
        ("change", cell.change),
    ):
        assert float(last[name]) == number
    assert last["verdict"] == "better" and float(last["published"]) == 64.56
    whole = json.loads(render(table, "json"))
    assert whole["cells"][-1][-1]["evaluations"] == ["abc123"]
    assert [len(json.loads(render_all([table] * n, "json"))) for n in (2, 3)] == [2, 3]


class _Cells(HTMLParser):
    """Counts the cells of every row; every tag must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[int] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "br":
            return
        self.open.append(tag)
        if tag == "tr":
            self.rows.append(0)
        elif tag in ("td", "th"):
            self.rows[-1] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_and_latex_are_well_formed(tables: dict[tuple[str, bool], Table]) -> None:
    for table in (replace(table, banner="plumbing, <not> a result") for table in tables.values()):
        width = 1 + len(table.columns) + sum(map(bool, table.published)) + (table.best_along == "column")
        assert set(_Cells(render(table, "html")).rows) == {width}
        tex = render(table, "latex")
        body = [line for line in tex.splitlines() if line.endswith(r" \\")]
        assert len(body) == 1 + len(table.rows)
        assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {width - 1}
        assert tex.isascii() or not set("▲▼±−—–") & set(tex)
        assert tex.count("{") - tex.count(r"\{") == tex.count("}") - tex.count(r"\}")
        assert not re.search(r"(?<!\\)[%#_]", tex)


def test_text_that_a_format_reads_as_a_command_is_escaped(tables: dict[tuple[str, bool], Table]) -> None:
    table = replace(tables["table4", False], title=r"50% & <b>\x{y}_1</b>", notes=("a|b",))
    assert r"50\% \& $<$b$>$\textbackslash{}x\{y\}\_1" in render(table, "latex")
    assert "50% &amp; &lt;b&gt;" in render(table, "html")
    assert r"a\|b" in render(table, "md")


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_bytes_from_shuffled_records(
    tables: dict[tuple[str, bool], Table], shuffled: Table, form: str
) -> None:
    assert render(tables["table2", True], form) == render(shuffled, form)
