"""The suite multipl_e: samples that do not depend on the batch, kept after a kill, run and counted."""

from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from harness.evaluation import standalone
from harness.evaluation.lm_eval import parts
from harness.models.resolution import ModelSpec
from harness.reporting.export import write_run
from harness.reporting.runs import open_run
from harness.store.files import write_json
from tests.harness.evaluation.measuring import completions, measure
from tests.shared import needed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_network")]


def test_samples_are_in_multipl_es_form_and_independent(
    rows: Path, models: dict[str, Path], tmp_path: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"tasks": ["js", "python"], "limit": 3, "samples": 3, "max_new_tokens": 8, "execute": False}
    measured = measure("multipl_e", section, models["one"], tmp_path / "a", rows)
    found = {name.split()[0]: completions(path) for name, path in measured.artifacts.items()}
    fields = {"name", "language", "prompt", "tests", "stop_tokens", "completions", "temperature", "top_p", "max_tokens"}
    for name, problems in found.items():
        assert all(set(problem) == fields and problem["language"] == name for problem in problems)
        assert [len(problem["completions"]) for problem in problems] == [3, 3, 3]
    assert found["python"][2]["name"] == "HumanEval_2_half" and found["python"][2]["tests"].endswith("check(half)\n")
    assert all(len(set(problem["completions"])) == 3 for problems in found.values() for problem in problems)
    # Another number of problems and of samples, at another batch size: the same samples.
    other = {**section, "tasks": ["js"], "limit": 2, "samples": 2, "batch_size": 1}
    fewer = completions(measure("multipl_e", other, models["one"], tmp_path / "b", rows).artifacts["js samples"])
    assert [p["completions"] for p in fewer] == [p["completions"][:2] for p in found["js"][:2]]
    # After a kill only what is missing is written; what was finished before it is there.
    written = 0

    def until_killed(path: Path, value: dict[str, Any]) -> None:
        nonlocal written
        if path.name.startswith("part-"):
            if written == 1:
                raise KeyboardInterrupt
            written += 1
        write_json(path, value)

    monkeypatch.setattr(parts, "REQUESTS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_json", until_killed)
        with pytest.raises(KeyboardInterrupt):
            measure("multipl_e", other, models["one"], tmp_path / "c", rows)
    asked.clear()
    (resumed,) = measure("multipl_e", other, models["one"], tmp_path / "c", rows).artifacts.values()
    assert len(asked) == 2 and completions(resumed) == fewer
    greedy = {**other, "greedy": True}
    (path,) = measure("multipl_e", greedy, models["one"], tmp_path / "b", rows).artifacts.values()
    assert all(len(p["completions"]) == 1 and p["temperature"] == 0 for p in completions(path))


def test_passing_samples_are_counted(
    rows: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written by a model whose second and third samples are right, run in the sandbox, averaged as pass@k."""
    from harness.evaluation.multipl_e import toolchains
    from harness.evaluation.sandbox import refusal
    from harness.evaluation.shared_prefix_lm import SharedPrefixLM

    needed(refusal())
    right = {"js": "  return x / 2;\n}", "python": "    return x / 2\n"}

    def generate(self: Any, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [right["js" if "function" in r.args[0] else "python"] if r.idx else "syntax error" for r in requests]

    monkeypatch.setattr(SharedPrefixLM, "generate_until", generate)
    section = {"tasks": ["js", "python"], "limit": 2, "samples": 3, "k": 2, "max_new_tokens": 8}
    measured = measure("multipl_e", section, models["one"], tmp_path, rows)
    assert not measured.missing
    found = {(e.task, e.example, e.metric): (e.numerator, e.denominator) for e in measured.examples()}
    assert len(found) == 8 and set(found.values()) == {(2, 3)}
    suites = standalone.sections(
        ["multipl_e"], tasks=["js"], common={"limit": 2, "samples": 3}, settings={"multipl_e": {"k": 2}}, data_root=rows
    )
    spec = ModelSpec(name=str(models["one"]), dtype="float32")
    folder = standalone.evaluate(spec, suites, tmp_path, device="cpu")
    table = write_run(open_run(folder))["table-multipl_e"]
    assert table.cells[0][0].value == pytest.approx(100) and "pass@2" in table.title
    # A machine without Node: named, not zero, and the other language stands.
    own = toolchains.available
    monkeypatch.setattr(
        toolchains,
        "available",
        lambda names, *a, **k: (own([n for n in names if n != "js"], *a, **k)[0], {"js": "gone"}),
    )
    again = measure("multipl_e", {**section, "limit": 1}, models["one"], tmp_path, rows)
    assert again.missing == {"js": "gone"} and {e.task for e in again.examples()} == {"python"}


def test_without_a_sandbox_nothing_is_written_for_hours(
    rows: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import harness.evaluation.sandbox

    monkeypatch.setattr(harness.evaluation.sandbox, "refusal", lambda: "There is no bubblewrap.")
    with pytest.raises(UserError, match="--generate-only"):
        measure("multipl_e", {"tasks": ["js"]}, models["one"], tmp_path, rows)
    assert not (tmp_path / "artifacts").exists()
