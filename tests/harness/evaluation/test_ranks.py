"""Two ranks measure a model together: the same bytes as one process, also where one of them was killed."""

import json
from pathlib import Path

import pytest

from harness.evaluation import perplexity
from harness.evaluation.lm_eval import parts
from tests.harness.command import answer
from tests.harness.runtime.test_distributed import launch
from tests.harness.tiny_models import save_corpus

pytestmark = pytest.mark.slow
PARTS = 4


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "REQUESTS", PARTS)
    monkeypatch.setattr(perplexity, "_PART", PARTS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as torchrun has it: more threads add in another order


def measured(root: Path) -> dict[str, bytes]:
    """All that suites and extractions have stored but the manifests, by place."""
    kinds = {"perplexity", "generative", "commonsense", "multipl_e_samples", "predictions"}
    return {
        str(path.relative_to(root)): path.read_bytes()
        for kind in kinds
        for path in (root / "artifacts" / kind).rglob("*")
        if path.is_file() and path.name != "manifest.json" and not path.name.startswith(".")
    }


def by_two(killed: str, *arguments: str | Path, check: bool = True) -> str:
    done = launch("-m", "tests.harness.evaluation.ranks_command", str(PARTS), killed, *arguments, check=check)
    assert (done.returncode == 0) is check
    return done.stdout


def test_two_ranks_of_which_one_is_killed_measure_what_one_process_does(
    rows: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    save_corpus(tmp_path / "test", 3, 12)
    command = [
        "eval",
        str(models["one"]),
        "--suite",
        "perplexity,commonsense,generative,multipl_e",
        "--task",
        "arc_easy",
    ]
    command += ["--task", "triviaqa", "--task", "js", "--samples", "2", "--generate-only", "--data-root", str(rows)]
    command += ["--set", "generative.max_new_tokens=4", "--set", "generative.num_fewshot=0", "--dtype", "float32"]
    command += ["--set", "multipl_e.max_new_tokens=6", "--set", f"perplexity.documents.path={tmp_path / 'test'}"]
    command += ["--set", "perplexity.documents.name_column=null", "--set", "perplexity.documents.domain_column=null"]
    status, alone, said = answer(*command, "--root", tmp_path / "one", "--format", "json")
    assert status == 0, said
    by_two("1", *command, "--root", tmp_path / "two", check=False)
    printed = by_two("-", *command, "--root", tmp_path / "two", "--format", "json")
    one, two = measured(tmp_path / "one"), measured(tmp_path / "two")
    assert len(one) > 6 and one == two
    assert printed == alone.replace(str(tmp_path / "one"), str(tmp_path / "two"))


def test_two_ranks_run_and_audit_an_experiment_as_one_process_does(experiment_file: Path, tmp_path: Path) -> None:
    command = [
        experiment_file,
        "--set",
        "methods.CLM={method: as_is, role: target}",
        "--set",
        "methods.FuseLLM published=null",
    ]
    audit = ["audit", *command, "--passages", "5", "--format", "json"]
    run = ["experiment", "run", *command, "--set", "methods.FuseLLM=null", "--format", "json"]
    one, two = tmp_path / "one", tmp_path / "two"
    status, alone, said = answer(*audit, "--root", one)
    assert status == 0, said
    assert by_two("-", *audit, "--root", two) == alone
    assert measured(one) == measured(two)
    (sample,) = (one / "artifacts" / "passages").glob("*-sample-*/manifest.json")
    of_predictions = [json.loads(p.read_text()) for p in (one / "artifacts" / "predictions").glob("*/manifest.json")]
    assert {m["inputs"]["passages"] for m in of_predictions} == {json.loads(sample.read_text())["fingerprint"]}
    status, alone, said = answer(*run, "--root", one)
    assert status == 0, said
    assert by_two("-", *run, "--root", two) == alone
    assert measured(one) == measured(two) and len(measured(one)) > 6
