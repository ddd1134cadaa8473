"""The documentation is followed to the letter: its files are written, its commands run, page by page from the top.

A block of commands that is not run says why in a comment above it; of that, of the README and of the pages of results
every command is parsed, and every experiment that it names is resolved. Adding a baseline, with the real pip, is
followed in tests/docs/test_adding_a_baseline.py.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from baselines.registry import METHODS
from fusion.losses.loss import LOSSES
from harness.cli import app
from harness.evaluation.suite import SUITES
from tests.harness.command import answer
from tests.registries import restore_after

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FIRST = "index.md"  # what it makes, other pages show
PAGES = sorted({path.name for path in DOCS.glob("*.md")} - {FIRST, "adding-a-baseline.md"})
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>.+) -->\n)?"
    r"```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
PROGRAMS = ("fusellm", "make", "torchrun", "deepspeed", "pip")


def _commands(text: str) -> Iterator[list[str]]:
    for line in text.replace("\\\n", " ").splitlines():
        if command := shlex.split(line, comments=True):
            yield command


def _install(package: Path, site: Path) -> None:
    """What `pip install` leaves of a package of one module: the module, and its entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = project["entry-points"]
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in one.items()) for group, one in points.items())
    )
    for module in package.glob("*.py"):
        (site / module.name).write_bytes(module.read_bytes())


def _follow(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    restore_after(monkeypatch, SUITES, METHODS, LOSSES)
    printed = ""
    names: dict[str, object] = {}
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        language, title, text = block["language"], block["title"], block["text"]
        if title:
            Path(title).parent.mkdir(parents=True, exist_ok=True)
            Path(title).write_text(text, encoding="utf-8")
        elif language == "text":  # lines of what was printed last
            assert {" ".join(one.split()) for one in text.splitlines()} <= {
                " ".join(one.split()) for one in printed.splitlines()
            }
        elif language == "yaml":
            assert yaml.safe_load(text), text
        elif language == "python":
            exec(compile(text, page.name, "exec"), names)
        else:
            assert language == "bash", f"{page.name}: a block of {language!r} is neither a file nor commands"
            for command in _commands(text):
                if block["reason"]:
                    _parse(command)
                elif command[:2] == ["pip", "install"]:
                    _install(Path(command[-1]), folder / "site")
                    monkeypatch.syspath_prepend(folder / "site")
                else:
                    program, *arguments = command
                    assert program == "fusellm", f"{page.name}: say why {program} is not run"
                    status, printed, said = answer(*arguments)
                    assert status == 0, f"{page.name}: {shlex.join(command)}: {said}"


def _parse(command: list[str]) -> None:
    """Fails for what the programs do not know: a command, an option, an experiment, a setting, a target of make."""
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(arguments) <= set(targets), command
        return
    if program in ("torchrun", "deepspeed"):
        assert {"--no-python", "--no_python"} & set(arguments), (
            f"{command}: a folder harness/ would be imported instead"
        )
        arguments = arguments[arguments.index("fusellm") + 1 :]
    elif program != "fusellm":
        return
    # An unknown option is refused before help is given.
    status, _, said = answer(*arguments, "--help")
    assert status == 0, f"{shlex.join(command)}: {said}"
    if arguments[:2] == ["experiment", "run"] or arguments[0] in ("audit", "extract"):
        names, settings = _of_experiments(arguments[2 if arguments[0] == "experiment" else 1 :])
        for name in names:
            status, _, said = answer("experiment", "show", name, *settings)
            assert status == 0, f"{shlex.join(command)}: {said}"


def _of_experiments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The experiments that ship with the harness, and what is said of their configuration."""
    names, settings = list[str](), list[str]()
    rest = iter(arguments)
    for one in rest:
        if not one.startswith("-"):
            names += [] if one == "all" or one.endswith(".yaml") else [one]
        elif one != "--dry-run":
            value = next(rest)
            settings += [one, value] if one in ("--profile", "--set", "--seed") else []
    return names, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the first page was followed."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FUSELLM_ROOT", str(folder / "work"))
        _follow(DOCS / FIRST, folder, monkeypatch)
        yield folder


@pytest.mark.slow
def test_the_first_page_leaves_what_it_says(folder: Path) -> None:
    assert "FuseLLM lambda 0.5" in (next(folder.glob("work/runs/mine/micro/*")) / "table.md").read_text()
    assert (folder / "report" / "report.html").exists() and (folder / "tables" / "quickstart.tex").exists()
    # The user's own experiment trained one row more, and read no corpus again.
    kinds = [path.parents[1].name for path in (folder / "work" / "artifacts").glob("*/*/manifest.json")]
    assert kinds.count("train") == 4 and kinds.count("predictions") == 3


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_followed(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _follow(DOCS / page, folder, monkeypatch)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((DOCS / "results").rglob("*.md"))], ids=str)
def test_commands_that_are_only_shown_are_known(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for line in lines:
        if line.startswith("    ") and line.strip() and line.split()[0] in PROGRAMS:
            _parse(shlex.split(line, comments=True))


def test_what_is_wrong_is_found() -> None:
    for wrong in (
        "fusellm tabels all",
        "fusellm tables --formt md",
        "fusellm experiment run tabel1 --profile micro",
        "fusellm experiment run table1 table9 --profile micro",
        "torchrun --no-python fusellm experiment run main --profile pape",
        "torchrun -m harness experiment run main --profile paper",
        "fusellm audit main --set training.epoch=2",
        "make quikstart",
    ):
        with pytest.raises(AssertionError):
            _parse(shlex.split(wrong))


def test_the_table_of_commands_names_all_of_them() -> None:
    program: Any = typer.main.get_command(app)
    commands = {
        (name, own) for name, command in program.commands.items() for own in getattr(command, "commands", None) or [""]
    }
    named = set[tuple[str, str]]()
    for cell in re.findall(r"^\| (`fusellm .+?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE):
        first, *others = re.findall(r"`([^`]+)`", cell)
        _, name, *rest = first.split()
        grouped = hasattr(program.commands[name], "commands")
        named.add((name, rest[0] if grouped else ""))
        named |= {(name, other) if grouped else (other, "") for other in others}
    assert named == commands
