"""One page of results: what was reached beside its goal, a plain re-implementation and the machine's limit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Result:
    """One line of the page; `goal`, `reached`, `plain` and `limit` are in `unit`."""

    what: str
    unit: str
    reached: float
    goal: float | None = None
    better: Literal["less", "more"] = "less"
    plain: float | None = None
    limit: float | None = None
    note: str = ""
    """What exactly was done, how `plain` was extrapolated, what `limit` is: sentences."""

    def met(self) -> bool:
        """Whether the goal, if there is one, was reached."""
        return self.goal is None or (self.reached <= self.goal if self.better == "less" else self.reached >= self.goal)

    def times(self) -> float | None:
        """How many times better than the plain re-implementation."""
        if self.plain is None:
            return None
        return self.plain / self.reached if self.better == "less" else self.reached / self.plain


def number(value: float | None) -> str:
    """Three significant digits, thousands separated; a dash for nothing."""
    if value is None:
        return "–"
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def page(results: Sequence[Result], skipped: Sequence[str], facts: Sequence[tuple[str, str]], *, quick: bool) -> str:
    """The page as Markdown."""
    lines = [
        "# Speed and memory",
        "",
        "Written by `make bench`. Each line stands beside a plain re-implementation of the published algorithm",
        "(`benchmarks/plain.py`: loops over tokens and positions, dense targets), run beside it, and beside what this",
        "machine could do at most. Maps, alignments, fusing and the objective are checked in the run to give what the",
        "plain one gives; steps, loader, store and extraction are timed beside it only.",
        "",
    ]
    if quick:
        lines += ["**Tried at small sizes (`--quick`): the figures say nothing about the goals.**", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {fact} |" for name, fact in facts), ""]
    lines += [
        "| what | unit | goal | reached | plainly | times better | the machine's limit |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        goal = "–" if r.goal is None else f"{'≤' if r.better == 'less' else '≥'} {number(r.goal)}"
        reached = number(r.reached) if r.met() or quick else f"**{number(r.reached)}, missed**"
        cells = [r.what, r.unit, goal, reached, number(r.plain), number(r.times()), number(r.limit)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- **{r.what}**: {r.note}" for r in results if r.note)]
    lines += ["", *(f"- Left out: {reason}" for reason in skipped)] if skipped else []
    return "\n".join(lines) + "\n"
