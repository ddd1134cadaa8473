"""The public functions of the packages."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import harness
from tests.harness.tiny_models import save_model


@pytest.mark.parametrize("package", ["harness", "fusion", "results"])
def test_every_public_name_exists(package: str) -> None:
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(module, "no_such_name")  # noqa: B009


@pytest.mark.parametrize("package", ["harness", "fusion", "results"])
def test_importing_a_package_imports_nothing_heavy(package: str) -> None:
    code = f"import sys, {package}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "torch", "pandas", "pydantic", "transformers"} & set(done.stdout.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> harness.Run:
    config = harness.load("quickstart", profile="micro", overrides=["curve.points=1"])
    root = tmp_path_factory.mktemp("api")
    assert any(one.state == "missing" for one in harness.plan(config, root=root))
    run = harness.run(config, root=root)
    assert all(one.state == "ready" for one in harness.plan(config, root=root))
    return run


@pytest.mark.slow
def test_a_run_is_opened_by_name_and_by_folder(finished: harness.Run) -> None:
    root = finished.folder.parents[3]
    assert harness.open_run("quickstart", root=root).folder == finished.folder
    assert harness.open_run(finished.folder).experiment == "quickstart"
    with pytest.raises(harness.UserError, match="no finished run"):
        harness.open_run("main", root=root)


@pytest.mark.slow
def test_tables_take_another_reference(finished: harness.Run) -> None:
    table = harness.tables(finished)["table"]
    assert list(table.to_frame().index) == list(finished.methods)
    other = harness.tables(finished, reference="target")["table"]
    assert other.to_frame().equals(table.to_frame())
    target = list(finished.methods).index("target")
    assert all(cell.difference in (None, 0) for cell in other.cells[target])
    with pytest.raises(Exception, match="targt"):
        harness.tables(finished, reference="targt")


@pytest.mark.slow
def test_a_report_is_written(finished: harness.Run, tmp_path: Path) -> None:
    assert harness.report([finished.folder], out=tmp_path).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.slow
def test_a_model_is_evaluated_on_a_suite_with_settings(finished: harness.Run, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = finished.configuration
    save_model(tmp_path / "model", LlamaConfig, 300, 0)
    suites = {"perplexity": config["suites"]["perplexity"]}
    run = harness.evaluate(str(tmp_path / "model"), suites, root=tmp_path, dtype="float32", device="cpu")
    assert list(harness.tables(run)) == ["table-perplexity"]
    with pytest.raises(harness.UserError, match="no suite 'perplexty'"):
        harness.evaluate(str(tmp_path / "model"), ["perplexty"], root=tmp_path)


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "harness.__version__"}
    citation = (Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {harness.__version__}\n" in citation
