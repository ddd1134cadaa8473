"""The command line as a user meets it; mistakes and faults have files of their own."""

import json
import shutil
import subprocess
import sys
from collections.abc import Set
from pathlib import Path

import pytest
import yaml

from harness.config.loading import suite_settings
from tests.harness.command import answer, fusellm, sentence

SLOW = {"torch", "transformers", "lm_eval", "mergekit", "pandas"}
CODE = """
import sys
from harness.cli import main
try:
    main()
except SystemExit as end:
    print(end.code or 0, *sys.modules)
"""


def quick(*arguments: str | Path, slow: Set[str] = frozenset(SLOW)) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command in a process of its own.

    Fails if it imported what takes seconds to import: that can be tested on a busy machine, and a time cannot.
    """
    command = [sys.executable, "-c", CODE, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=600)
    *printed, last = done.stdout.splitlines(keepends=True)
    status, *modules = last.split()
    assert not slow & set(modules)
    return int(status), "".join(printed), done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["experiment", "run", "--help"], ["experiment", "list"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    assert quick(*arguments, slow={*SLOW, "numba", "scipy"})[0] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["experiment", "run", "quickstart", "--set", "device=cuda"], "no CUDA device"),
        (["experiment", "run", "quickstart", "--set", "device=cuda", "--dry-run"], "no CUDA device"),
        (["eval", "nowhere", "--suite", "bbh", "--device", "cuda"], "no CUDA device"),
        (["baseline", "build", "clm", "--set", "device=cuda"], "no CUDA device"),
        (["audit", "quickstart", "--set", "device=cuda"], "no CUDA device"),
        (["extract", "quickstart", "--role", "codr"], "There is no role 'codr' (did you mean 'coder'?)"),
        (["experiment", "run", "quickstart", "--root", "/proc/none/root"], "/proc/none/root cannot be made"),
        (["quickstart", "--root", "/proc/none/root"], "/proc/none/root cannot be made"),
        (["doctor", "--root", "/proc/none/root"], "/proc/none/root cannot be made"),
        (["model", "fetch", "pythia-1b", "--root", "/proc/none/root"], "/proc/none/root cannot be made"),
    ],
)
def test_what_can_be_refused_at_once_is_refused_before_slow_imports(arguments: list[str], expected: str) -> None:
    if "device=cuda" in arguments or "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
    status, printed, said = quick(*arguments)
    assert (status, printed) == (2, "")
    assert expected in sentence(said)


def test_gc_says_that_there_is_nothing_to_remove(tmp_path: Path) -> None:
    status, printed, _ = quick("artifact", "gc", "--root", tmp_path)
    assert (status, printed) == (0, f"Nothing to remove: every artifact below {tmp_path} is used by a run.\n")


KINDS = {
    "an empty folder": lambda place: place.mkdir(),
    "a package": lambda place: (place.mkdir(), (place / "__init__.py").touch()),
    "a module": lambda place: place.with_suffix(".py").touch(),
}
PUBLISHED = ["tables", "paper/table1", "--format", "md"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [["-m", "harness"], ["-c", "from harness.cli import main; main()"]], ids=["-m", "-c"])
def test_folders_of_ones_own_hide_no_package(start: list[str], kind: str, tmp_path: Path) -> None:
    """Python looks in the current folder first, under `-m` and `-c` alike."""
    for name in ("fusion", "baselines", "results"):
        KINDS[kind](tmp_path / name)
    done = subprocess.run([sys.executable, *start, *PUBLISHED], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FuseLLM" in done.stdout


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launched", "names"),
    [
        ([str(Path(sys.executable).with_name("fusellm"))], ["harness", "fusion", "baselines", "results"]),
        (
            [sys.executable, *LAUNCHER, "--no-python", str(Path(sys.executable).with_name("fusellm"))],
            ["harness", "fusion", "baselines", "results"],
        ),
        ([sys.executable, *LAUNCHER, "-m", "harness"], ["fusion", "baselines", "results"]),
    ],
    ids=["fusellm", "torchrun --no-python fusellm", "torchrun -m harness"],
)
def test_launchers_start_beside_folders_of_ones_own(launched: list[str], names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    done = subprocess.run([*launched, *PUBLISHED], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FuseLLM" in done.stdout


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


@pytest.mark.slow
def test_quickstart_prints_its_table(quickstart: Path) -> None:
    printed = fusellm("tables", "quickstart", "--format", "md", "--root", quickstart).stdout
    assert "plumbing, not a result" in printed.lower()
    for row in ("target", "coder", "reader", "CLM", "FuseLLM", "FuseLLM shuffled"):
        assert f"| {row} |" in printed
    assert "match their manifests" in fusellm("artifact", "verify", "--root", quickstart).stdout
    assert "FuseLLM" in fusellm("artifact", "list", "--root", quickstart).stdout


@pytest.mark.slow
def test_the_audit_of_quickstart(quickstart: Path, tmp_path: Path) -> None:
    shutil.copytree(quickstart, tmp_path / "root")  # others compare what is in it
    root = tmp_path / "root"
    command = ["audit", "quickstart", "--profile", "micro", "--passages", "20", "--root", root]
    found = json.loads(fusellm(*command, "--json").stdout)
    assert {row["source"] for row in found} >= {"coder", "reader", "fused", "CLM", "FuseLLM", "FuseLLM shuffled"}
    assert {row["passages"] for row in found if row["kind"] == "source" and row["domain"] == "all domains"} == {20}
    (folder,) = root.glob("runs/quickstart/micro/*/audit")
    ends = ("audit.csv", "audit.json", "audit.md", "audit.png", "audit.txt", "coverage.svg", "selection.png")
    assert all((folder / name).exists() for name in ends)
    assert "bits per byte" in (folder / "audit.txt").read_text(encoding="utf-8")


# What tells the time or the place; the rest of a run depends on its configuration and seeds alone.
TELLING = {"manifest.json", "run.json", "log.json", ".hashes.json"}


def _bytes(root: Path) -> dict[str, bytes]:
    """Everything below a root but logs, by path."""
    files = (p for p in root.rglob("*") if p.is_file() and p.name not in TELLING and "tensorboard" not in p.parts)
    files = (p for p in files if p.suffix != ".verified")  # what says when a file was changed
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
        "artifacts/curve/*/curve.jsonl": 3,
        "artifacts/predictions/*/shard-*.safetensors": 3,
        "artifacts/tiny/*/model/model.safetensors": 3,
        "artifacts/map/*/map.npy": 2,
    }.items():
        assert sum(Path(path).match(pattern) for path in one) >= least, pattern


def test_commands_of_one_process_refuse_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    status, _, said = answer("report", "quickstart")
    assert status == 2 and said == "fusellm: fusellm report is one process: start it without torchrun or deepspeed.\n"


def test_show_prints_what_was_set() -> None:
    arguments = ["experiment", "show", "main", "--set", "methods.FuseLLM.lambda=0.5", "--seed", "3", "--seed", "4"]
    shown = yaml.safe_load(answer(*arguments)[1])
    row = shown["methods"]["FuseLLM"]
    assert {**row, "method": "fusellm", "preset": "corrected", "lambda": 0.5} == row
    assert row["alignment"] == "same_end"  # every switch with its value under the preset
    assert shown["seeds"] == [3, 4] and shown["training"]["warmup_ratio"] == 0.008
    assert list(shown["methods"])[:2] == ["SmolLM2-135M-Instruct", "Gemma-3-270M"]


def test_paper_profile_plans_without_models_or_text(tmp_path: Path) -> None:
    status, printed, said = answer("experiment", "run", "main", "--profile", "paper", "--dry-run", "--root", tmp_path)
    assert status == 0, said
    assert "FuseLLM" in printed and "missing" in printed


def test_validate_names_every_mistake_with_its_line(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("extends: quickstart\nprofile: micro\n", encoding="utf-8")
    bad.write_text("extends: quickstart\nprofile: micro\ntraining:\n  learning_rat: 1\nseeds: x\n", encoding="utf-8")
    assert answer("experiment", "validate", good) == (0, f"{good}: no error\n", "")
    status, printed, said = answer("experiment", "validate", good, bad)
    assert status == 2 and sentence(said) == "fusellm: 2 errors in 1 of 2 experiments."
    assert f"{bad}, line 4" in printed and f"{bad}, line 5" in printed and "did you mean 'learning_rate'" in printed
    status, printed, _ = answer("experiment", "validate", bad, "--json")
    rows = json.loads(printed)
    assert status == 2 and {row["key"] for row in rows} == {"training.learning_rat", "seeds"}


def test_the_schema_is_json_with_methods_and_suites() -> None:
    status, printed, _ = answer("schema")
    schema = json.loads(printed)
    assert status == 0 and "learning_rate" in printed and schema["properties"]["methods"]
    for name in ("fusellm", "distillation", "commonsense", "multipl_e"):
        assert name in printed


@pytest.mark.parametrize("setting", ["suites.bbh.limit=3", "bbh.limit=3"])
def test_a_suite_is_set_by_its_name_alone_as_well(setting: str) -> None:
    shown = yaml.safe_load(answer("experiment", "show", "quickstart", "--set", setting)[1])
    assert shown["suites"]["bbh"]["limit"] == 3


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["suites.bbh.limit=3", "bbh.variant=zeroshot"], ({"bbh": {"limit": 3, "variant": "zeroshot"}}, None)),
        (["data.root=rows", "commonsense.limit=2"], ({"commonsense": {"limit": 2}}, Path("rows"))),
        ([], ({}, None)),
    ],
)
def test_eval_takes_settings_as_experiments_do(
    items: list[str], expected: tuple[object, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    assert suite_settings(["bbh", "commonsense"], items) == expected


@pytest.mark.parametrize("item", ["training.epochs=3", "multipl_e.k=3", "suites.multipl_e.k=3", "data.x=1", "bbh=3"])
def test_eval_refuses_what_is_no_setting_of_its_suites(item: str) -> None:
    status, _, said = answer("eval", "x", "--suite", "bbh", "--set", item)
    assert status == 2 and f"--set {item} is no setting of bbh" in sentence(said)
