"""The report and the provenance behind it, from one experiment on the tiny models of seconds."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.reporting import report, runs
from harness.reporting.tables import run_table
from harness.store.artifacts import Store, read_manifest
from harness.store.paths import RUN_FILE
from harness.store.run_files import read_run_file
from results.report import Answer, ReportedExample, RunPage, Task, page
from tests.harness.browser import DESKTOP, PHONE, chromium, resize
from tests.harness.command import answer

By = "css selector"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the experiment `table2` was run in the profile `micro`."""
    root = tmp_path_factory.mktemp("report")
    status, printed, said = answer("experiment", "run", "table2", "--profile", "micro", "--root", root)
    assert status == 0, said
    assert "hellaswag" in printed
    return root


@pytest.fixture(scope="module")
def written(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    status, printed, said = answer("report", "table2", "--root", root, "--out", out)
    assert status == 0, said
    assert printed.strip() == str(out / "report.html")
    return out / "report.html"


@pytest.mark.slow
def test_the_rows_of_the_tiny_profiles_are_ours(root: Path) -> None:
    """Every task of the table was answered by every row, from the rows that come with the harness."""
    made = run_table(runs.open_run(runs.find_run(root, "table2", "micro")))
    assert made.rows == ("arc_easy", "arc_challenge", "boolq", "hellaswag", "openbookqa", "average")
    assert all(cell.value is not None for row in made.cells for cell in row)


@pytest.mark.slow
def test_held_out_text_stands_beside_the_papers_table(root: Path) -> None:
    commonsense, text = report.read(runs.open_run(runs.find_run(root, "table2", "micro")), examples=0).tables
    assert commonsense.rows[0] == "arc_easy"
    assert {"code", "docstrings", "manual"} <= {column.label for column in text.columns}
    assert all(cell.value is not None for row in text.cells for cell in row[:3])


@pytest.mark.slow
def test_a_cell_leads_to_everything_behind_it(root: Path) -> None:
    folder = runs.find_run(root, "table2", "micro")
    description = read_run_file(folder / RUN_FILE)
    assert description["libraries"]["torch"] and description["command"][1:3] == ["experiment", "run"]
    cell = run_table(runs.open_run(folder)).cells[0][4]
    (evaluation,) = cell.evaluations
    beside = [json.loads(path.read_text()) for path in (folder / "records").glob("FuseLLM*.json")]
    (provenance,) = [one for one in beside if one["evaluation"] == evaluation]
    assert sorted(provenance["artifacts"]) == sorted(provenance["evaluations"])
    manifest = read_manifest(root / provenance["artifacts"]["arc_easy"])
    assert manifest["fingerprint"] == provenance["evaluations"]["arc_easy"]
    assert manifest["info"]["configuration"]["experiment"] == "table2"
    assert manifest["commit"] == description["commit"]
    assert {"lm-eval", "torch", "python"} <= manifest["libraries"].keys()
    assert re.fullmatch("[0-9a-f]{64}", manifest["inputs"]["task"]["data"]["test"])
    # From the candidate that was evaluated to the text that it was trained on.
    by_fingerprint = {m["fingerprint"]: m for m in map(read_manifest, Store(root / "artifacts").artifacts())}
    trained = by_fingerprint[manifest["inputs"]["model"]]
    assert by_fingerprint[trained["inputs"]["passages"]]["kind"] == "passages"


@pytest.mark.slow
def test_the_page_needs_nothing_else_and_is_the_same_each_time(written: Path, root: Path, tmp_path: Path) -> None:
    text = written.read_text()
    assert {one[:5] for one in re.findall(r'src="([^"]+)', text)} == {"data:"}
    assert {one[0] for one in re.findall(r'href="([^"]+)', text)} == {"#"}
    assert "http" not in re.sub(r"data:image/svg\+xml;base64,[\w+/=]+|<pre>.*?</pre>", "", text, flags=re.S)
    again, _ = report.report(root, [], None, tmp_path, examples=30)
    assert again.read_bytes() == written.read_bytes()
    for link in set(re.findall(r'href="#([^"]+)"', text)):
        assert f'id="{link}"' in text


@pytest.mark.slow
def test_costs_and_examples(root: Path) -> None:
    run = report.read(runs.open_run(runs.find_run(root, "table2", "micro")), examples=2)
    costs = {(cost.stage, cost.of): cost for cost in run.costs}
    assert costs["train", "FuseLLM-seed0"].tokens == costs["train", "CLM-seed0"].tokens > 1000
    assert costs["predictions", "coder"].tokens > 1000
    assert all(cost.seconds >= 0 and cost.peak_memory > 1e8 and cost.size > 0 for cost in run.costs)
    tasks = {task.name: task for task in run.tasks}
    assert list(tasks) == [
        f"commonsense: {one}" for one in ("arc_challenge", "arc_easy", "boolq", "hellaswag", "openbookqa")
    ]
    task = tasks["commonsense: arc_easy"]
    assert (task.total, len(task.examples), task.metric) == (4, 2, "acc_norm")
    asked = task.examples[0]
    assert asked.prompt.startswith("Question: ") and list(asked.answers) == [
        "coder",
        "reader",
        "target",
        "CLM",
        "FuseLLM",
    ]
    for one in asked.answers.values():  # the arrow is where the score says that it is
        chosen = next(line for line in one.text.splitlines() if line.startswith("→"))
        assert (asked.target in chosen) == (one.score == 1)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.mark.slow
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_page_in_a_browser(written: Path, browser: Any, size: tuple[int, int]) -> None:
    resize(browser, size)
    browser.get(written.as_uri())
    # Wide tables scroll by themselves, the page does not.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    assert [log for log in browser.get_log("browser") if log["level"] == "SEVERE"] == []
    assert all(browser.execute_script("return [...document.images].map((one) => one.complete && one.naturalWidth > 0)"))

    box = browser.find_element(By, ".table")

    def column(at: int) -> list[str]:
        return [row.find_elements(By, "td")[at].text for row in box.find_elements(By, "tbody tr")]

    values = column(1)
    box.find_elements(By, "thead th button")[2].click()
    assert [float(text) for text in column(1)] == sorted(float(text) for text in values)
    box.find_elements(By, "thead th button")[2].click()
    assert [float(text) for text in column(1)] == sorted((float(text) for text in values), reverse=True)
    box.find_element(By, "[data-mode=difference]").click()
    assert set(column(3)) == {"reference"} and all(text[0] in "+-" for text in column(0))
    box.find_element(By, "[data-mode=rank]").click()
    assert {int(text) for text in column(0)} <= {1, 2, 3, 4, 5}
    box.find_element(By, "[data-mode=value]").click()

    box.find_element(By, "tbody td button").click()
    dialog = browser.find_element(By, "dialog")
    assert dialog.is_displayed() and "examples" in dialog.text
    dialog.find_element(By, ".links a").click()
    assert not dialog.is_displayed()
    place = browser.find_element(By, browser.execute_script("return location.hash"))
    assert place.is_displayed() and "record file" in place.text
    place.find_element(By, "dd a").click()
    assert "package versions" in browser.find_element(By, browser.execute_script("return location.hash")).text


def test_examples_are_filtered_in_the_browser(browser: Any, tmp_path: Path) -> None:
    examples = [
        ReportedExample(
            f"{i}", "<b>asked</b> </script>", "right", {"A": Answer("a", float(i % 2)), "B": Answer("b", float(i < 8))}
        )
        for i in range(12)
    ]
    run = RunPage("one", "one", "", [], [], [], tasks=[Task("suite: task", "acc", 40, examples)])
    path = tmp_path / "page.html"
    path.write_text(page([run], "a page"))
    resize(browser, DESKTOP)
    browser.get(path.as_uri())
    box = browser.find_element(By, ".browser")

    def shown() -> list[str]:
        return [one.text for one in box.find_elements(By, ".example > .soft")]

    assert shown() == ["0", "1", "2", "3", "4"]
    assert box.find_element(By, "pre").text == "<b>asked</b> </script>"
    assert "12 of 40 are kept here" in box.find_element(By, "[role=status]").text
    box.find_element(By, "[data-step='1']").click()
    assert shown() == ["5", "6", "7", "8", "9"]
    box.find_element(By, "[data-step='-1']").click()
    which = box.find_elements(By, "select")[3]
    for option in which.find_elements(By, "option"):
        option.click()
        wanted = {
            "all": lambda a, b: True,
            "who is right differs": lambda a, b: a != b,
            "first right, second wrong": lambda a, b: a and not b,
            "second right, first wrong": lambda a, b: b and not a,
            "both right": lambda a, b: a and b,
            "both wrong": lambda a, b: not a and not b,
        }[option.text]
        assert shown() == [str(i) for i in range(12) if wanted(bool(i % 2), i < 8)][:5]


@pytest.mark.slow
def test_what_two_runs_differ_in(root: Path, tmp_path: Path) -> None:
    from tests.harness.reporting.test_runs import commonsense, finished, main

    one, other = finished(tmp_path, "table2", commonsense()), finished(tmp_path, "main", main())
    status, printed, _ = answer("experiment", "diff", one, other, "--format", "csv", "--root", tmp_path)
    lines = printed.splitlines()
    assert status == 0 and lines[0] == "key,table2/small/1,main/small/1"
    assert lines[1:] == [
        "configuration.experiment,table2,main",
        "configuration.title,about table2,about main",
    ]
    status, printed, said = answer("experiment", "diff", "main", "main", "--root", tmp_path)
    assert status == 0 and "do not differ" in said
    # A real one names models, texts and versions.
    status, printed, _ = answer("experiment", "diff", runs.find_run(root, "table2", None), one, "--format", "csv")
    keys = [line.split(",")[0] for line in printed.splitlines()]
    assert status == 0
    assert {
        "named.models.target",
        "named.passages",
        "libraries.torch",
        "commit",
        "configuration.roles.target.model",
    } <= {*keys}


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    status, _, said = answer("report", "--root", tmp_path, "--out", tmp_path / "out")
    assert status == 2 and "There are no finished runs below" in said
    status, _, said = answer("report", "tabel2", "--root", tmp_path)
    assert status == 2 and "did you mean 'table2'" in said
