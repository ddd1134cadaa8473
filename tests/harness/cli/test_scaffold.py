"""What `fusellm init` writes works as it is, and overwrites nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.harness.command import answer, sentence

ROOT = Path(__file__).parents[3]


def installed(folder: Path, site: Path, *arguments: str | Path) -> str:
    """What the command prints where the package in `folder` is installed."""
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_TARGET": str(site)}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", str(folder)]
    subprocess.run(pip, env=environment, check=True, capture_output=True)
    environment["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT)])
    command = [sys.executable, "-m", "harness", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def initialised(kind: str, name: str, folder: Path) -> list[Path]:
    status, printed, said = answer("init", kind, name, "--out", folder)
    assert status == 0, said
    return [Path(line) for line in printed.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "group"), [("baseline", "baseline"), ("suite", "suite")])
def test_a_new_package_is_found(kind: str, group: str, tmp_path: Path) -> None:
    files = initialised(kind, "my-part", tmp_path)
    assert files == [tmp_path / "my-part" / name for name in ("my_part.py", "pyproject.toml")]
    shown = installed(tmp_path / "my-part", tmp_path / "site", group, "list", "--json")
    (row,) = [row for row in json.loads(shown) if "my_part" in row.values()]
    assert "could not be imported" not in row["what it is"]


@pytest.mark.slow
def test_a_new_baseline_is_a_row(tmp_path: Path) -> None:
    initialised("baseline", "tuned", tmp_path)
    arguments = ["experiment", "run", "quickstart", "--profile", "micro", "--set", "methods.Mine.method=tuned"]
    printed = installed(tmp_path / "tuned", tmp_path / "site", *arguments, "--root", tmp_path / "root", "--json")
    assert json.loads(printed)["rows"][-1] == "Mine"


@pytest.mark.slow
def test_a_new_suite_is_measured(tmp_path: Path) -> None:
    initialised("suite", "next-letter", tmp_path)
    arguments = [
        "experiment",
        "run",
        "quickstart",
        "--profile",
        "micro",
        "--set",
        "suites.next_letter.texts=[a b, abc]",
    ]
    rows = [f"--set=methods.{row}=null" for row in ("CLM", "FuseLLM", "FuseLLM shuffled", "{sources}")]
    arguments += [*rows, "--reference", "target"]
    printed = installed(tmp_path / "next-letter", tmp_path / "site", *arguments, "--root", tmp_path / "root", "--json")
    assert "characters" in json.dumps([table["columns"] for table in json.loads(printed)])


def test_a_new_experiment_is_valid_and_plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file,) = initialised("experiment", "my-ablation", tmp_path)
    assert answer("experiment", "validate", file)[0] == 0
    shown = yaml.safe_load(answer("experiment", "show", file)[1])
    assert shown["experiment"] == "my-ablation" and "FuseLLM lambda 0.5" in shown["methods"]
    status, printed, said = answer("experiment", "plan", file, "--json", "--root", tmp_path / "root")
    assert status == 0 and "FuseLLM lambda 0.5" in {row["of"] for row in json.loads(printed)}, said


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    initialised("experiment", "mine", tmp_path)
    (tmp_path / "mine.yaml").write_text("own\n")
    status, printed, said = answer("init", "experiment", "mine", "--out", tmp_path)
    assert status == 2 and not printed and "mine.yaml exists already and is not overwritten" in sentence(said)
    assert (tmp_path / "mine.yaml").read_text() == "own\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["baseline", "fusellm"], "The name 'fusellm' is taken by another baseline (see `fusellm baseline list`)"),
        (["suite", "bbh"], "The name 'bbh' is taken by another suite"),
        (["experiment", "main"], "The name 'main' is taken by another experiment"),
        (["baseline", "My Method"], "'My Method' cannot name a baseline: use small letters"),
        (["suite", "../x"], "'../x' cannot name a suite"),
        (["baseline", "class"], "class is a word of Python's own, and a package of that name could not be imported"),
        (["suite", "json"], "json is a module of Python's standard library"),
        (["baseline", "numpy"], "numpy is the name of an installed package"),
        (["suite", "harness"], "harness is the name of an installed package"),
        (["method", "x"], "Invalid value for"),
    ],
)
def test_names_are_checked(arguments: list[str], expected: str, tmp_path: Path) -> None:
    status, _, said = answer("init", *arguments, "--out", tmp_path)
    assert status == 2 and expected in sentence(said)
    assert not list(tmp_path.iterdir())
