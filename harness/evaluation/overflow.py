"""Rows that cannot be asked, and prompts that do not fit: what is read of them, what is said below the table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

OverflowRule = Literal["truncate_left", "shrink_answer", "skip"]
SKIPPED = "skipped.jsonl"
"""File of the examples that were not asked because their prompts do not fit."""


class WrongRow(Exception):
    """Raised for a row that a task or a model cannot use; the message says what is wrong with it."""


def without_token(choice: str, label: str) -> WrongRow:
    """The error for a choice of a row of which the tokenizer of the model `label` makes no token."""
    return WrongRow(f"its choice {choice!r} has no token of {label}")


@dataclass(frozen=True)
class Overflow:
    """A request that does not fit, in tokens; nothing of it is read where it cannot be answered."""

    context: int
    prompt: int
    read: int
    """How much of the prompt's end is read."""
    new: int
    """The longest answer, or the length of the continuation that is scored."""


@dataclass(frozen=True)
class Overflows:
    """What became of the examples of a task whose prompts do not fit the model's context."""

    asked: int
    """Examples that have an answer."""
    changed: int
    """Those of them whose prompt was cut or whose answer had less room."""
    skipped: list[str]
    context: int
    """Tokens; 0 where all prompts fit."""


def fit(
    prompt: list[int], new: int, excess: Callable[[Sequence[int], int], int], rule: OverflowRule
) -> tuple[list[int], int] | None:
    """What is read of a prompt and the longest answer (tokens); None where nothing can be asked.

    excess: by how many tokens a text and so many new ones exceed the context; 0 or less where they fit. `truncate_left`
    keeps the prompt's end, as HFLM of lm-eval 0.4.13 does. `shrink_answer` shortens the answer, to one token if need
    be, before it cuts the prompt. `skip` asks nothing.
    """
    over = excess(prompt, new)
    if over <= 0:
        return prompt, new
    if rule == "skip":
        return None
    if rule == "shrink_answer":
        new = max(1, new - over)
    while prompt and (over := excess(prompt, new)) > 0:
        prompt = prompt[over:]
    return (prompt, new) if prompt else None


def limited(request: "Instance", limit: int) -> "Instance":
    """The request for HFLM, with the longest answer that the prompt leaves room for."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.utils import normalize_gen_kwargs

    text, given = request.args
    if normalize_gen_kwargs(given, limit)["max_gen_toks"] == limit:
        return request
    return Instance(request.request_type, request.doc, (text, {**given, "max_gen_toks": limit}), request.idx)


def overflow_result(label: str, rule: OverflowRule, overflows: Mapping[str, Overflows]) -> dict[str, Any]:
    """What a suite's result says of prompts that do not fit, by task: `notes` for below the table, `skipped`."""
    notes = []
    skipped = [(task, len(one.skipped), one.asked + len(one.skipped)) for task, one in overflows.items()]
    cut = [(task, one.changed, one.asked + len(one.skipped)) for task, one in overflows.items()]
    context = max((one.context for one in overflows.values()), default=0)
    for counts, skips in ((cut, False), (skipped, True)):
        if some := [count for count in counts if count[1]]:
            what = _WHAT[rule] if skips == (rule == "skip") else _UNANSWERABLE
            listed = ", ".join(f"{task} {n:,} of {total:,}" for task, n, total in some)
            notes.append(f"{what.format(label=label, context=context)}: {listed}.")
    return {
        "notes": notes,
        "skipped": {task: one.skipped for task, one in overflows.items() if one.skipped and one.asked},
    }


_WHAT = {
    "truncate_left": "{label} read only the end of prompts that do not fit its context of {context:,} tokens, as "
    "lm-eval has it (overflow: truncate_left)",
    "shrink_answer": "{label} had less room than the task gives for answers to prompts that do not fit its context of "
    "{context:,} tokens (overflow: shrink_answer)",
    "skip": "{label} was not asked, and examples count for no row, where prompts do not fit its context of {context:,} "
    "tokens (overflow: skip)",
}
_UNANSWERABLE = (  # whatever the rule
    "{label} could not be asked, and examples count for no row, where what is scored exceeds its context of "
    "{context:,} tokens"
)
