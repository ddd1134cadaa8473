"""The problems of MultiPL-E: where their rows are, and their fields."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.data.hub import dataset_fingerprint
from harness.evaluation.lm_eval.tasks import load_rows, local_split
from harness.evaluation.multipl_e.languages import original_name
from harness.evaluation.suite import LimitedConfig
from harness.store.fingerprint import file_sha256

_PYTHON_STOPS = ["\ndef", "\n#", "\nif", "\nclass"]  # MultiPL-E's own for Python, whose rows are HumanEval's
_FIELDS = ("name", "prompt", "tests", "stop_tokens")


def place_of(language: str) -> tuple[str, str, str]:
    """The hub's data set, configuration and split that hold the problems of a language."""
    if language == "python":
        return "openai/openai_humaneval", "openai_humaneval", "test"
    return "nuprl/MultiPL-E", f"humaneval-{language}", "test"


def file_of(language: str, data_root: Path | None) -> Path | None:
    """The file below `data_root` with the problems of a language; None where only the hub has them."""
    return local_split(*place_of(language), data_root, f"MultiPL-E's {language}")


def data_identity(language: str, data_root: Path | None) -> str:
    """What the problems of a language are, for the key of what is made of them."""
    path = file_of(language, data_root)
    name, *part = place_of(language)
    return file_sha256(path) if path else f"{dataset_fingerprint(name)}:{':'.join(part)}"


def read_problems(language: str, data_root: Path | None, config: LimitedConfig) -> list[dict[str, Any]]:
    """The problems of a language that `config` takes: name, prompt, tests, stop_tokens.

    Raises UserError where they are unavailable, and naming the row that lacks a field.
    """
    path = file_of(language, data_root)
    rows = load_rows(*place_of(language), path)
    where = path or ":".join(place_of(language))
    problems = [_problem(language, row, f"{where}, row {number}") for number, row in enumerate(rows, 1)]
    # By the name that all languages share, so that a draw takes the same problems of each.
    taken = config.taken([original_name(problem["name"]) for problem in problems])
    return [problems[i] for i in taken]


def asked(problem: Mapping[str, Any]) -> str:
    """The text that a model continues. The program is put together with the prompt as it is.

    Asked as MultiPL-E's and BigCode's tools ask. Many tokenizers join the line break at a prompt's end to the
    indentation that follows it; a prompt that ends there continues as such text hardly ever does.
    """
    return str(problem["prompt"]).strip()


def _problem(language: str, row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row in MultiPL-E's fields. Raises UserError naming a field that it lacks, or one of another type."""
    needed = ("task_id", "prompt", "test", "entry_point") if language == "python" else _FIELDS
    if lacking := [name for name in needed if row.get(name) is None]:
        raise UserError(f"{where} has no {lacking[0]!r} (it has {', '.join(row)}): put the rows of the hub there.")
    if wrong := [name for name in needed if not _fits(name, row[name])]:
        kind = "list of texts" if wrong[0] == "stop_tokens" else "text"
        raise UserError(f"{where}: its {wrong[0]!r} is no {kind}: put the rows of the hub there.")
    if language != "python":
        return {name: row[name] for name in _FIELDS}
    name = f"{row['task_id'].replace('/', '_')}_{row['entry_point']}"
    tests = f"{row['test']}\ncheck({row['entry_point']})\n"
    return {"name": name, "prompt": row["prompt"], "tests": tests, "stop_tokens": _PYTHON_STOPS}


def _fits(name: str, value: Any) -> bool:
    if name == "stop_tokens":
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return isinstance(value, str)
