"""What is stored of an example of a task: one JSON line with its question, its answer, its target and its scores."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.evaluation.lm_eval.tasks import Prepared
from harness.evaluation.overflow import SKIPPED, Overflows
from harness.evaluation.suite import Example, StoredAnswer, read_lines
from harness.evaluation.vote import chosen_indices
from harness.store.fingerprint import fingerprint

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

EXAMPLES = "examples.jsonl"
# Columns of lm-eval's rows with what several questions are about.
_CONTEXT_COLUMNS = ("passage", "flores_passage", "paragraph", "context", "story", "article", "document", "premise")
_CONTEXT_COLUMN_OF = {"Rowan/hellaswag": "source_id"}  # by data set: here the video or article, cut into contexts


def scored_line(
    prepared: Prepared,
    example: str,
    main_filter: Callable[[Sequence[str]], str],
    recorded_name: Callable[[str], str] = str,
    end_tokens: Sequence[int] = (),
) -> dict[str, Any]:
    """The line that is stored of an example whose requests are answered, scored by the task's own code.

    `main_filter` picks, of the filters of the task, the one whose scores bear the plain name of their metric; those of
    another filter are called METRIC,FILTER. `recorded_name` gives the name under which a metric is recorded, and
    `end_tokens` are the ids that end an answer.
    """
    from lm_eval.utils import hash_string

    task, requests = prepared.task, sorted(prepared.examples[example], key=lambda r: r.idx)
    doc = requests[0].doc
    for clean in task._filters:
        clean.apply(requests)
    filters = list(requests[0].filtered_resps)
    means = mean_metrics(prepared)
    scores: dict[str, float] = {}
    others: dict[str, Any] = {}
    for name in filters:
        for metric, value in task.process_results(doc, [r.filtered_resps[name] for r in requests]).items():
            suffix = "" if name == main_filter(filters) else f",{name}"
            if metric in means:
                scores[recorded_name(metric) + suffix] = _number(value, metric)
            else:
                others[metric + suffix] = plain(value)
    question = task.doc_to_text(doc)
    for answer in (answer for r in requests for answer in r.resps if not isinstance(answer, str)):
        _number(answer[0], "log-likelihood")
    return {
        "example": example,
        "cluster": context_of(doc, prepared.source.config.get("dataset_path")),
        "prompt_hash": hash_string(str(requests[0].args[0])),
        "question": question if isinstance(question, str) else None,
        "choices": plain(task.doc_to_choice(doc)) if task.config.doc_to_choice is not None else None,
        "target": plain(task.doc_to_target(doc)),
        "generation": _settings(requests[0], end_tokens),
        "answer": [plain(r.resps[0] if len(r.resps) == 1 else r.resps) for r in requests],
        "filtered": {name: [plain(r.filtered_resps[name]) for r in requests] for name in filters},
        "scores": scores,
        "other_scores": others,
    }


def _settings(request: "Instance", end_tokens: Sequence[int]) -> dict[str, Any] | None:
    """How an answer was generated; None for a request that generates nothing.

    These are all settings: what is not among them is transformers' own default, whatever the model's folder says.
    """
    if request.request_type != "generate_until":
        return None
    return {**plain(request.args[1]), "end_tokens": list(end_tokens)}


def context_of(row: Mapping[str, Any], dataset: str | None) -> str:
    """A name of what the question of a row is about, the same in every row and task about it; '' where there is none.

    It is the hash of the row's passage, premise, story or the like.
    """
    columns = [_CONTEXT_COLUMN_OF[dataset]] if dataset in _CONTEXT_COLUMN_OF else _CONTEXT_COLUMNS
    context = next((row[column] for column in columns if row.get(column)), None)
    return "" if context is None else fingerprint(plain(context))[:16]


def _number(value: Any, what: str) -> float:
    """The value as a float. Raises ValueError where it is not a number; a log-likelihood may be minus infinity."""
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"its {what} is not a number")
    return number


def mean_metrics(prepared: Prepared) -> set[str]:
    """The task's metrics that are means over examples (a perplexity, for instance, is not)."""
    from lm_eval.api.metrics import mean

    return {metric for metric, aggregation in prepared.task.aggregation().items() if aggregation is mean}


def plain(value: Any) -> Any:
    """The value in JSON's own types; infinite numbers as `float` reads them, since JSON has none."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):  # numpy's numbers
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def read_examples(task: str, folder: Path) -> Iterator[Example]:
    """The scores of every example of a task, by the artifact that holds its lines, in the order of the rows."""
    if not (folder / EXAMPLES).exists():
        return
    for line in sorted(read_lines(folder / EXAMPLES), key=lambda line: str(line["example"])):
        for metric, score in line["scores"].items():
            yield Example(task, line["example"], metric, score, cluster=line["cluster"])


def read_overflows(folder: Path, answered: str) -> Overflows:
    """How many prompts of a task did not fit, by the artifact that holds its lines.

    answered: the name of the file of the examples that have an answer.
    """
    lines, skipped = (read_lines(folder / name) if (folder / name).exists() else [] for name in (answered, SKIPPED))
    overflows = [found for line in [*lines, *skipped] if (found := line.get("overflow"))]
    names = sorted(str(line["example"]) for line in skipped)
    context = overflows[0]["context"] if overflows else 0
    return Overflows(len(lines), len(overflows) - len(skipped), names, context)


def stored_answers(folder: Path, metric: str) -> Iterator[StoredAnswer]:
    """The examples of a task that `metric` scores, as a person reads them."""
    if not (folder / EXAMPLES).exists():
        return
    for line in read_lines(folder / EXAMPLES):
        if metric in line["scores"]:
            target, answer = _target_and_answer(line, metric)
            score = float(line["scores"][metric])
            yield StoredAnswer(str(line["example"]), line["question"] or "", target, answer, score)


def _target_and_answer(line: Mapping[str, Any], metric: str) -> tuple[str, str]:
    """What is right and what was answered: the choices with an arrow at the chosen one, or the text."""
    target, answers = line["target"], line["answer"]
    if line["choices"] and all(isinstance(answer, list) for answer in answers):
        chosen = chosen_indices(line)
        index = chosen.get(metric, chosen["acc"])
        text = "\n".join(
            f"{'→' if i == index else ' '} {choice}  ({float(answer[0]):.2f} nats)"
            for i, (choice, answer) in enumerate(zip(line["choices"], answers, strict=False))
        )
        right = line["choices"][target] if isinstance(target, int) and target < len(line["choices"]) else target
        return str(right), text
    if isinstance(answers[0], list):
        log_likelihood, is_greedy = answers[0][:2]
        likeliest = "the likeliest" if is_greedy else "not the likeliest"
        text = f"{likeliest} continuation ({float(log_likelihood):.2f} nats)"
    else:
        text = str(answers[0])
    return ", ".join(map(str, target)) if isinstance(target, list) else str(target), text
