"""MultiPL-E's execution: verdicts in ten languages, interruptions, neighbours that mean harm."""

import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from harness.evaluation import sandbox as sandboxes
from harness.evaluation.multipl_e import execute as executing
from harness.evaluation.multipl_e import toolchains
from harness.evaluation.multipl_e.execute import OutOfTime, execute
from harness.evaluation.multipl_e.generations import read_generations
from harness.evaluation.multipl_e.languages import LANGUAGES
from harness.evaluation.multipl_e.scores import read_results, summary
from harness.evaluation.sandbox import Limits
from tests.harness.evaluation.programs import LIMITS, PROMPT, RIGHT, WRONG, problem, results_of, rows_of, write
from tests.shared import needed, shared

Continuation = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, cache: Path) -> Continuation:
    """Executes completions of PROMPT, or given problems, and returns all results in order."""
    needed(sandboxes.refusal())

    def once(*problems: dict[str, Any], out: str = "results.jsonl", **options: Any) -> list[dict[str, Any]]:
        path = write(tmp_path / "generations.jsonl", problems)
        done = execute(path, tmp_path / out, cache=cache, limits=options.pop("limits", LIMITS), **options)
        assert done.not_run == {}
        return results_of(done)

    return once


def verdicts(results: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["program"], r["exit_code"], r["status"], r["strict"]) for r in results]


def test_an_execution_that_is_out_of_time_goes_on(run: Continuation) -> None:
    programs = problem(*(f"    return x + y + {i} - {i}\n" for i in range(6)))
    with pytest.raises(
        OutOfTime, match=r"The 0.01 seconds of the execution are used up: [1-5] of 6 results are kept; "
    ):
        run(programs, max_seconds=0.01, workers=1)
    results = run(programs, max_seconds=600)
    assert [result["strict"] for result in results] == [True] * 6


@pytest.mark.slow
@pytest.mark.parametrize("name", LANGUAGES)
def test_every_verdict_of_the_oracle(name: str, tmp_path: Path, cache: Path) -> None:
    rows = rows_of(name)
    cases = [json.loads(line) for line in shared(f"oracle/multipl_e/{name}.jsonl").read_text().splitlines()]
    needed(sandboxes.refusal())
    by_name = [(row, list(group)) for row, group in itertools.groupby(cases, key=lambda case: case["name"])]
    problems = [{**rows[row], "completions": [case["completion"] for case in group]} for row, group in by_name]
    done = execute(write(tmp_path / "g.jsonl", problems), tmp_path / "r.jsonl", cache=cache, limits=LIMITS)
    needed(done.not_run.get(name))
    words = {"syntax": "SyntaxError", "typeerr": "SyntaxError", "timeout": "Timeout", "exit0": "OK"}
    for case, result in zip(cases, results_of(done), strict=True):
        right = case["expected"] == "pass"
        word = "OK" if right else words.get(case["kind"], "Exception")
        assert result["strict"] == right, (case, result)
        assert result["status"] == word, (case, result)
        assert (result["exit_code"] == 0) == (word == "OK"), (case, result)
        assert result["program"].startswith(rows[case["name"]]["prompt"])
        assert result["program"].endswith(rows[case["name"]]["tests"])


@pytest.mark.slow
def test_output_without_a_line_end_hides_no_success(run: Continuation) -> None:
    (result,) = run(problem("    print('no end of line', end='', flush=True)\n    return x + y\n"))
    assert (result["strict"], result["stdout"]) == (True, "no end of line")


@pytest.mark.slow
def test_programs_are_run_whole(run: Continuation) -> None:
    """Stop strings belong to writing completions: a chat model's are whole programs, which contain some."""
    (result,) = run(problem("import math\n\ndef add(x, y):\n    return x + y\n", prompt=""))
    assert result["strict"]


@pytest.mark.slow
def test_harm_does_not_touch_other_scores(run: Continuation) -> None:
    file = Path(tempfile.gettempdir(), f"hostile-{uuid.uuid4().hex}")
    harm = [
        "    import os\n    while True:\n        try: os.fork()\n        except OSError: pass\n",
        "    hoard = []\n    while True: hoard.append(bytearray(1 << 24))\n",
        "    import os, time\n    for _ in range(20):\n        os.fork() or time.sleep(len(b'x' * (1 << 26)))\n",
        "    while True: print('x' * 4096)\n",
        "    import os\n    os.system('rm -rf /tmp/* /usr /home; kill -9 -1')\n    return x + y\n",
        f"    open('{file}', 'wb').write(bytes(1 << 30))\n",
        "    import os\n    if os.fork(): os._exit(0)\n    while True: pass\n",
    ]
    good = [f"    return x + y + {n} - {n}\n" for n in range(8)]
    mixed = [one for pair in itertools.zip_longest(harm, good) for one in pair if one]
    limits = Limits(cpu=2, wall=8.0, memory=256 << 20, processes=40, disk=8 << 20)
    results = run(problem(*mixed), limits=limits, workers=2)
    for completion, result in zip(mixed, results, strict=True):
        assert result["strict"] == (completion in good), (completion, result)
    assert not file.exists()


@pytest.mark.slow
def test_identical_programs_run_once(tmp_path: Path, cache: Path) -> None:
    needed(sandboxes.refusal())
    path = write(tmp_path / "g.jsonl", [problem(*[RIGHT] * 20, WRONG, f"{RIGHT}\n# what follows is cut")])
    done = execute(path, tmp_path / "r.jsonl", cache=cache, limits=LIMITS)
    assert done.ran == 3
    assert [result["strict"] for result in results_of(done)] == [True] * 20 + [False, True]
    assert execute(path, tmp_path / "r.jsonl", cache=cache, limits=LIMITS).ran == 0


@pytest.mark.slow
def test_subset_and_order_do_not_matter(run: Continuation) -> None:
    problems = [problem(RIGHT, WRONG, "    return 5\n", name=f"HumanEval_{n}_add") for n in range(3)]
    whole = verdicts(run(*problems, out="whole"))
    assert verdicts(run(*reversed(problems), out="reversed")) == whole[6:] + whole[3:6] + whole[:3]
    assert verdicts(run(problems[1], out="one", workers=1)) == whole[3:6]


@pytest.mark.slow
def test_results_carry_the_row_along(run: Continuation, tmp_path: Path) -> None:
    run(problem(RIGHT, temperature=0.2, top_p=0.95))
    line = json.loads((tmp_path / "results.jsonl").read_text())
    assert {**PROMPT, "temperature": 0.2, "top_p": 0.95}.items() <= line.items()
    assert set(line["results"][0]) >= {"program", "stdout", "stderr", "exit_code", "status", "timestamp"}
    assert line["results"][0]["stdout"] == ""  # without the nonce


@pytest.mark.slow
def test_a_killed_execution_goes_on(tmp_path: Path, cache: Path) -> None:
    needed(sandboxes.refusal())
    slow = [f"    import time; time.sleep(0.3)\n    return x + y + {n} - {n}\n" for n in range(16)]
    path = write(tmp_path / "g.jsonl", [problem(*slow)])
    journal = tmp_path / "g.results.jsonl.journal"
    command = [sys.executable, "-c", "from harness.cli import main; main()", "multipl-e", "execute", str(path)]
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "toolchains").symlink_to(cache)
    command += ["--root", str(tmp_path / "root"), "--workers", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not journal.exists() or journal.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "g.results.jsonl").exists()
    kept = journal.read_text()
    with journal.open("a") as file:
        file.write('{"program": "torn')
    subprocess.run(command, check=True, capture_output=True)
    results = json.loads((tmp_path / "g.results.jsonl").read_text())["results"]
    assert [result["strict"] for result in results] == [True] * 16
    for line in kept.splitlines():
        assert json.loads(line) in results  # with their time stamps: they did not run again
    assert not journal.exists()


@pytest.fixture
def fragile(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The interpreter, behind a script of ours that a test may harm."""
    needed(sandboxes.refusal())
    real = toolchains.find("python", cache)
    with tempfile.TemporaryDirectory() as folder:  # unlike pytest's folders it can be opened to everybody
        script = Path(folder, "bin", "python")
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nexec {real.run[0]} "$@"\n')
        for path in (script.parents[1], script.parent, script):
            path.chmod(0o755)
        roots = [*real.roots, Path(folder)]
        ours = toolchains.Toolchain(real.language, "1", [str(script), *real.run[1:]], roots=roots, needs=[script])
        monkeypatch.setitem(toolchains._FINDERS, "python", lambda language, cache: ours)
        yield script


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["gone", "broken"])
def test_a_toolchain_that_disappears_ends_in_one_sentence(
    harm: str, fragile: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, run_one, whole = itertools.count(1), executing._run, fragile.read_text()

    def harming(*arguments: Any) -> dict[str, Any]:
        if next(runs) == 4:
            fragile.unlink() if harm == "gone" else fragile.write_text("exit 1")
        return run_one(*arguments)

    monkeypatch.setattr(executing, "_run", harming)
    path = write(tmp_path / "g.jsonl", [problem(*[f"    return x + y + {n} - {n}\n" for n in range(8)])])
    says = {
        "gone": r"Python stopped: .* has disappeared.* 3 of 8 results are kept",
        "broken": r"Python changed during the run, so its results are dropped",
    }
    with pytest.raises(UserError, match=says[harm]):
        execute(path, tmp_path / "r.jsonl", cache=cache, limits=LIMITS, workers=1)
    assert not (tmp_path / "r.jsonl").exists()
    fragile.write_text(whole)
    fragile.chmod(0o755)
    done = execute(path, tmp_path / "r.jsonl", cache=cache, limits=LIMITS, workers=1)
    assert done.ran == {"gone": 5, "broken": 8}[harm]
    assert all(result["strict"] for result in results_of(done))


@pytest.mark.slow
def test_a_missing_language_is_named_and_never_counted(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed(sandboxes.refusal())
    which = toolchains._which
    monkeypatch.setattr(
        toolchains, "_which", lambda language, command: which(language, command.replace("ruby", "nothing"))
    )
    ruby = problem("  x + y\nend", language="rb", prompt="def add(x, y)\n", tests="class A\ndef t\nend\nend\n")
    path = write(tmp_path / "g.jsonl", [ruby, problem(RIGHT)])
    done = execute(path, tmp_path / "r.jsonl", cache=cache, limits=LIMITS)
    assert list(done.not_run) == ["rb"]
    assert "apt-get install ruby" in done.not_run["rb"]
    examples = read_results(done.results)
    assert [example.language for example in examples] == ["python"]
    assert [row[:4] for row in summary(examples, done.not_run, 1)] == [
        ["Python", 1, "1", "1.0000"],
        ["Ruby", "", "", ""],
    ]


@pytest.mark.slow
def test_without_a_sandbox_nothing_is_executed(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = write(tmp_path / "g.jsonl", [problem(RIGHT)])
    with pytest.raises(UserError, match=r"bubblewrap is not installed.*--unsafe-no-sandbox"):
        execute(path, tmp_path / "r.jsonl", cache=cache)
    assert not (tmp_path / "r.jsonl").exists()
    (result,) = results_of(execute(path, tmp_path / "r.jsonl", cache=cache, unsafe=True))
    assert result["strict"] and "no sandbox" in result["toolchain"]


@pytest.mark.slow
def test_results_of_other_completions_are_not_overwritten(run: Continuation) -> None:
    run(problem(RIGHT))
    with pytest.raises(UserError, match="other completions"):
        run(problem(WRONG))


@pytest.mark.slow
def test_two_executions_do_not_write_one_file(run: Continuation, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".results.jsonl.lock"), pytest.raises(UserError, match="Another process"):
        run(problem(RIGHT))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["python", "js", "php", "r", "rb"])
def test_any_text_is_a_program(name: str, tmp_path: Path, cache: Path) -> None:
    needed(sandboxes.refusal())
    row = rows_of(name)["HumanEval_53_add"]
    texts = ["\0", "\ud800", "\udcff\udcfe", "\u2028\x85", "x" * (1 << 20), ""]
    path = write(tmp_path / "g.jsonl", [{**row, "completions": texts}])
    done = execute(path, tmp_path / "r.jsonl", cache=cache, limits=LIMITS)
    needed(done.not_run.get(name))
    results = results_of(done)
    assert [result["strict"] for result in results] == [False] * len(texts)
    assert [result["program"] for result in results] == read_generations(path)[0].programs


@pytest.mark.slow
def test_doctor_names_the_sandbox_and_every_language(cache: Path) -> None:
    from harness.cli.doctor import _toolchains

    needed(sandboxes.refusal())
    shown = _toolchains(cache)
    assert [what for what, _, _ in shown] == [
        "sandbox for generated programs",
        *(f"sandbox: {what}" for what in ("sockets", "system calls", "files, environment, processes", "memory")),
        *(f"MultiPL-E in {language.title}" for language in LANGUAGES.values()),
    ]
    for what, found, fine in shown:
        assert fine is not False, f"{what}: {found}"
        needed(None if fine else f"{what}: {found}")
