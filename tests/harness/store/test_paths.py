"""One module knows the names of folders and files below --root."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.store import paths

FOLDERS = {paths.ARTIFACTS, paths.MODELS, paths.RUNS, paths.EVALUATIONS, paths.TOOLCHAINS, paths.RECORDS}
FOLDERS |= {paths.MODEL_FOLDER}
FILES = {paths.RUN_FILE, paths.PLAN_FILE, paths.SUITES_FILE, paths.MANIFEST}
MODULES = sorted(path for path in paths.PACKAGE.rglob("*.py") if path != Path(paths.__file__))


def _names(module: Path) -> Iterator[str]:
    """Names of files anywhere in the code, and names of folders where they are joined to a path."""
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and node.value in FILES:
            yield f"{node.value!r} in line {node.lineno}"
        joined = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and node.right
        if isinstance(joined, ast.Constant) and str(joined.value).split("/")[0] in FOLDERS:
            yield f"{joined.value!r} in line {node.lineno}"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(paths.PACKAGE)))
def test_no_other_module_names_folders_or_files(module: Path) -> None:
    assert list(_names(module)) == []


def test_paths_of_runs_and_evaluations_lead_back_to_the_root(tmp_path: Path) -> None:
    run = paths.run_path(tmp_path, "table1", "small", "0123456789abcdef0123")
    evaluation = paths.evaluation_path(tmp_path, "model", "0123456789abcdef0123")
    assert run.name == evaluation.name == "0123456789abcdef"
    assert paths.root_of_run(run) == tmp_path.resolve()
    assert paths.root_of_evaluation(evaluation) == tmp_path
    for folder in (run, evaluation):
        folder.mkdir(parents=True)
        (folder / paths.RUN_FILE).touch()
    assert paths.run_files(tmp_path) == [run / paths.RUN_FILE, evaluation / paths.RUN_FILE]
    assert paths.experiment_of(run / paths.RUN_FILE) == "table1"
    artifact = tmp_path / paths.ARTIFACTS / "passages" / "text-0123456789abcdef"
    assert paths.place_of_artifact(artifact) == "artifacts/passages/text-0123456789abcdef"
