"""The suites on tiny models and self-written rows: whatever ran before, also after a kill."""

from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from harness.config.validation import suite_config
from harness.evaluation import evaluated_model, standalone
from harness.evaluation.lm_eval import parts
from harness.evaluation.lm_eval.requests import answer_requests
from harness.evaluation.suite import SUITES
from harness.models.resolution import ModelSpec
from harness.reporting.export import write_run
from harness.reporting.runs import open_run
from tests.harness.evaluation.measuring import BBH, lines, measure
from tests.harness.suite_rows import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_network")]


def test_a_record_does_not_depend_on_what_ran_before(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    whole = lines(measure("bbh", BBH, models["one"], tmp_path / "a", rows))
    part = lines(
        measure("bbh", {**BBH, "tasks": ["navigate"], "limit": 2, "batch_size": 1}, models["one"], tmp_path / "b", rows)
    )
    assert part == {"navigate": whole["navigate"][:2]}
    other = lines(measure("bbh", BBH, models["two"], tmp_path / "a", rows))  # in the same store
    assert [line["answer"] for line in other["navigate"]] != [line["answer"] for line in whole["navigate"]]
    assert [line["target"] for line in other["navigate"]] == [line["target"] for line in whole["navigate"]]


def test_a_kill_costs_only_what_was_under_way(
    rows: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    section = {**BBH, "tasks": ["navigate"], "batch_size": 1}
    whole = lines(measure("bbh", section, models["one"], tmp_path / "whole", rows))
    monkeypatch.setattr(parts, "REQUESTS", 1)
    own, written = parts.write_json, 0

    def until_killed(path: Path, value: dict[str, Any]) -> None:
        nonlocal written
        if path.name.startswith("part-"):
            if written == 2:
                path.with_name(f".{path.name}.1").write_text("{")  # what was being written
                raise KeyboardInterrupt
            written += 1
        own(path, value)

    monkeypatch.setattr(parts, "write_json", until_killed)
    with pytest.raises(KeyboardInterrupt):
        measure("bbh", section, models["one"], tmp_path / "killed", rows)
    monkeypatch.setattr(parts, "write_json", own)
    asked.clear()
    resumed = measure("bbh", section, models["one"], tmp_path / "killed", rows)
    assert len(asked) == 3
    assert lines(resumed) == whole
    asked.clear()
    measure("bbh", section, models["one"], tmp_path / "killed", rows)
    assert not asked


def test_what_cannot_be_fetched_is_named_and_not_averaged(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    suites = standalone.sections(
        ["generative"], tasks=[], common={"limit": 3}, settings={"generative": {"max_new_tokens": 4}}, data_root=rows
    )
    spec = ModelSpec(name=str(models["one"]), dtype="float32")
    folder = standalone.evaluate(spec, suites, tmp_path, device="cpu")
    table = write_run(open_run(folder))["table-generative"]
    assert [column.label for column in table.columns] == ["triviaqa (exact_match)", "lambada_openai (acc)", "average"]
    (cells,) = table.cells
    assert cells[2].value == pytest.approx((cells[0].value + cells[1].value) / 2)  # type: ignore[operator]
    assert any("Left out" in note and "drop" in note and "EleutherAI/drop" in note for note in table.notes)


@pytest.mark.parametrize(
    ("mark", "reason"), [("UNSAFE_CODE", "outside of any sandbox"), ("MULTIMODAL", "more than text")]
)
def test_tasks_that_are_not_for_us_are_left_out(
    rows: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, reason: str
) -> None:
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, mark, True, raising=False)
    measured = measure("generative", {"tasks": ["triviaqa"]}, models["one"], tmp_path, rows)
    assert not measured.artifacts and reason in measured.missing["triviaqa"]


def test_rows_that_are_not_as_expected_are_named(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_rows(data, "Rowan/hellaswag/default/validation.parquet", [{"ctx_a": "a", "label": "0"}])
    write_rows(data, "allenai/ai2_arc/ARC-Easy/train.parquet", [{"question": "?"}])
    with pytest.raises(
        UserError, match=r"hellaswag cannot use the rows of .*validation\.parquet \(row 1: KeyError: 'ctx_b'\)"
    ):
        measure("commonsense", {"tasks": ["hellaswag"]}, models["one"], tmp_path, data)
    with pytest.raises(UserError, match=r"ARC-Easy/test\.parquet \(or \.jsonl\) is missing, which the task arc_easy"):
        measure("commonsense", {"tasks": ["arc_easy"]}, models["one"], tmp_path, data)
    write_rows(data, "nuprl/MultiPL-E/humaneval-js/test.parquet", [{"name": "a", "prompt": "b"}])
    with pytest.raises(UserError, match=r"humaneval-js/test\.parquet, row 1 has no 'tests'"):
        measure("multipl_e", {"tasks": ["js"], "execute": False}, models["one"], tmp_path, data)


@pytest.mark.parametrize(
    ("name", "section", "sentence"),
    [
        ("bhb", {}, "did you mean 'bbh'"),
        ("bbh", {"limits": 3}, "did you mean 'limit'"),
        ("bbh", {"tasks": ["snarkz"]}, "did you mean 'snarks'"),
        ("commonsense", {"tasks": ["arc_esy"]}, "did you mean 'arc_easy'"),
        ("generative", {"tasks": ["trivaqa"]}, "did you mean 'triviaqa'"),
        ("generative", {"tasks": ["mmlu"]}, "'mmlu' is a group"),
        ("multipl_e", {"tasks": ["jss"]}, "did you mean 'js'"),
        ("multipl_e", {"samples": 5, "k": 10}, "pass@10 needs 10 samples a problem, but there are 5"),
    ],
)
def test_unknown_names_have_a_nearest_spelling(name: str, section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SUITES.get(name)(suite_config(name, section), None)


def test_variants_of_bbh(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for variant in ("fewshot", "zeroshot", "cot_zeroshot"):
        section = {"tasks": ["navigate"], "variant": variant, "max_new_tokens": 3, "limit": 1}
        measured = measure("bbh", section, models["one"], tmp_path, rows)
        assert "exact_match" in {example.metric for example in measured.examples()}
        assert variant == "fewshot" or "exact_match,strict-match" in {e.metric for e in measured.examples()}


def test_suites_are_a_stage_of_an_experiment(experiment_file: Path, rows: Path, tmp_path: Path) -> None:
    from harness.config.loading import load
    from harness.experiment import run
    from harness.experiment.plan import plan
    from harness.store.cleanup import unused
    from results.records import read

    settings = ["methods.FuseLLM=null", "methods.FuseLLM published=null", "curve.per_domain=0"]
    settings += ["methods.CLM.method=as_is", f"data.root={rows}"]
    plain = run.run(load(str(experiment_file), overrides=settings), tmp_path)
    more = ["suites.commonsense.tasks=[boolq,arc_easy]", "suites.commonsense.limit=3", "suites.bbh={tasks: [navigate]}"]
    config = load(str(experiment_file), overrides=[*settings, *more, "suites.generative=null"])
    planned = plan(config, tmp_path)
    assert sum(p.spec.kind == "commonsense" and p.state == "missing" for p in planned) == 4  # CLM is the target itself
    folder = run.run(config, tmp_path)
    assert folder != plain
    records = read([folder / "records"]).query("suite == 'commonsense'")
    assert set(records["method"]) == {"llama", "neox", "CLM"} and set(records["metric"]) == {"acc", "acc_norm"}
    assert len(records.query("metric == 'acc_norm'")) == 9 and records["numerator"].isin([0, 1]).all()
    text = (folder / "table-commonsense.md").read_text()
    assert "arc_easy (acc_norm)" in text and "| neox |" in text
    # BBH's answers do not fit these models: said in its table, and nothing else suffers.
    assert "do not fit the context of 256" in (folder / "table-bbh.md").read_text()
    for form in ("md", "csv", "json"):
        assert (folder / f"table.{form}").read_bytes() == (plain / f"table.{form}").read_bytes()
    assert not list(unused(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "artifacts").rglob("*.jsonl")}
    assert before and run.run(config, tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_eval_prints_a_table_and_computes_nothing_twice(
    rows: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.store.cleanup import unused
    from tests.harness.command import answer

    command = ["eval", str(models["one"]), "--suite", "bbh,commonsense", "--task", "arc_easy", "--limit", "3"]
    command += ["--task", "navigate", "--data-root", str(rows), "--root", str(tmp_path), "--set"]
    command += ["bbh.max_new_tokens=4", "--dtype", "float32"]
    status, printed, said = answer(*command, "--format", "md")
    assert status == 0, said
    assert "one: bbh" in printed and "one: commonsense" in printed and "| navigate (n=3) | average (n=3) |" in printed
    monkeypatch.setattr(evaluated_model, "load_model", lambda *_: pytest.fail("loaded"))
    status, again, said = answer(*command, "--format", "json")
    assert status == 0, said
    assert '"value"' in again
    assert not list(unused(tmp_path))
    status, _, said = answer(*command, "--task", "snarkz")
    assert status == 2 and "did you mean 'snarks'" in said and len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("sampled", [False, True])
def test_equal_questions_have_one_answer_unless_it_is_drawn(sampled: bool) -> None:
    """Of an LM that gives lm-eval's hook copies of what it was asked, as HFLM does."""
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook

    kwargs = {"until": ["\n"], "do_sample": sampled}
    examples = {str(n): [Instance("generate_until", {}, ("same", dict(kwargs)), 0)] for n in range(3)}
    finished: list[str] = []

    class Lm:
        def set_cache_hook(self, hook: CacheHook) -> None:
            self.hook = hook

        def generate_until(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
            self.hook.add_partial("generate_until", ("same", dict(kwargs)), "0")
            assert finished == ([] if sampled else ["0", "1", "2"])
            return [str(n) if sampled else "0" for n in range(len(requests))]

    answer_requests(Lm(), examples, finished.append, lambda *_: pytest.fail("failed"))
    assert finished == ["0", "1", "2"]
    assert [requests[0].resps for requests in examples.values()] == ([["0"], ["1"], ["2"]] if sampled else [["0"]] * 3)
