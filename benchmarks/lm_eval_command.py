"""The suites' numbers beside those of lm-eval's own command line, on the same model, tasks and rows."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fusion.errors import UserError
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.lm_eval.suites import Bbh, BbhConfig, Commonsense
from harness.evaluation.lm_eval.task_suite import LmEvalConfig, LmEvalSuite
from harness.evaluation.lm_eval.tasks import _include
from harness.models.resolution import ModelSpec, ResolvedModel, count_parameters, resolve
from harness.store.artifacts import Store
from harness.store.costs import Costs

BBH_TASKS = ["boolean_expressions", "causal_judgement", "navigate", "sports_understanding"]


def theirs(suite: LmEvalSuite, model: Path, limit: int) -> dict[str, dict[str, float]]:
    """Every metric of every task, as the command's results file has it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, source in enumerate(suite._sources.values()):
            (folder / f"{number}.yaml").write_text(json.dumps(_include(source, folder)), encoding="utf-8")
        command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
        command += ["--model_args", f"pretrained={model},dtype=float32", "--limit", str(limit)]
        command += ["--tasks", ",".join(source.name for source in suite._sources.values())]
        command += ["--include_path", name, "--output_path", str(folder / "out")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        results = json.loads(next((folder / "out").rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
    return {task: results[source.name] for task, source in suite._sources.items()}


def ours(suite: LmEvalSuite, model: ResolvedModel, root: Path) -> dict[tuple[str, str], float]:
    """The mean of every task's metrics, in the first of lm-eval's ways to clean an answer."""
    evaluated = EvaluatedModel(
        label=model.name,
        fingerprint=model.fingerprint,
        spec=ModelSpec(name=str(model.folder), dtype="float32"),
        dtype="float32",
        device="cpu",
        batch_tokens=2048,
        parameters=count_parameters(model.folder),
        models_dir=root / "models",
    )
    scores: dict[tuple[str, str], list[float]] = {}
    for one in suite.measure(evaluated, Store(root / "artifacts"), Costs("cpu")).examples():
        scores.setdefault((one.task, one.metric), []).append(one.numerator / one.denominator)
    return {of: sum(values) / len(values) for of, values in scores.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a Markdown table; exit status 1 where two numbers differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lm_eval_command", description=__doc__)
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--root", type=Path, default=Path("work"), help="folder that holds models/")
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data/hub"))
    parser.add_argument("--limit", type=int, default=20, help="rows a task; of BBH's a tenth of it")
    parser.add_argument("--max-new-tokens", type=int, help="of BBH's answers; the tasks' own without")
    options = parser.parse_args(arguments)
    few = max(1, options.limit // 10)
    try:
        model = resolve(ModelSpec(name=options.model), options.root / "models")
        suites = {
            options.limit: Commonsense(LmEvalConfig(limit=options.limit), options.data_root),
            few: Bbh(BbhConfig(limit=few, tasks=BBH_TASKS, max_new_tokens=options.max_new_tokens), options.data_root),
        }
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    print(f"| {options.model}, float32 | rows | metric | lm-eval's command | fusellm eval |")
    print("| --- | ---: | --- | ---: | ---: |")
    differ = False
    for limit, suite in suites.items():
        expected = theirs(suite, model.folder, limit)
        with tempfile.TemporaryDirectory() as root:
            found = ours(suite, model, Path(root))
        for (task, metric), value in found.items():
            plain = metric.partition(",")[0]
            their = next(v for name, v in expected[task].items() if name.partition(",")[0] == plain)
            differ |= abs(their - value) > 1e-9
            print(f"| {task} | {limit} | {metric} | {their:.4f} | {value:.4f} |")
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
