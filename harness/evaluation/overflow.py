"""Prompts that do not fit a model's context: what is read of them, and how long the answer may be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

OverflowRule = Literal["truncate_left", "shrink_answer", "skip"]


@dataclass(frozen=True)
class Overflow:
    """A request that does not fit, in tokens; nothing of it is read where it cannot be answered."""

    context: int
    prompt: int
    read: int
    """How much of the prompt's end is read."""
    new: int
    """The longest answer, or the length of the continuation that is scored."""


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


_WHAT = {
    "truncate_left": "{label} read only the end of prompts that do not fit its context of {context:,} tokens, as "
    "lm-eval has it (overflow: truncate_left)",
    "shrink_answer": "{label} had less room than the task gives for answers to prompts that do not fit its context of "
    "{context:,} tokens (overflow: shrink_answer)",
    "skip": "{label} was not asked, and examples count for no row, where prompts do not fit its context of {context:,} "
    "tokens (overflow: skip)",
}


def overflow_note(label: str, rule: OverflowRule, context: int, counts: Sequence[tuple[str, int, int]]) -> str:
    """One sentence for below the table: what a rule did, by task, and to how many of its examples."""
    return f"{_WHAT[rule].format(label=label, context=context)}: {_listed(counts)}."


def unanswerable_note(label: str, context: int, counts: Sequence[tuple[str, int, int]]) -> str:
    """As `overflow_note`, of examples of which nothing could be asked whatever the rule."""
    what = f"{label} could not be asked, and examples count for no row, where what is scored exceeds its context of"
    return f"{what} {context:,} tokens: {_listed(counts)}."


def _listed(counts: Sequence[tuple[str, int, int]]) -> str:
    return ", ".join(f"{task} {n:,} of {total:,}" for task, n, total in counts)
