"""Nothing of the current folder is executed or imported."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from harness.runtime.programs import search_path, which

TOOLS = [
    "bwrap",
    "g++",
    "git",
    "go",
    "java",
    "javac",
    "node",
    "npm",
    "php",
    "python3",
    "ruby",
    "Rscript",
    "rustc",
    "tsc",
]


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder with what commands and imports might take from it; whatever runs leaves `ran-NAME` behind."""
    folder = tmp_path / "hostile"
    places = [folder / name for name in TOOLS] + [folder / "bin" / name for name in TOOLS]
    places.append(folder / ".toolchain/node_modules/@typescript/typescript-linux-x64/lib/tsc")
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran-{path.name}\necho 1\n")
        path.chmod(0o755)
    for module in ("pip", "pytest", "rich", "typer", "yaml", "torch", "conftest"):
        (folder / f"{module}.py").write_text(f"open({str(tmp_path / f'ran-{module}.py')!r}, 'w')\n")
    (folder / ".Rprofile").write_text(f"file.create('{tmp_path}/ran-Rprofile')\n")
    (folder / "rust-toolchain.toml").write_text(f'[toolchain]\npath = "{folder}"\n')
    return folder


def test_programs_are_looked_up_in_absolute_folders_only(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(hostile)
    monkeypatch.setenv("PATH", ":.:bin:/usr/bin:")
    assert search_path() == "/usr/bin"
    assert which("tsc") != "./tsc"
    monkeypatch.setenv("PATH", "bin:.")
    assert which("git") is None


@pytest.mark.slow
def test_doctor_runs_nothing_of_the_current_folder(hostile: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f":.:bin:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-m", "harness", "doctor", "--root", str(tmp_path / "root")]
    done = subprocess.run(command, cwd=hostile, env=environment, capture_output=True, text=True, check=False)
    assert "sandbox" in done.stdout, done.stderr
    assert sorted(path.name for path in tmp_path.glob("ran-*")) == []


@pytest.mark.parametrize("program", ["harness", "benchmarks"])
@pytest.mark.parametrize("site", [[], ["-S"]], ids=["site", "no site"])
def test_python_m_imports_no_standard_module_of_the_current_folder(
    site: list[str], program: str, tmp_path: Path
) -> None:
    """With `-S` no `.pth` file of this environment has imported the true ones before."""
    here = tmp_path / "here"
    here.mkdir()
    names = {"typing", "importlib", "pathlib", "json", "argparse"}
    for name in names - {"importlib"} if site else names:  # without site, runpy itself imports `importlib` from here
        (here / f"{name}.py").write_text(f"open({str(tmp_path / f'ran-{name}.py')!r}, 'w')\n")
    places = [str(Path(__file__).parents[3]), sysconfig.get_path("purelib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, *site, "-m", program, "--help"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert sorted(path.name for path in tmp_path.glob("ran-*")) == []
    assert done.returncode == 0, done.stderr
