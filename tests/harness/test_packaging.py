"""Which packages each command needs: what only shows results and configurations runs without torch."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from harness.runtime.extras import EXTRAS
from tests.harness.command import answer

ROOT = Path(__file__).parents[2]
_BLOCKED = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
sys.argv = ["fusellm", *sys.argv[1:]]
from harness.cli import main

main()
"""
_DISTRIBUTIONS = {"google": "protobuf"}  # the one whose top-level module has another name


def _without(blocked: set[str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process that cannot import the modules `blocked`."""
    return subprocess.run(
        [sys.executable, "-c", _BLOCKED.format(blocked=blocked), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `quickstart` was run in the profile `micro`."""
    root = tmp_path_factory.mktemp("packaging")
    status, _, said = answer("experiment", "run", "quickstart", "--profile", "micro", "--root", root)
    assert status == 0, said
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "experiment list",
        "experiment show quickstart",
        "experiment show table1 --profile micro",
        "baseline list",
        "baseline show fusellm",
        "tables quickstart --root {root} --format md --out {root}/tables",
        "tables paper/table2",
        "report quickstart --root {root} --out {root}/report",
    ],
)
def test_no_optional_dependency_is_needed(command: str, root: Path) -> None:
    optional = {module for modules in EXTRAS.values() for module in modules}
    done = _without(optional, *command.format(root=root).split())
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module, extra", [("torch", "train"), ("transformers", "train")])
def test_a_missing_extra_is_named_in_one_sentence(module: str, extra: str, tmp_path: Path) -> None:
    done = _without({module}, "experiment", "run", "quickstart", "--profile", "micro", "--root", tmp_path)
    assert done.returncode == 2
    *_, sentence = done.stderr.splitlines()  # before it the run says how much of its corpus it took
    assert sentence == (
        f"fusellm: This needs the package {module}, which is not installed: pip install 'fusellm-harness[{extra}]'."
    )


def test_the_extras_are_those_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        extra: {re.split(r"[\[<>=]", item)[0] for item in items if not item.startswith("fusellm-harness")}
        for extra, items in project["optional-dependencies"].items()
    }
    expected = {
        extra: {_DISTRIBUTIONS.get(module, module.replace("_", "-")) for module in modules}
        for extra, modules in EXTRAS.items()
    }
    assert {extra: names for extra, names in declared.items() if extra not in ("all", "dev")} == expected


def test_the_packages_are_typed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in ("fusion", "baselines", "results", "harness"):
        assert (ROOT / package / "py.typed").is_file()
        assert "py.typed" in settings["package-data"][package]
