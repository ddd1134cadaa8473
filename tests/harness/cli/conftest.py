"""Where a user stands who gets something wrong."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def here(made: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with copies of the models, of the text and of the experiment, which is also where commands run."""
    folder = tmp_path / "here"
    for name in ("llama", "neox", "train", "test"):
        shutil.copytree(made / name, folder / name)
    shutil.copytree(made / "llama", folder / "wide")
    text = experiment_file.read_text(encoding="utf-8").replace(str(made), str(folder))
    (folder / "small.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FUSELLM_ROOT", str(folder / "root"))
    return folder
