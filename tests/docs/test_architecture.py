"""The page about the architecture names files and symbols that exist, and the packages keep their limits of size."""

import ast
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from baselines.registry import METHODS
from fusion.losses.loss import LOSSES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
ROWS = re.findall(r"^\| (.+?) \| `([\w/]+\.py)` \| `(\w+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def _names(path: Path) -> set[str]:
    """Every name that the module defines, assigns or imports, at any level."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("question, file, name", ROWS, ids=[row[0] for row in ROWS])
def test_where_is_what(question: str, file: str, name: str) -> None:
    path = ROOT / file
    assert path.is_file(), f"{file} does not exist: say in docs/architecture.md where {name} is now"
    assert name in _names(path), f"{file} has no {name}: say in docs/architecture.md where it is now"


def test_every_question_has_an_answer() -> None:
    table = PAGE.read_text(encoding="utf-8").split("## Where is what")[1]
    assert len(ROWS) == sum(line.startswith("| ") for line in table.splitlines()) - 2  # the heading and its rule
    for topic in (
        "paired", "projected", "AvgCE", "shard", "ULD", "ZeRO-3", "MultiPL-E stop", "Holm", "system calls", "lambda",
        "progress bar", "`--set`",
    ):  # fmt: skip
        assert any(topic in question for question, *_ in ROWS), topic


PACKAGES = ("fusion", "baselines", "results", "harness")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MOST_LINES, MOST_MODULES = 400, 10
# Ten beside one module a method and one a loss; and results, which has no rooms.
LARGER = {
    "baselines": MOST_MODULES + len(METHODS.names()),
    "fusion/losses": MOST_MODULES + len(LOSSES.names()),
    "results": 12,
}


def test_a_module_is_short() -> None:
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in MODULES}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_a_folder_holds_few_modules() -> None:
    folders = Counter(str(path.parent.relative_to(ROOT)) for path in MODULES if path.name != "__init__.py")
    assert {name: count for name, count in folders.items() if count > LARGER.get(name, MOST_MODULES)} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_module_name_is_used_once_in_a_package(package: str) -> None:
    names = [
        path.parent.name if path.name == "__init__.py" else path.stem for path in sorted((ROOT / package).rglob("*.py"))
    ]
    assert {name: count for name, count in Counter(names).items() if count > 1} == {}


def test_every_room_has_its_layer() -> None:
    """A new room, or a new module of harness.config (which is on two floors), is given its place in the contracts."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    placed = {name for layer in layers for name in layer.split(" : ")}
    rooms = {f"harness.{path.parent.name}" for path in (ROOT / "harness").glob("*/__init__.py")} - {"harness.config"}
    modules = {f"harness.config.{path.stem}" for path in (ROOT / "harness" / "config").glob("[!_]*.py")}
    assert placed == rooms | modules | {"harness.api"}
    (acyclic,) = (contract["ancestors"] for contract in settings["contracts"] if contract["type"] == "acyclic_siblings")
    assert set(acyclic) == rooms | {"harness.config", "fusion", "baselines", "results"}
