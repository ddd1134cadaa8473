"""Suites measured on tiny models, and what is kept of every example."""

import json
from pathlib import Path
from typing import Any

from harness.config.validation import suite_config
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.lm_eval.examples import EXAMPLES
from harness.evaluation.multipl_e.code_suite import COMPLETIONS
from harness.evaluation.suite import SUITES, SuiteResult, read_lines
from harness.models.resolution import ModelSpec, count_parameters, resolve
from harness.store.artifacts import Store
from harness.store.costs import Costs


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
