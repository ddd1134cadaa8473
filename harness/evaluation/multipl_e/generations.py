"""Generations and results as JSON lines, one problem a line, with the fields that MultiPL-E's own tools use.

Generations: name, language, prompt, tests, stop_tokens, completions. Results: the same without completions, and
`results`, one a completion: program, stdout, stderr, exit_code, status, timestamp; and beside these `strict` (True if
it also reached the end of the tests), `cpu_ms` and `toolchain`. Other keys of a line (temperature, top_p, max_tokens)
are copied.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.evaluation.multipl_e.languages import Language, language_of, program_of
from harness.store.files import parse_json

_TEXTS, _LISTS = ("name", "language", "prompt", "tests"), ("stop_tokens", "completions")


@dataclass(frozen=True)
class Problem:
    """One problem: its row as it was read, without the completions, and a program for each completion."""

    language: Language
    name: str
    row: dict[str, Any]
    programs: list[str]

    @property
    def key(self) -> tuple[str, str]:
        """Language and name, which identify the problem."""
        return self.language.name, self.name


def read_generations(path: Path) -> list[Problem]:
    """The problems of a file of generations. Raises UserError naming the line that cannot be used."""
    problems: list[Problem] = []
    seen: set[tuple[str, str]] = set()
    for number, row in json_lines(path):
        try:
            problem = _problem(row)
        except UserError as error:
            raise UserError(f"{path}, line {number} cannot be executed: {error}.") from None
        if problem.key in seen:
            raise UserError(f"{path}, line {number} repeats {problem.language.title}'s {problem.name}: merge the two.")
        seen.add(problem.key)
        problems.append(problem)
    if not problems:
        raise UserError(f"{path} holds no problems: generate completions first.")
    return problems


def _problem(row: dict[str, Any]) -> Problem:
    missing = [key for key in (*_TEXTS, *_LISTS) if key not in row]
    if missing:
        raise UserError(f"it lacks {', '.join(missing)}")
    for key in _TEXTS:
        if not isinstance(row[key], str):
            raise UserError(f"its {key} is no text")
    for key in _LISTS:
        if not isinstance(row[key], list) or not all(isinstance(one, str) for one in row[key]):
            raise UserError(f"its {key} are no list of texts")
    if not row["completions"]:
        raise UserError("it has no completions")
    language = language_of(row["language"])
    language.with_nonce(row["tests"], row["tests"], "")
    programs = [program_of(row["prompt"], one, row["tests"]) for one in row["completions"]]
    rest = {key: value for key, value in row.items() if key != "completions"}
    return Problem(language, row["name"], rest, programs)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with their line numbers. Raises UserError for a line that is no JSON object.

    Bytes that are not UTF-8 become lone surrogates, which the sandbox writes as the same bytes again: the compiler
    decides whether they are an error.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line.decode("utf-8", "surrogateescape"))
            except ValueError as error:
                raise UserError(f"{path}, line {number} is no JSON ({error}): correct or remove it.") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number} is no JSON object: correct or remove it.")
            yield number, row
