"""One page of results: what was reached beside its goal, a reference implementation and the roofline."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Result:
    """One line of the page; `goal`, `reached`, `reference` and `roofline` are in `unit`."""

    what: str
    unit: str
    reached: float
    goal: float | None = None
    better: Literal["less", "more"] = "less"
    reference: float | None = None
    roofline: float | None = None
    note: str = ""
    """What exactly was done, how `reference` was extrapolated, what `roofline` is: sentences."""

    def met(self) -> bool:
        """Whether the goal, if there is one, was reached."""
        return self.goal is None or (self.reached <= self.goal if self.better == "less" else self.reached >= self.goal)

    def times(self) -> float | None:
        """How many times better than the reference implementation."""
        if self.reference is None:
            return None
        return self.reference / self.reached if self.better == "less" else self.reached / self.reference


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
        "Written by `make bench`. Each line is compared with a plain reference implementation of the published",
        "algorithm (`benchmarks/support/reference_implementation.py`: loops over tokens and positions, dense targets),",
        "measured in the same run, and with the roofline: the least that this machine needs. Maps, alignments, fusing",
        "and the objective are checked to give the values of the reference; steps, loader, store and extraction are",
        "only timed beside it.",
        "",
    ]
    if quick:
        lines += ["**Tried at small sizes (`--quick`): the figures say nothing about the goals.**", ""]
    lines += ["| | |", "| --- | --- |", *(f"| {name} | {fact} |" for name, fact in facts), ""]
    lines += [
        "| what | unit | goal | reached | reference | times better | roofline |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in results:
        goal = "–" if r.goal is None else f"{'≤' if r.better == 'less' else '≥'} {number(r.goal)}"
        reached = number(r.reached) if r.met() or quick else f"**{number(r.reached)}, missed**"
        cells = [r.what, r.unit, goal, reached, number(r.reference), number(r.times()), number(r.roofline)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- **{r.what}**: {r.note}" for r in results if r.note)]
    lines += ["", *(f"- Left out: {reason}" for reason in skipped)] if skipped else []
    return "\n".join(lines) + "\n"
