"""From results to pass@k, strictly and by exit status, over all problems that were executed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.errors import UserError
from harness.evaluation.multipl_e.generations import json_lines
from harness.evaluation.multipl_e.languages import LANGUAGES, UNSOLVABLE, language_of, original_name
from harness.evaluation.suite import Example
from results.metrics import pass_at_k

COLUMNS = ("language", "problems", "samples", "pass@{k}", "pass@{k} by exit status", "note")


@dataclass(frozen=True)
class ProblemScore:
    """The result of one problem: the number of samples, of those that pass strictly, and by exit status alone."""

    language: str
    name: str
    samples: int
    strict: int
    by_exit_status: int

    @property
    def unsolvable(self) -> bool:
        """True if the problem cannot be solved as published; it is counted all the same."""
        return any(self.name.startswith(f"HumanEval_{n}_") for n in UNSOLVABLE.get(self.language, ()))


def check_samples(samples: int, k: int) -> None:
    """Raises UserError where a problem has fewer samples than pass@k needs."""
    if not 1 <= k <= samples:
        raise UserError(f"pass@{k} needs at least {k} samples a problem, and there are {samples}: choose another k.")


def read_results(path: Path) -> list[ProblemScore]:
    """The result of every problem that was executed. Raises UserError for a file that holds no results."""
    scores = []
    for number, row in json_lines(path):
        try:
            results = row["results"]
            strict = sum(bool(result["strict"]) for result in results)
            passed = sum(result["exit_code"] == 0 for result in results)
            scores.append(ProblemScore(language_of(row["language"]).name, row["name"], len(results), strict, passed))
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is no result of an execution ({error}): execute again.") from None
    return scores


def examples(language: str, results: Path) -> Iterator[Example]:
    """The number of passing samples of every problem, strictly and by exit status alone."""
    for problem in read_results(results):
        for metric, passed in (("passed", problem.strict), ("passed_exit", problem.by_exit_status)):
            yield Example(language, problem.name, metric, passed, problem.samples, cluster=original_name(problem.name))


def unsolvable_notes(results: Mapping[str, Path]) -> list[str]:
    """What is said below the table of problems, by language, that cannot be solved as published; [] for none."""
    names = [
        f"{problem.name} ({language})"
        for language, path in results.items()
        for problem in read_results(path)
        if problem.unsolvable
    ]
    return [f"Cannot be solved as published, and counted all the same: {', '.join(names)}."] if names else []


def summary(examples: Sequence[ProblemScore], not_run: Mapping[str, str], k: int) -> list[list[object]]:
    """One row (COLUMNS) a language, means over problems; a language that was not run has a reason and no numbers."""
    rows: list[list[object]] = []
    for name, language in LANGUAGES.items():
        ours = [example for example in examples if example.language == name]
        if ours:
            samples = sorted({example.samples for example in ours})
            check_samples(samples[0], k)
            n = np.array([example.samples for example in ours])
            strict = pass_at_k(n, np.array([example.strict for example in ours]), k).mean()
            by_exit = pass_at_k(n, np.array([example.by_exit_status for example in ours]), k).mean()
            unsolvable = [example.name for example in ours if example.unsolvable]
            note = f"cannot be solved as published: {', '.join(unsolvable)}" if unsolvable else ""
            shown = " to ".join(str(n) for n in dict.fromkeys((samples[0], samples[-1])))
            rows.append([language.title, len(ours), shown, f"{strict:.4f}", f"{by_exit:.4f}", note])
        if name in not_run:
            rows.append([language.title, "", "", "", "", not_run[name]])
    return rows
