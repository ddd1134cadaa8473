"""Everything in examples/ works: the experiments run, the packages are those of the pages, the notebook is executed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import harness
from harness.config.loading import load
from tests.harness.command import answer
from tests.harness.tiny_models import save_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
EXPERIMENTS = sorted(EXAMPLES.glob("*.yaml"))
ROWS = {
    "ablation": ["target", "CLM", "FuseLLM", "FuseLLM lambda=0.5", "FuseLLM tail=renormalise", "FuseLLM fusion=avgce"],
    "distillation": ["target", "coder", "reader", "CLM", "FuseLLM", "Forward KL", "Reverse KL", "ULD", "ALM"],
    "own-corpus": ["target", "coder", "reader", "CLM", "FuseLLM"],
    "own-models": ["target", "mine", "CLM", "FuseLLM"],
}


def _texts(folder: Path) -> None:
    """The text that own-corpus.yaml names: the files of docs/your-own-data.md."""
    page = (ROOT / "docs" / "your-own-data.md").read_text(encoding="utf-8")
    for title, text in re.findall(r"^```\w* title=\"(texts/[^\"]+)\"\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        (folder / title).parent.mkdir(parents=True, exist_ok=True)
        (folder / title).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current directory of all examples, with the models and texts that they name."""
    from transformers import GPTNeoXConfig, LlamaConfig

    folder = tmp_path_factory.mktemp("examples")
    save_model(folder / "models" / "target", LlamaConfig, 300, 0)
    save_model(folder / "models" / "source", GPTNeoXConfig, 340, 1)
    _texts(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("FUSELLM_ROOT", str(folder / "work"))
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_runs(path: Path, folder: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 20
    status, _, said = answer("experiment", "run", path)
    assert status == 0, said
    run = harness.open_run(path.stem)
    assert list(run.methods) == ROWS[path.stem]
    values = harness.tables(run)["table"].to_frame()
    assert values["average"].notna().all()


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_valid(path: Path, folder: Path) -> None:
    assert load(str(path)).experiment == path.stem


@pytest.mark.parametrize("page", ["adding-a-baseline", "adding-a-suite"])
def test_a_package_is_the_one_of_its_page(page: str) -> None:
    """The pages are followed to the letter by other tests; the folders hold the same files."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    files = re.findall(r"^```\w* title=\"([^\"]+/[^\"]+)\"\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(files) == 2
    for title, content in files:
        assert (EXAMPLES / title).read_text(encoding="utf-8") == content, f"{title}: page and example differ"


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(folder: Path) -> None:
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["nbformat"] == 4 and cells and all(cell["outputs"] == [] for cell in cells)
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"notebook.ipynb, cell {number}", "exec"), names)
    assert (folder / "notebook-report" / "report.html").exists()


def test_every_example_is_listed() -> None:
    listed = set(re.findall(r"^\| `([^`]+)` \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    there = {path.name + "/" * path.is_dir() for path in EXAMPLES.iterdir() if not path.name.startswith(("__", "."))}
    assert listed == there - {"README.md"}
