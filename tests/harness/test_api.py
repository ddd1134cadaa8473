"""The public functions of the packages."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

import harness
from harness.store.fingerprint import file_sha256
from tests.harness.command import answer
from tests.harness.reporting.test_runs import commonsense
from tests.harness.reporting.test_runs import finished as finished_run
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


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda root: harness.evaluate("SmolLM2-135M-Instruct", "bbh", root=root, dtype="float8"), "dtype = 'float8'"),
        (lambda root: harness.evaluate("nowhere", "bhb", root=root), "no suite 'bhb'"),
        (lambda root: harness.evaluate("nowhere", "bbh", root=root, device="gpu"), "no device 'gpu'"),
        (lambda root: harness.evaluate("nowhere", "bbh", root=root), "no model 'nowhere'"),
        (lambda root: harness.load("main", overrides="training.epochs=0"), "training.epochs = 0"),
        (lambda root: harness.load(root / "nothing.yaml"), "There is no file .*nothing.yaml"),
        (lambda root: harness.plan("mian", root=root), "did you mean 'main'"),
        (lambda root: harness.run("quickstart", root="/proc/x"), "/proc/x cannot be made"),
        (lambda root: harness.tables("main", root=root), "'main' has no finished run"),
        (lambda root: harness.report("main", out=root, root=root), "'main' has no finished run"),
        (lambda root: harness.open_run("mian", root=root), "did you mean 'main'"),
    ],
)
def test_a_mistake_is_a_user_error(call: Callable[[Path], object], expected: str, tmp_path: Path) -> None:
    with pytest.raises(harness.UserError, match=expected):
        call(tmp_path)


@pytest.mark.slow
def test_one_name_or_several_are_given(tmp_path: Path) -> None:
    one = harness.load("quickstart", profile="micro", overrides="seeds=[3]", seeds=3)
    assert one == harness.load(Path("quickstart"), profile="micro", overrides=["seeds=[3]"], seeds=[3])
    folder = finished_run(tmp_path, "table2", commonsense())
    run = harness.open_run(folder)
    page = harness.report(run, out=tmp_path / "report")
    assert page == harness.report([str(folder)], out=tmp_path / "report")
    with pytest.raises(harness.UserError, match=r"no reference row 'clm' .did you mean 'CLM'"):
        harness.tables(run, reference="clm")


def test_a_run_is_opened_once_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished_run(tmp_path, "table2", commonsense())
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return file_sha256(path)

    monkeypatch.setattr("harness.reporting.runs.file_sha256", counted)
    monkeypatch.setattr("harness.experiment.run.make_records", lambda config, root: (folder, []))
    monkeypatch.setattr("harness.evaluation.standalone.evaluate", lambda *given, **settings: folder)
    calls = [
        lambda: harness.run("table2", root=tmp_path),
        lambda: harness.evaluate("SmolLM2-135M", "commonsense", root=tmp_path, data_root="tiny:"),
        lambda: harness.tables("table2", root=tmp_path),
        lambda: harness.report("table2", out=tmp_path, root=tmp_path),
        lambda: answer("experiment", "run", "table2", "--root", tmp_path),
        lambda: answer("tables", "table2", "--out", tmp_path, "--root", tmp_path),
    ]
    for call in calls:
        call()
        assert len(hashed) == 1
        hashed.clear()


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
    with pytest.raises(harness.UserError, match="did you mean 'target'"):
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
    status, printed, said = answer("tables", run.folder, "--json", "--root", tmp_path)
    assert status == 0 and "perplexity" in json.loads(printed)["title"], said
    assert "perplexity" in harness.report(run, out=tmp_path / "report").read_text(encoding="utf-8")
    (listed,) = json.loads(answer("run", "list", "--json", "--root", tmp_path)[1])
    assert (listed["experiment"], listed["folder"]) == ("eval", str(run.folder))
    with pytest.raises(harness.UserError, match="no suite 'perplexty'"):
        harness.evaluate(str(tmp_path / "model"), ["perplexty"], root=tmp_path)


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "harness.__version__"}
    citation = (Path(__file__).parents[2] / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {harness.__version__}\n" in citation
