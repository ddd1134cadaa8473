"""What lists and shows: every group has both, every output has a format for programs, and widths are respected."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from harness.cli import app
from harness.store.artifacts import Spec, Store
from tests.harness.command import answer, sentence
from tests.harness.reporting.test_runs import finished
from tests.results.sample import final


def commands() -> dict[str, typer.core.TyperCommand]:
    """Every command by its words."""

    every = {}
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", {"": command})
        every |= {f"{name} {own}".strip(): one for own, one in inner.items()}
    return every


@pytest.mark.parametrize("group", ["experiment", "baseline", "suite", "model", "artifact", "run"])
def test_every_group_lists_and_shows(group: str) -> None:
    assert {f"{group} list", f"{group} show"} <= commands().keys()


# Those print a path alone, or have one format.
WITHOUT_FORMAT = {"report", "model fetch", "model convert", "init", "schema"}


@pytest.mark.parametrize("words", [words for words in commands() if words not in WITHOUT_FORMAT])
def test_what_is_printed_has_a_format_for_programs(words: str) -> None:
    options = {name for parameter in commands()[words].params for name in parameter.opts}
    assert {"--format", "-f", "--json"} <= options


def test_help_says_defaults_in_one_way() -> None:
    helps = {
        f"{words} {parameter.name}": parameter.help
        for words, command in commands().items()
        for parameter in command.params
        if getattr(parameter, "help", None)
    }
    for place, text in helps.items():
        assert not re.search(r"\bwithout\.$|repeats\.", text), place
        assert text.endswith("."), place


def test_commands_are_listed_with_the_first_one_first() -> None:
    printed = answer("--help")[1]
    places = [printed.index(f"│ {name} ") for name in ("quickstart", "experiment", "tables", "baseline", "doctor")]
    assert places == sorted(places)


def test_version_names_what_computes() -> None:
    status, printed, _ = answer("--version")
    assert status == 0
    assert re.match(r"fusellm-harness \d+\.\d+\.\d+\S* .*python 3\.\d+.*, torch \d+.*, transformers \d+", printed)


def test_json_is_short_for_the_format(tmp_path: Path) -> None:
    for arguments in (["experiment", "list"], ["baseline", "show", "fusellm"], ["suite", "list"], ["model", "list"]):
        short, long = answer(*arguments, "--json"), answer(*arguments, "--format", "json")
        assert short == long and json.loads(short[1])
    status, _, said = answer("model", "list", "--json", "-f", "csv")
    assert status == 2 and "--json contradicts --format csv" in sentence(said)


def test_documents_are_yaml_or_json() -> None:
    for arguments in (["experiment", "show", "main"], ["model", "show", "pythia-1b"]):
        assert yaml.safe_load(answer(*arguments)[1]) == json.loads(answer(*arguments, "--json")[1])


def test_suites_show_their_tasks_and_settings() -> None:
    rows = {row["suite"]: row for row in json.loads(answer("suite", "list", "--json")[1])}
    assert "hellaswag" in rows["commonsense"]["tasks"] and rows["perplexity"]["tasks"] == []
    settings = {row["setting"]: row for row in json.loads(answer("suite", "show", "perplexity", "--json")[1])}
    assert settings["documents"]["default"].startswith("required (eval: {")
    printed = answer("suite", "show", "bbh")[1]
    assert "variant" in printed and "word_sorting (exact_match)" in printed
    status, _, said = answer("suite", "show", "bhb")
    assert status == 2 and "did you mean 'bbh'" in sentence(said)


def test_lists_for_programs_hold_lists_and_objects() -> None:
    (main,) = [row for row in json.loads(answer("experiment", "list", "--json")[1]) if row["experiment"] == "main"]
    assert main["profiles"] == ["small", "paper"]
    methods = {row["method"]: row for row in json.loads(answer("baseline", "list", "--json")[1])}
    assert methods["distillation"]["needs"] == ["training", "teacher"]
    parameters = {one["name"]: one for one in methods["distillation"]["parameters"]}
    assert parameters["map"]["default"] == "first_piece" and parameters["tail"]["default"] == "bucket"
    assert "small, paper" in answer("experiment", "list", "--format", "csv")[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("eval m --suite bbh,com", "bbh,commonsense"),
        ("tables paper/table1", "paper/table10"),
        ("tables al", "all"),
        ("experiment run quickstart --reference Fu", "FuseLLM"),
        ("extract quickstart --role co", "coder"),
        ("baseline build Fu", "FuseLLM shuffled"),
        ("baseline build dist", "distillation"),
    ],
)
def test_a_shell_completes(words: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_FUSELLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"fusellm {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    assert expected in answer()[1].splitlines()


def test_what_is_published_has_no_other_reference() -> None:
    for option in (["--reference", "CLM"], ["--with-paper"]):
        status, _, said = answer("tables", "paper/table2", *option)
        assert status == 2 and "paper/table2 is the published table as it is: leave" in sentence(said)


def test_models_show_where_they_lie(tmp_path: Path) -> None:
    shown = json.loads(answer("model", "show", "pythia-1b", "--json", "--root", tmp_path)[1])
    assert shown["hub"] == "EleutherAI/pythia-1b" and shown["folder"] is None
    status, _, said = answer("model", "show", "pythia-1")
    assert status == 2 and "did you mean 'pythia-1b'" in sentence(said)


def test_artifacts_are_listed_for_people_and_for_programs(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")

    def build(folder: Path) -> None:
        (folder / "map").write_bytes(b"x" * 1500)

    folder = store.ensure(Spec("map", "coder", 1, {}, {}), build)
    assert "1.5 kB" in answer("artifact", "list", "--root", tmp_path)[1]
    (row,) = json.loads(answer("artifact", "list", "--json", "--root", tmp_path)[1])
    assert row["size (bytes)"] == 1500 and row["kind"] == "map"
    for name in (folder.name, str(folder)):
        assert yaml.safe_load(answer("artifact", "show", name, "--root", tmp_path)[1])["label"] == "coder"
    status, _, said = answer("artifact", "show", "nothing", "--root", tmp_path)
    assert status == 2 and "There is no artifact 'nothing'" in sentence(said)
    assert json.loads(answer("artifact", "verify", "--json", "--root", tmp_path)[1])[0]["problem"] is None
    (unused,) = json.loads(answer("artifact", "gc", "--json", "--root", tmp_path)[1])
    assert unused == {"state": "unused", "folder": str(folder), "size (bytes)": unused["size (bytes)"]}
    assert folder.exists()


def test_runs_are_listed_shown_and_given_by_their_folders(tmp_path: Path) -> None:
    records = [record for method in ("CLM", "FuseLLM") for record in final(method, (0,), 0.01)]
    old = finished(tmp_path, "main", records, finished=3)
    new = finished(tmp_path, "main", records, profile="tiny", finished=7)
    listed = json.loads(answer("run", "list", "--json", "--root", tmp_path)[1])
    assert [row["folder"] for row in listed] == [str(new), str(old)]
    assert (
        listed[0]["profile"] == "tiny"
        and {"CLM", "FuseLLM"} <= set(listed[0]["rows"])
        and listed[0]["finished"].startswith("1970-01-01T00:00:07")
    )
    for run in ("main", str(new)):
        assert yaml.safe_load(answer("run", "show", run, "--root", tmp_path)[1])["folder"] == str(new)
    both = json.loads(answer("tables", old, new, "--json", "--root", tmp_path)[1])
    assert [table["title"] for table in both] == ["about main (main, small)", "about main (main, tiny)"]
    status, _, said = answer("tables", tmp_path / "runs", "--root", tmp_path)
    assert status == 2 and "holds no finished run, as it has no run.json: see `fusellm run list`" in sentence(said)


@pytest.mark.slow
def test_numbers_of_two_runs_are_compared(tmp_path: Path) -> None:
    def run(shift: float, finish: float) -> Path:
        records = [*final("CLM", (0,), 0.0), *final("FuseLLM", (0,), shift)]
        return finished(tmp_path, "main", records, finished=finish)

    one, other = run(0.01, 1), run(0.03, 2)
    rows = json.loads(answer("experiment", "diff", "--numbers", "--json", one, other, "--root", tmp_path)[1])
    assert rows and {row["row"] for row in rows} == {"FuseLLM"}
    for row in rows:
        first, second = (row["/".join(folder.parts[-3:])] for folder in (one, other))
        assert row["difference"] == second - first != 0
    status, _, said = answer("experiment", "diff", "--numbers", one, one, "--root", tmp_path)
    assert status == 0 and said == "The tables of the two runs do not differ.\n"


def test_columns_sets_the_width_of_what_is_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, answer("experiment", "list")[1].splitlines())) <= 60
    monkeypatch.delenv("COLUMNS")
    assert max(map(len, answer("experiment", "list")[1].splitlines())) > 60


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("experiment run quick", {"quickstart"}),
        ("experiment run main --profile ", {"micro", "paper", "small", "tiny"}),
        ("baseline show fuse", {"fusellm"}),
        ("suite show c", {"commonsense"}),
        ("eval x --suite b", {"bbh"}),
        ("model fetch SmolLM2-1", {"SmolLM2-135M-Instruct"}),
    ],
)
def test_a_shell_completes_names(typed: str, expected: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"fusellm {typed}".split(" ")
    monkeypatch.setenv("_FUSELLM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    code = (
        "import sys\nfrom harness.cli import main\ntry:\n    main()\nfinally:\n"
        "    assert not {'torch', 'transformers', 'lm_eval', 'mergekit', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert expected <= set(done.stdout.split())
