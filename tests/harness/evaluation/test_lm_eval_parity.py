"""The suites' numbers are lm-eval's own, example by example, also where prompts do not fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.evaluation.lm_eval import tasks
from harness.evaluation.lm_eval.requests import no_room
from harness.evaluation.lm_eval.tasks import task_folder
from harness.evaluation.suite import LimitedConfig
from tests.harness.evaluation.measuring import BBH, evaluated, lines, measure

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_network")]
DATASETS = {
    "bbh_cot_fewshot_boolean_expressions": ("bbh/cot_fewshot/boolean_expressions.yaml", "parquet", "test"),
    "arc_easy": ("arc/arc_easy.yaml", "parquet", "test"),
    "hellaswag": ("hellaswag/hellaswag.yaml", "parquet", "validation"),
    "boolq": ("super_glue/boolq/default.yaml", "json", "validation"),
    "triviaqa": ("triviaqa/default.yaml", "json", "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "parquet", "test"),
}
FILES = {
    "bbh_cot_fewshot_boolean_expressions": "SaylorTwift/bbh/boolean_expressions/test.parquet",
    "arc_easy": "allenai/ai2_arc/ARC-Easy/test.parquet",
    "hellaswag": "Rowan/hellaswag/default/validation.parquet",
    "boolq": "aps/super_glue/boolq/validation.jsonl",
    "triviaqa": "mandarjoshi/trivia_qa/rc.nocontext/validation.jsonl",
    "lambada_openai": "EleutherAI/lambada_openai/default/test.parquet",
}


def lm_eval_yaml(folder: Path, data: Path) -> Path:
    """The same tasks for lm-eval by itself, written out by hand."""
    folder.mkdir()
    for task, (builtin, kind, split) in DATASETS.items():
        settings: dict[str, Any] = {
            "include": str(task_folder() / builtin),
            "task": task,
            "dataset_path": kind,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(data / FILES[task])}},
            "training_split": None,
        }
        settings["test_split" if split == "validation" else "validation_split"] = None
        if task.startswith("bbh"):
            settings["generation_kwargs"] = {
                "max_gen_toks": 6, "until": ["</s>", "Q", "\n\n"], "do_sample": False, "temperature": 0.0
            }  # fmt: skip
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def test_scores_are_lm_evals(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    """lm-eval's own evaluation with its own HFLM, example by example."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    candidate = evaluated(models["one"], tmp_path)
    expected = simple_evaluate(
        HFLM(candidate.model, tokenizer=candidate.tokenizer, backend="causal", batch_size=2),
        tasks=list(DATASETS),
        task_manager=TaskManager(include_defaults=False, include_path=[str(lm_eval_yaml(tmp_path / "tasks", rows))]),
        limit=4,
        bootstrap_iters=0,
    )
    found = {}
    for name, section in [
        ("bbh", {**BBH, "tasks": ["boolean_expressions"]}),
        ("commonsense", {"tasks": ["arc_easy", "hellaswag", "boolq"]}),
        ("generative", {"tasks": ["triviaqa", "lambada_openai"]}),
    ]:
        found |= lines(measure(name, {**section, "limit": 4}, models["one"], tmp_path, rows))
    found["bbh_cot_fewshot_boolean_expressions"] = found.pop("boolean_expressions")
    for task in DATASETS:
        samples = sorted(expected["samples"][task], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(found[task]) == 4
        for sample, line in zip(samples, found[task], strict=True):
            assert line["prompt_hash"] == sample["prompt_hash"]
            for metric in sample["metrics"]:
                assert {**line["scores"], **line["other_scores"]}[metric] == pytest.approx(sample[metric], abs=1e-4)
            if task in ("triviaqa", "bbh_cot_fewshot_boolean_expressions"):
                assert line["answer"] == sample["resps"][0]
    assert len({answer for line in found["triviaqa"] for answer in line["answer"]}) > 1
    assert {line["scores"]["acc"] for task in ("arc_easy", "hellaswag", "boolq") for line in found[task]} == {0, 1}


@pytest.mark.slow
def test_the_number_is_that_of_lm_evals_command(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "arc_easy,hellaswag", "--limit", "4"]
    command += ["--model_args", f"pretrained={models['one']},dtype=float32", "--device", "cpu", "--batch_size", "4"]
    command += ["--include_path", str(lm_eval_yaml(tmp_path / "tasks", rows)), "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True, timeout=900)
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    measured = measure("commonsense", {"tasks": list(results), "limit": 4}, models["one"], tmp_path, rows)
    for task in ("arc_easy", "hellaswag"):
        for metric in ("acc", "acc_norm"):
            scores = [e.numerator for e in measured.examples() if (e.task, e.metric) == (task, metric)]
            assert sum(scores) / len(scores) == pytest.approx(results[task][f"{metric},none"])


def test_tasks_that_do_not_fit_are_found_before_the_run(
    rows: Path, models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = measure("bbh", {**BBH, "max_new_tokens": 300}, models["short"], tmp_path, rows)
    assert not list(measured.examples()) and set(measured.missing) == {"boolean_expressions", "navigate"}
    assert "up to 300 tokens are to be generated, which do not fit the context of 256" in measured.missing["navigate"]
    assert "navigate is left out" in " ".join(capsys.readouterr().err.split())
    # One token more or less decides.
    (prepared,) = tasks.prepare(
        [tasks.find_source("triviaqa", task_folder() / "triviaqa/default.yaml", rows, tasks.Overrides(0, 10))],
        LimitedConfig(limit=1),
    )[0].values()
    assert no_room(prepared, 11, "truncate_left") is None
    assert "up to 10 tokens are to be generated" in str(no_room(prepared, 10, "truncate_left"))
    assert no_room(prepared, 10, "shrink_answer") is None


@pytest.mark.parametrize("rule", ["truncate_left", "shrink_answer", "skip"])
def test_prompts_that_do_not_fit_are_read_by_the_rule_and_counted(
    rows: Path, models: dict[str, Path], tmp_path: Path, rule: str
) -> None:
    """Every task has a number; by default the answers are HFLM's, which truncates on the left."""
    section = {**BBH, "max_new_tokens": 10, "overflow": rule}
    measured = measure("bbh", section, models["short"], tmp_path, rows)
    whole = {task: [line["example"] for line in some] for task, some in lines(measured).items()}
    over = {task: [line for line in some if line["overflow"]] for task, some in lines(measured).items()}
    if rule == "skip":
        assert set(measured.missing) == {"boolean_expressions", "navigate"} and not list(measured.examples())
        assert "was not asked, and examples count for no row, where prompts do not fit" in measured.notes[0]
        return
    assert not measured.missing and all(whole.values()) and over == lines(measured)
    (note,) = measured.notes
    assert f"navigate {len(over['navigate'])} of {len(whole['navigate'])}" in note and "context of 256 tokens" in note
    for line in over["navigate"]:
        assert line["overflow"]["read"] + line["overflow"]["new"] == line["overflow"]["context"] == 256
    if rule == "truncate_left":
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        model = AutoModelForCausalLM.from_pretrained(models["short"], dtype="float32").eval()
        hflm = HFLM(model, tokenizer=PreTrainedTokenizerFast.from_pretrained(models["short"]), batch_size=1)
        yaml = task_folder() / "bbh/cot_fewshot/navigate.yaml"
        source = tasks.find_source("bbh_cot_fewshot_navigate", yaml, rows, tasks.Overrides(None, 10))
        (prepared,) = tasks.prepare([source], LimitedConfig(limit=len(whole["navigate"])))[0].values()
        requests = [prepared.examples[example][0] for example in whole["navigate"]]
        expected = hflm.generate_until(requests, disable_tqdm=True)
        assert [line["answer"][0] for line in over["navigate"]] == expected
