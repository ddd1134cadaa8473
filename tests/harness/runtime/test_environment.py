"""The configuration alone decides: variables by which libraries would compute otherwise are ignored."""

import os
from pathlib import Path

import pytest

from harness.config.loading import load
from harness.experiment.candidates import build
from harness.runtime.environment import ignore_overrides
from harness.store.fingerprint import file_sha256


def test_overrides_are_removed_and_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_DYNAMO_BACKEND": "no",
        "FSDP_SHARDING_STRATEGY": "1",
        "NVIDIA_TF32_OVERRIDE": "1",
        "ACCELERATE_LOG_LEVEL": "info",
        "HF_HOME": "/somewhere",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    ignore_overrides()
    assert {name for name in given if name in os.environ} == {"ACCELERATE_LOG_LEVEL", "HF_HOME"}
    said = " ".join(capsys.readouterr().err.split())
    assert "ACCELERATE_MIXED_PRECISION=bf16, FSDP_SHARDING_STRATEGY=1, NVIDIA_TF32_OVERRIDE=1: ignored" in said
    ignore_overrides()
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_the_environment_does_not_change_a_training(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `accelerate launch --mixed_precision bf16` starts it, and as it is configured: in float32."""
    config, weights = load(str(experiment_file)), []
    for precision in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
        (row,) = build(config, ["CLM"], tmp_path / precision)
        weights.append(file_sha256(row.candidate.folder / "model.safetensors"))  # type: ignore[union-attr]
    assert weights[0] == weights[1]
