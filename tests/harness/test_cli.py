"""The command line as a user meets it: a whole run, a kill, and mistakes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from harness import cli


def fusellm(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    command = [sys.executable, "-c", "from harness.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check, timeout=600)


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
        ["models", "fetch"],
        ["artifacts", "gc"],
        ["tables"],
        ["audit"],
        ["doctor"],
        ["multipl-e", "execute"],
        ["eval"],
    ):
        assert "Usage" in _answer([*command, "--help"])[1]


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
    assert "match their manifests" in fusellm("artifacts", "verify", "--root", quickstart).stdout
    assert "FuseLLM" in fusellm("artifacts", "list", "--root", quickstart).stdout


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_table(quickstart: Path, tmp_path: Path) -> None:
    generator = random.Random(0)
    command = [sys.executable, "-c", "from harness.cli import main; main()"]
    command += ["experiment", "run", "quickstart", "--profile", "micro", "--root", str(tmp_path)]
    kills = 0
    while not list(tmp_path.glob("runs/*/*/*/run.json")) and kills < 12:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + generator.uniform(4, 14)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills > 0
    fusellm("experiment", "run", "quickstart", "--profile", "micro", "--root", tmp_path)
    for form in ("md", "csv", "json"):
        ours, theirs = (next(r.glob(f"runs/*/*/*/table.{form}")).read_bytes() for r in (tmp_path, quickstart))
        assert ours == theirs


def _answer(arguments: list[str]) -> tuple[int, str]:
    """Exit status and everything printed, in this process."""
    import contextlib
    import io
    from unittest import mock

    out = io.StringIO()
    status = 0
    argv = mock.patch.object(sys, "argv", ["fusellm", *arguments])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main()
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["experiment", "show", "mian"], "did you mean 'main'?"),
        (["experiment", "show", "main", "--profile", "smal"], "did you mean 'small'?"),
        (["experiment", "show", "main", "--profile", "tiny"], "its profiles are small, paper"),
        (["experiment", "show", "main", "--set", "training.learning_rat=1"], "did you mean 'learning_rate'?"),
        (["experiment", "show", "main", "--set", "training.learning_rate=fast"], "training.learning_rate = 'fast'"),
        (["experiment", "show", "main", "--set", "nonsense"], "has no value"),
        (["experiment", "show", "main", "--set", "methods.FuseLLM.tail=buckets"], "buckets"),
        (["experiment", "show", "main", "--set", "methods.FuseLLM.preset=mend"], "presets are mended, published"),
        (["experiment", "show", "main", "--set", "methods.FuseLLM.tial=gold"], "tial (did you mean 'tail'?)"),
        (["experiment", "show", "main", "--set", "methods.CLM.method=clmm"], "did you mean 'clm'?"),
        (["experiment", "show", "main", "--set", "baseline=CML"], "baseline 'CML' is no row"),
        (["experiment", "show", "main", "--set", "roles.target=foo"], "must hold keys and values"),
        (["experiment", "show", "main", "--set", "methods=3"], "must hold keys and values"),
        (["experiment", "show", "main", "--set", "methods.CLM=clm"], "must hold keys and values"),
        (["experiment", "show", "main", "--set", "roles.sources=null"], "roles.sources"),
        (["experiment", "show", "main", "--set", "training.learning_rate=["], "does not hold"),
        (["experiment", "show", "main", "--set", "roles.sources.target.model=x"], "called 'target'"),
        (["experiment", "show", "main", "--set", "methods.FuseLLM.sources=[nope]"], "names 'nope', which is no role"),
        (["experiment", "show", "main", "--set", "methods.FuseLLM.map=minde"], "did you mean 'mined'?"),
        (["experiment", "show", "main", "--set", "training.micro_rows=4"], "is no multiple of"),
        (["experiment", "show", "main", "--seed", "-1"], "seeds.0 = -1"),
        (["experiment", "run", "quickstart", "--set", "device=cuda"], "no CUDA device"),
        (["experiment", "show", "nowhere.yaml"], "There is no file nowhere.yaml"),
        (["experiment", "show", "main", "--seed", "1", "--seed", "1"], "names one twice"),
        (["experiment", "run", "main", "--set", "data.root=/nowhere"], "fusellm models fetch"),
        (["experiment", "run", "main", "--set", "roles.target.model=SmolLM-135M"], "There is no model 'SmolLM-135M'"),
        (["tables", "main"], "has no finished run"),
        (["tables", "paper/table99"], "table99"),
        (["models", "fetch", "SmolLM2"], "There is no model"),
        (["models", "convert", "nothing.gguf"], "nothing.gguf"),
        (["eval", "SmolLM2", "--suite", "bbh"], "There is no model"),
        (["eval", "SmolLM2", "--suite", "bhb"], "did you mean 'bbh'?"),
        (["eval", "SmolLM2", "--suite", "bbh", "--task", "snarkz"], "did you mean 'snarks'?"),
        (["eval", "SmolLM2", "--suite", "bbh", "--set", "multipl_e.k=1"], "is no setting of bbh"),
        (["audit", "qickstart"], "did you mean 'quickstart'?"),
        (["multipl-e", "execute", "nothing.jsonl"], "There is no file nothing.jsonl"),
    ],
)
def test_mistakes_end_in_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    if arguments[:2] != ["experiment", "show"]:
        arguments = [*arguments, "--root", str(tmp_path)]
    status, printed = _answer(arguments)
    assert status == 2, printed
    assert sentence in printed
    assert len([line for line in printed.splitlines() if line.strip()]) == 1, printed
    assert "Traceback" not in printed


def test_a_root_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    arguments = ["experiment", "run", "quickstart", "--profile", "micro", "--root", str(tmp_path / "root")]
    status, printed = _answer(arguments)
    assert status == 2 and "choose another --root" in printed and len(printed.strip().splitlines()) == 1, printed


def test_show_prints_what_was_set() -> None:
    arguments = ["experiment", "show", "main", "--set", "methods.FuseLLM.lambda=0.5", "--seed", "3", "--seed", "4"]
    shown = yaml.safe_load(_answer(arguments)[1])
    assert shown["methods"]["FuseLLM"] == {"method": "fusellm", "preset": "mended", "lambda": 0.5}
    assert shown["seeds"] == [3, 4] and shown["training"]["warmup_ratio"] == 0.008
    assert list(shown["methods"])[:2] == ["SmolLM2-135M-Instruct", "Gemma-3-270M"]


def test_paper_profile_plans_without_models_or_text(tmp_path: Path) -> None:
    status, printed = _answer(["experiment", "run", "main", "--profile", "paper", "--dry-run", "--root", str(tmp_path)])
    assert status == 0, printed
    assert "FuseLLM" in printed and "to do" in printed
