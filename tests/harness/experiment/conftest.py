"""A finished run that nothing disturbed, and copies of it that a test may harm."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def undisturbed(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that nothing disturbed."""
    from harness.config.loading import load
    from harness.experiment import run

    root = tmp_path_factory.mktemp("undisturbed")
    run.run(load(str(experiment_file)), root)
    return root


@pytest.fixture
def again(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of a finished run's root."""
    return Path(shutil.copytree(undisturbed, tmp_path / "root"))
