"""The suites on tiny models and self-written rows: lm-eval's numbers, whatever ran before, also after a kill."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion.errors import UserError
from harness.config.validation import suite_config
from harness.data import hub
from harness.evaluation import evaluated_model, standalone
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.lm_eval import task_suite, tasks
from harness.evaluation.lm_eval.examples import EXAMPLES
from harness.evaluation.lm_eval.requests import answer_requests, no_room
from harness.evaluation.lm_eval.tasks import task_folder
from harness.evaluation.multipl_e import code_suite
from harness.evaluation.multipl_e.code_suite import COMPLETIONS
from harness.evaluation.suite import SUITES, LimitedConfig, SuiteResult, append_line, read_lines
from harness.models.resolution import ModelSpec, count_parameters, resolve
from harness.reporting.export import write_run
from harness.reporting.runs import open_run
from harness.store.artifacts import Store
from harness.store.costs import Costs
from tests.harness.suite_rows import make_data_root, write_rows
from tests.harness.tiny_models import save_model
from tests.shared import needed

pytestmark = pytest.mark.slow

# Few of the rows' words are tokens of the tiny vocabulary, so that a BBH prompt has thousands of them.
CONTEXT = 8192


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("models")
    made = {name: save_model(folder / name, LlamaConfig, 400, seed, 6, max_position_embeddings=CONTEXT)
            for seed, name in enumerate(["one", "two"])}  # fmt: skip
    return made | {"short": save_model(folder / "short", LlamaConfig, 400, 0, 6)}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda: False)


def evaluated(folder: Path, root: Path) -> EvaluatedModel:
    spec = ModelSpec(name=str(folder), dtype="float32")
    found = resolve(spec, root / "models")
    return EvaluatedModel(folder.name, found.fingerprint, spec, "float32", "cpu", 2048, count_parameters(folder), root)


def measure(name: str, section: dict[str, Any], model: Path, root: Path, data: Path | None) -> SuiteResult:
    made = SUITES.get(name)(suite_config(name, section), data)
    return made.measure(evaluated(model, root), Store(root / "artifacts"), Costs("cpu"))


def lines(measured: SuiteResult) -> dict[str, list[dict[str, Any]]]:
    """By task, what is kept of every example, in the order of the rows."""
    return {
        task: sorted(read_lines(path / EXAMPLES), key=lambda line: line["example"])
        for task, path in measured.artifacts.items()
    }


def completions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / COMPLETIONS).read_text().splitlines()]


BBH = {"tasks": ["boolean_expressions", "navigate"], "max_new_tokens": 6}
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


def test_a_record_does_not_depend_on_what_ran_before(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    whole = lines(measure("bbh", BBH, models["one"], tmp_path / "a", rows))
    part = lines(
        measure("bbh", {**BBH, "tasks": ["navigate"], "limit": 2, "batch_size": 1}, models["one"], tmp_path / "b", rows)
    )
    assert part == {"navigate": whole["navigate"][:2]}
    other = lines(measure("bbh", BBH, models["two"], tmp_path / "a", rows))  # in the same store
    assert [line["answer"] for line in other["navigate"]] != [line["answer"] for line in whole["navigate"]]
    assert [line["target"] for line in other["navigate"]] == [line["target"] for line in whole["navigate"]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts that were generated for."""
    from harness.evaluation.shared_prefix_lm import SharedPrefixLM

    prompts: list[str] = []
    own = SharedPrefixLM._decode

    def decode(self: Any, rows: dict[int, Any], answers: list[str]) -> None:
        prompts.extend(row.request.args[0] for row in rows.values())
        own(self, rows, answers)

    monkeypatch.setattr(SharedPrefixLM, "_decode", decode)
    yield prompts


def test_a_kill_costs_only_what_was_under_way(
    rows: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    section = {**BBH, "tasks": ["navigate"], "batch_size": 1}
    whole = lines(measure("bbh", section, models["one"], tmp_path / "whole", rows))
    own, written = task_suite.append_line, 0

    def until_killed(path: Path, value: dict[str, Any]) -> None:
        nonlocal written
        if written == 2:
            path.open("a").write('{"example": "0000')  # the line that was being written
            raise KeyboardInterrupt
        own(path, value)
        written += 1

    monkeypatch.setattr(task_suite, "append_line", until_killed)
    with pytest.raises(KeyboardInterrupt):
        measure("bbh", section, models["one"], tmp_path / "killed", rows)
    monkeypatch.setattr(task_suite, "append_line", own)
    asked.clear()
    resumed = measure("bbh", section, models["one"], tmp_path / "killed", rows)
    assert len(asked) == 3
    assert lines(resumed) == whole
    asked.clear()
    measure("bbh", section, models["one"], tmp_path / "killed", rows)
    assert not asked


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
        UserError, match=r"hellaswag cannot use the rows of .*validation\.parquet \(KeyError: 'ctx_b'\)"
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
        if written == 3:
            raise KeyboardInterrupt
        append_line(path, value)
        written += 1

    with monkeypatch.context() as patch:
        patch.setattr(code_suite, "append_line", until_killed)
        with pytest.raises(KeyboardInterrupt):
            measure("multipl_e", other, models["one"], tmp_path / "c", rows)
    asked.clear()
    (resumed,) = measure("multipl_e", other, models["one"], tmp_path / "c", rows).artifacts.values()
    assert len(asked) == 1 and completions(resumed) == fewer
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


def test_variants_of_bbh(rows: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for variant in ("fewshot", "zeroshot", "cot_zeroshot"):
        section = {"tasks": ["navigate"], "variant": variant, "max_new_tokens": 3, "limit": 1}
        measured = measure("bbh", section, models["one"], tmp_path, rows)
        assert "exact_match" in {example.metric for example in measured.examples()}
        assert variant == "fewshot" or "exact_match,strict-match" in {e.metric for e in measured.examples()}


def test_perplexity_is_the_experiments(made: Path, models: dict[str, Path], tmp_path: Path) -> None:
    section = {"documents": {"path": str(made / "test"), "split": "test", "first_bytes": 300}, "window": 64}
    measured = measure("perplexity", section, models["one"], tmp_path, None)
    examples = list(measured.examples())
    assert len(examples) == 24 and {e.metric for e in examples} == {"bits_per_byte"}
    assert all(e.denominator <= 300 < 8 * e.numerator for e in examples)


def test_text_that_a_tokenizer_drops_is_counted(tmp_path: Path) -> None:
    """Control characters that have no token: eight in ten bytes cost nothing, and the table says so."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from tests.tokenizer_zoo import ZOO

    tokenizer = ZOO["missing_bytes"]()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=1, max_position_embeddings=256)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    documents = tmp_path / "documents"
    documents.mkdir()
    for i in range(21):
        (documents / f"{i:02}.txt").write_text(f"Page {i} of the budget. " + "\x13\x14" * (200 if i else 0))
    section = {"documents": {"path": str(documents), "split": "test"}, "window": 64}
    suites = standalone.sections(["perplexity"], tasks=[], common={}, settings={"perplexity": section}, data_root=None)
    suites["perplexity"] = SUITES.get("perplexity")(suite_config("perplexity", section), None)
    spec = ModelSpec(name=str(tmp_path / "model"), dtype="float32")
    folder = standalone.evaluate(spec, suites, tmp_path, device="cpu")
    table = write_run(open_run(folder))["table-perplexity"]
    ((cell, *_),) = table.cells
    assert "do not spell the text of 20 of 21 documents (8,000 of their" in cell.note
    assert cell.lossy and cell.interval is None and not table.best()


def test_default_documents_of_perplexity_are_those_of_the_profile_small() -> None:
    from harness.config.loading import load

    (suite,) = standalone.sections(["perplexity"], tasks=[], common={}, settings={}, data_root=None).values()
    assert suite.config == load("main", profile="small").suites["perplexity"]
    common = {"limit": 3}
    (few,) = standalone.sections(["perplexity"], tasks=[], common=common, settings={}, data_root=None).values()
    assert few.config.documents == suite.config.documents.model_copy(update={"per_domain": 3})


def test_an_experiment_may_measure_no_held_out_text(experiment_file: Path, rows: Path, tmp_path: Path) -> None:
    from harness.config.loading import load
    from harness.experiment import run

    settings = ["methods.FuseLLM=null", "methods.FuseLLM published=null", f"data.root={rows}"]
    settings += ["suites.perplexity=null", "suites.commonsense={tasks: [boolq], limit: 3}"]
    folder = run.run(load(str(experiment_file), overrides=settings), tmp_path)
    assert "boolq" in (folder / "table.md").read_text() and "CLM" in (folder / "table.md").read_text()
    assert not list((tmp_path / "artifacts").glob("perplexity/*"))


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
