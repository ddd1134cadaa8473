"""The page about adding a baseline, followed to the letter; and packages that go wrong."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from baselines.registry import METHODS
from tests.harness.command import answer, sentence
from tests.registries import restore_after

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-baseline.md"
BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_leads_to_a_row(tmp_path: Path) -> None:
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    files = {title: text for _, title, text in blocks if title}
    assert sum(bool(line.strip()) for text in files.values() for line in text.splitlines()) <= 20
    for title, text in files.items():
        (tmp_path / title).parent.mkdir(exist_ok=True)
        (tmp_path / title).write_text(text, encoding="utf-8")
    (commands,) = (text for language, _, text in blocks if language == "bash")
    site = tmp_path / "site"
    programs = {
        # Not among this environment's packages, and without a network.
        "pip": [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"],
        "fusellm": [sys.executable, "-m", "harness"],
    }
    environment = {
        **os.environ,
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # what switches the isolation off
        "PYTHONPATH": os.pathsep.join([str(site), str(PAGE.parents[1])]),
        "FUSELLM_ROOT": str(tmp_path / "root"),
    }
    printed = []
    for command in commands.splitlines():
        program, *arguments = shlex.split(command)
        done = subprocess.run(
            [*programs[program], *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    _, listed, shown, table = printed
    assert re.search(r"^\W*tuned_lambda\s+FuseLLM with the lambda", listed, re.MULTILINE)
    assert "lambdas" in shown and "Needs: training." in shown
    assert re.search(r"^\W*Tuned\W", table, re.MULTILINE)
    (run,) = (tmp_path / "root" / "runs").glob("quickstart/micro/*")
    rows = json.loads((run / "table.json").read_text(encoding="utf-8"))["rows"]
    assert rows[-1] == "Tuned" and "FuseLLM" in rows
    # The lambda that the FuseLLM row has, too, is trained once.
    assert len(list((tmp_path / "root" / "artifacts" / "train").glob("*/manifest.json"))) == 4


def _package(folder: Path, name: str, offered: str, code: str) -> None:
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[fusellm.methods]\n{offered}\n", encoding="utf-8")


def test_a_package_that_goes_wrong_is_named_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore_after(monkeypatch, METHODS)
    _package(tmp_path, "plug_broken", "broken = plug_broken:Broken", "raise RuntimeError('not\\ntoday')\n")
    _package(tmp_path, "plug_first", "twice = plug_first:A", "A = 1\n")
    _package(tmp_path, "plug_second", "twice = plug_second:A\nmerge = plug_second:A", "A = 1\n")
    _package(tmp_path, "plug_number", "number = plug_number:A", "A = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    wrong = {
        "broken": r"method .broken. could not be imported from .plug_broken:Broken. .RuntimeError: not today.: correct",
        "twice": r"method 'twice' is offered by two packages, as 'plug_\w+:A' and 'plug_\w+:A': uninstall one",
        "number": r"method 'number' is not a function decorated with @method.'number'. .*: correct or uninstall",
        "merge": r"method 'merge' is registered by 'baselines', and a package offers another as 'plug_second:A'",
    }
    status, printed, _ = answer("baseline", "list", "--format", "json")
    assert status == 0
    listed = {row["method"]: row["what it is"] for row in json.loads(printed)}
    assert (
        listed["clm"].startswith("The target trained on causal language modelling alone")
        and listed.keys() > wrong.keys()
    )
    for name, expected in wrong.items():
        assert re.search(expected, listed[name])
        for command in (
            ["baseline", "show", name],
            ["experiment", "show", "main", "--set", f"methods.X.method={name}"],
        ):
            status, _, said = answer(*command)
            assert status == 2 and re.search(expected, sentence(said)), said
    assert answer("experiment", "show", "main")[0] == 0
