"""The command line as a user meets it; mistakes and faults have files of their own."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.harness.command import answer, fusellm


def test_help_does_not_import_what_is_slow() -> None:
    code = (
        "import sys\nsys.argv = ['fusellm', 'experiment', 'run', '--help']\nfrom harness.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "slow = {'torch', 'transformers', 'lm_eval', 'mergekit', 'pandas', 'numba', 'scipy'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_every_help_answers() -> None:
    for command in (
        ["experiment", "run"],
        ["model", "fetch"],
        ["artifact", "gc"],
        ["tables"],
        ["audit"],
        ["doctor"],
        ["multipl-e", "execute"],
        ["eval"],
    ):
        assert "Usage" in answer(*command, "--help")[1]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The micro run of `quickstart`, uninterrupted."""
    root = tmp_path_factory.mktemp("micro")
    fusellm("experiment", "run", "quickstart", "--profile", "micro", "--root", root)
    return root


def test_quickstart_prints_its_table(quickstart: Path) -> None:
    printed = fusellm("tables", "quickstart", "--format", "md", "--root", quickstart).stdout
    assert "plumbing, not a result" in printed.lower()
    for row in ("target", "coder", "reader", "CLM", "FuseLLM", "FuseLLM published"):
        assert f"| {row} |" in printed
    assert "match their manifests" in fusellm("artifact", "verify", "--root", quickstart).stdout
    assert "FuseLLM" in fusellm("artifact", "list", "--root", quickstart).stdout


# What tells the time or the place; the rest of a run depends on its configuration and seeds alone.
TELLING = {"manifest.json", "run.json", "log.json", ".hashes.json"}


def _bytes(root: Path) -> dict[str, bytes]:
    """Everything below a root but logs, by path."""
    files = (p for p in root.rglob("*") if p.is_file() and p.name not in TELLING and "tensorboard" not in p.parts)
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


@pytest.mark.slow
def test_another_run_makes_the_same_bytes(quickstart: Path, tmp_path: Path) -> None:
    """In another folder and process, at another time and (as Python does by itself) with another hash of strings."""
    fusellm("experiment", "run", "quickstart", "--profile", "micro", "--root", tmp_path)
    one, two = _bytes(quickstart), _bytes(tmp_path)
    assert one.keys() == two.keys()
    assert [path for path in one if one[path] != two[path]] == []
    for pattern, least in {
        "runs/*/*/*/records/*.parquet": 6,
        "runs/*/*/*/table.*": 3,
        "artifacts/train/*/model/model.safetensors": 3,
        "artifacts/train/*/curve.jsonl": 3,
        "artifacts/extraction/*/shard-*.safetensors": 3,
        "artifacts/tiny/*/model/model.safetensors": 3,
        "artifacts/map/*/map.npy": 4,
    }.items():
        assert sum(Path(path).match(pattern) for path in one) >= least, pattern


def test_commands_of_one_process_refuse_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    status, _, said = answer("audit", "quickstart")
    assert status == 2 and said == "fusellm: fusellm audit is one process: start it without torchrun or deepspeed.\n"


def test_show_prints_what_was_set() -> None:
    arguments = ["experiment", "show", "main", "--set", "methods.FuseLLM.lambda=0.5", "--seed", "3", "--seed", "4"]
    shown = yaml.safe_load(answer(*arguments)[1])
    assert shown["methods"]["FuseLLM"] == {"method": "fusellm", "preset": "corrected", "lambda": 0.5}
    assert shown["seeds"] == [3, 4] and shown["training"]["warmup_ratio"] == 0.008
    assert list(shown["methods"])[:2] == ["SmolLM2-135M-Instruct", "Gemma-3-270M"]


def test_paper_profile_plans_without_models_or_text(tmp_path: Path) -> None:
    status, printed, said = answer("experiment", "run", "main", "--profile", "paper", "--dry-run", "--root", tmp_path)
    assert status == 0, said
    assert "FuseLLM" in printed and "missing" in printed
