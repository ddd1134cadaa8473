"""The suite `lm_eval`: any task by name or YAML file, with lm-eval's own numbers, metrics and directions."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.errors import UserError
from harness.evaluation import standalone
from harness.evaluation.suite import SUITES, suite_config
from results.metrics import measure
from tests.harness.command import answer
from tests.harness.evaluation.measuring import evaluated, lines
from tests.harness.evaluation.measuring import measure as measured_on

ROWS = [
    {"question": f"Who jumps {i}?", "options": ["the fox", "the dog", "a wizard"], "gold": i % 3, "solution": "the fox"}
    for i in range(6)
]
FUNCTIONS = """
def length(predictions, references):
    return float(len(predictions[0]))


def scored(doc, results):
    return {"distance": abs(len(results[0]) - 3), "exact_match": float(results[0] == doc["solution"])}
"""


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A folder with two tasks of one's own, their data and a function beside them."""
    folder = tmp_path / "my_tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "functions.py").write_text(FUNCTIONS)
    common = "dataset_path: json\ndataset_kwargs: {data_files: {test: DATA}}\ntest_split: test\n"
    common = common.replace("DATA", str(folder / "rows.jsonl"))
    (folder / "choices.yaml").write_text(
        f"task: my_choices\n{common}output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{options}}"\ndoc_to_target: "{{gold}}"\n'
        "metric_list:\n  - {metric: acc}\n  - {metric: acc_norm}\n"
    )
    (folder / "answers.yaml").write_text(
        f"task: my_answers\n{common}output_type: generate_until\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{solution}}"\n'
        "process_results: !function functions.scored\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 5, do_sample: false}\n'
        "metric_list:\n  - {metric: distance, aggregation: mean, higher_is_better: false}\n"
        "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


@pytest.mark.slow
def test_tasks_of_ones_own_have_lm_evals_numbers(
    own_tasks: Path,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    candidate = evaluated(models["one"], tmp_path)
    expected = simple_evaluate(
        HFLM(candidate.model, tokenizer=candidate.tokenizer, backend="causal", batch_size=2),
        tasks=["my_choices", "my_answers"],
        task_manager=TaskManager(include_defaults=False, include_path=[str(own_tasks)]),
        limit=5,
        bootstrap_iters=0,
    )
    given = {"tasks": ["my_choices", str(own_tasks / "answers.yaml")], "include_path": str(own_tasks), "limit": 5}
    result = measured_on("lm_eval", given, models["one"], tmp_path, None)
    examples = list(result.examples())
    for task, metric, recorded in [
        ("my_choices", "acc", "acc"),
        ("my_choices", "acc_norm", "acc_norm"),
        ("my_answers", "distance", "distance:lower"),
        ("my_answers", "exact_match", "exact_match"),
    ]:
        scores = [e.numerator for e in examples if (e.task, e.metric) == (task, recorded)]
        assert len(scores) == 5
        assert sum(scores) / 5 == pytest.approx(expected["results"][task][f"{metric},none"])
    samples = {task: {s["doc_id"]: s for s in expected["samples"][task]} for task in expected["samples"]}
    for task, stored in lines(result).items():
        for line in stored:
            sample = samples[task][int(line["example"])]
            assert line["prompt_hash"] == sample["prompt_hash"]
            if task == "my_answers":
                assert line["answer"] == sample["resps"][0]
    made = SUITES.get("lm_eval")(suite_config("lm_eval", given), None)
    assert made.task_metrics() == {"my_choices": "acc", "my_answers": "distance:lower"}
    assert not measure("distance:lower").higher_is_better and measure("distance:lower").bounds is None


def test_a_changed_definition_is_another_task(own_tasks: Path, models: dict[str, Path]) -> None:
    def identity() -> Any:
        config = suite_config("lm_eval", {"tasks": [str(own_tasks / "answers.yaml")]})
        return SUITES.get("lm_eval")(config, None).identity()

    before = identity()
    assert identity() == before
    for path in ("answers.yaml", "functions.py", "rows.jsonl"):
        text = (own_tasks / path).read_text()
        (own_tasks / path).write_text(text.replace("fox", "wolf").replace("- 3", "- 4").replace("toks: 5", "toks: 6"))
        assert identity() != before, path
        (own_tasks / path).write_text(text)
    assert identity() == before


def test_a_task_without_data_is_left_out_with_the_file_that_is_expected(
    rows: Path,
    own_tasks: Path,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    (own_tasks / "rows.jsonl").unlink()
    given = {"tasks": ["drop", "arc_easy", "my_choices"], "include_path": str(own_tasks), "limit": 2}
    result = measured_on("lm_eval", given, models["one"], tmp_path, rows)
    assert {example.task for example in result.examples()} == {"arc_easy"}
    assert str(rows / "EleutherAI/drop/default/validation.parquet") in result.missing["drop"]
    assert str(own_tasks / "rows.jsonl") in result.missing["my_choices"]
    elsewhere = measured_on("lm_eval", {"tasks": ["drop"]}, models["one"], tmp_path, None)
    assert "data.root to a folder that holds EleutherAI/drop/default/validation.parquet" in elsewhere.missing["drop"]


def test_eval_with_nothing_measured_ends_with_status_1(
    rows: Path,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    command = ["eval", str(models["one"]), "--suite", "lm_eval", "--root", str(tmp_path), "--dtype", "float32"]
    command += ["--data-root", str(rows), "--limit", "2"]
    status, _, messages = answer(*command, "--task", "drop")
    assert status == 1
    assert "EleutherAI/drop/default/validation.parquet" in " ".join(messages.split()).replace(" ", "")
    assert "nothing was measured" in messages.lower()
    status, printed, _ = answer(*command, "--task", "drop", "--task", "boolq", "--format", "md")
    assert status == 0 and "boolq" in printed and "Left out" in printed


def test_metrics_that_differ_in_kind_have_tables_of_their_own(
    own_tasks: Path,
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    command = ["eval", str(models["one"]), "--suite", "lm_eval", "--root", str(tmp_path), "--dtype", "float32"]
    command += ["--set", f"lm_eval.include_path={own_tasks}", "--set", "lm_eval.tasks=[my_choices,my_answers]"]
    status, printed, messages = answer(*command, "--format", "md")
    assert status == 0, messages
    assert "accuracy, percent" in printed and "distance, lower is better" in printed
    assert "my_choices (n=6)" in printed and "my_answers (n=6)" in printed


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"tasks": ["hellaswg"]}, "did you mean 'hellaswag'"),
        ({"tasks": ["my_choises"], "include_path": "FOLDER"}, "did you mean 'my_choices'"),
        ({"tasks": ["mmlu"]}, "'mmlu' is a group"),
        ({"tasks": ["nowhere.yaml"]}, "There is no file nowhere.yaml"),
        ({"tasks": ["my_choices"], "include_path": "nowhere"}, "There is no folder nowhere"),
        ({"tasks": ["FOLDER/functions.yaml"]}, "defines no task"),
        ({"tasks": ["FOLDER/broken.yaml"]}, "does not define a task of lm-eval"),
        ({"tasks": ["FOLDER/many.yaml"]}, "name one local file a split"),
    ],
)
def test_what_is_no_task_is_refused(given: dict[str, Any], sentence: str, own_tasks: Path) -> None:
    (own_tasks / "functions.yaml").write_text("dataset_path: json\n")
    (own_tasks / "broken.yaml").write_text("task: broken\ndataset_path: [json\n")
    many = {"task": "many", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": ["a", "b"]}}}
    (own_tasks / "many.yaml").write_text(yaml.safe_dump(many))
    given = json.loads(json.dumps(given).replace("FOLDER", str(own_tasks)))
    with pytest.raises(UserError, match=sentence):
        SUITES.get("lm_eval")(suite_config("lm_eval", given), None).identity()


def test_sections_of_a_command_line_take_tasks_by_name(rows: Path) -> None:
    chosen = standalone.sections(["lm_eval"], tasks=["arc_easy"], common={"limit": 3}, settings={}, data_root=rows)
    assert chosen["lm_eval"].config.limit == 3
    with pytest.raises(UserError, match="tasks"):
        standalone.sections(["lm_eval"], tasks=[], common={}, settings={}, data_root=rows)
