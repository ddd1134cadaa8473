"""Progress of long runs: every text of a progress bar is made here.

On a terminal there are two bars: one for the whole run ("stage 7 of 20", with the time left), and below it that of the
stage that is under way (throughput, time left). Elsewhere a line is printed now and then. All of it goes to standard
error, so that tables on standard output stay clean, and is shown by the first of several ranks only.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from harness.runtime import distributed

Advance = Callable[[float], None]

INTERVAL_S = 15.0
"""Seconds between two lines where there is no terminal."""


def notify(message: str) -> None:
    """One line for the user, above any bar."""
    from rich.console import Console

    if distributed.is_main_process():
        Console(stderr=True, highlight=False).print(message, markup=False, soft_wrap=True)


@dataclass
class _WholeRun:
    """The stages of a run that were missing when it was planned, and how long they are expected to take."""

    expected: Mapping[str, float]
    """Seconds by stage."""
    started: dict[str, float] = field(default_factory=dict)
    """When each stage began (of `time.monotonic`), in that order."""
    took: dict[str, float] = field(default_factory=dict)
    """Seconds of each finished stage."""
    description: str = ""
    last_line: float = -INTERVAL_S
    bars: Any = None
    """The rich.progress.Progress of the run; None where there is no terminal."""

    @property
    def position(self) -> str:
        return f"stage {len(self.started)} of {len(self.expected)}"

    def done(self) -> float:
        """Expected seconds of what is finished, with the elapsed part of the stages that are under way."""
        now = time.monotonic()
        running = (
            min(self.expected[stage], (now - began) / self._slowdown())
            for stage, began in self.started.items()
            if stage not in self.took
        )
        return sum(self.expected[stage] for stage in self.took) + sum(running)

    def seconds_left(self) -> float:
        """What the remaining stages are expected to take, at the pace of those that are finished."""
        return max(sum(self.expected.values()) - self.done(), 0.0) * self._slowdown()

    def _slowdown(self) -> float:
        """Measured seconds for each expected second of the finished stages; 1 before there are any."""
        expected = sum(self.expected[stage] for stage in self.took)
        measured = sum(self.took.values())
        return measured / expected if expected > 0 and measured > 0 else 1.0


_run: _WholeRun | None = None


@contextmanager
def whole_run(expected: Mapping[str, float]) -> Iterator[None]:
    """Counts the stages inside as parts of one run.

    expected: estimated seconds by stage (the fingerprint of what it makes), of every stage that is missing.
    """
    global _run
    if not expected or not distributed.is_main_process():
        yield
        return
    outer, _run = _run, _WholeRun(dict(expected))
    try:
        with ExitStack() as stack:
            if sys.stderr.isatty():
                _run.bars = stack.enter_context(_bars())
                _run.bars.add_task("", total=1, run=_run)
            yield
    finally:
        _run = outer


@contextmanager
def stage(name: str, description: str) -> Iterator[None]:
    """A stage of the run, by the name that `whole_run` knows it by; another is not counted."""
    run = _run
    if run is None or name not in run.expected or name in run.started:
        yield
        return
    outer, run.description = run.description, description
    run.started[name] = time.monotonic()
    if run.bars is None and time.monotonic() - run.last_line >= INTERVAL_S:
        run.last_line = time.monotonic()
        notify(f"{run.position}: {description}, about {duration(run.seconds_left())} left in all")
    try:
        yield
    finally:
        run.took[name] = time.monotonic() - run.started[name]
        run.description = outer


def track(description: str, total: float, unit: str, *, done: float = 0) -> AbstractContextManager[Advance]:
    """A context that gives `advance(amount)`; `done` of `total` (in `unit`s) were finished by an earlier run."""
    if sys.stderr.isatty() and distributed.is_main_process():
        return _track_by_bar(description, total, unit, done)
    return _track_by_lines(description, total, unit, done)


def duration(seconds: float) -> str:
    """A time to wait, in words: `40 s`, `12 min`, `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:,.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60} min"


@dataclass
class _Throughput:
    """How far a stage is. Only what this process has done counts for its rate."""

    description: str
    total: float
    unit: str
    done: float
    fresh: float = 0.0
    began: float = field(default_factory=lambda: time.monotonic())

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def rate(self) -> float:
        return self.fresh / max(self.elapsed, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """None while nothing has been done."""
        return max(self.total - self.done - self.fresh, 0) / self.rate if self.fresh else None

    def amount(self) -> str:
        return f"{self.done + self.fresh:,.0f}/{self.total:,.0f} {self.unit}"

    def summary(self) -> str | None:
        """The line that is left of a stage; None where it was over at once."""
        if not self.fresh or self.elapsed <= 1:
            return None
        seconds = f"{self.elapsed:,.0f} s, {self.rate:,.0f} {self.unit}/s"
        return f"{self.description}: {self.done + self.fresh:,.0f} {self.unit} in {seconds}"


@contextmanager
def _track_by_bar(description: str, total: float, unit: str, done: float) -> Iterator[Advance]:
    throughput = _Throughput(description, total, unit, done)
    shared = _run.bars if _run is not None else None
    with nullcontext(shared) if shared is not None else _bars() as bars:
        task = bars.add_task(description, total=total or 1, completed=done, throughput=throughput)

        def advance(amount: float) -> None:
            throughput.fresh += amount
            bars.update(task, advance=amount)

        try:
            yield advance
        finally:
            if shared is not None:  # a bar for each of many stages would fill the screen
                bars.remove_task(task)
    if shared is not None and (summary := throughput.summary()):
        notify(summary)


@contextmanager
def _track_by_lines(description: str, total: float, unit: str, done: float) -> Iterator[Advance]:
    throughput = _Throughput(description, total, unit, done)
    last_line = throughput.began

    def advance(amount: float) -> None:
        nonlocal last_line
        throughput.fresh += amount
        now = time.monotonic()
        if now - last_line >= INTERVAL_S and throughput.seconds_left is not None:
            last_line = now
            rate = f"{throughput.rate:,.0f} {unit}/s"
            line = f"{description}: {throughput.amount()}, {rate}, {throughput.seconds_left:,.0f} s left"
            if _run is not None and _run.started:
                _run.last_line = now
                line += f" ({_run.position}, about {duration(_run.seconds_left())} left in all)"
            notify(line)

    yield advance
    if summary := throughput.summary():
        notify(summary)


def _bars() -> Any:
    """A rich.progress.Progress whose tasks are a `_Throughput` or the `_WholeRun`."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task
    from rich.table import Column
    from rich.text import Text

    class Described(ProgressColumn):
        max_refresh = 0.5

        def __init__(self, of_stage: Callable[[_Throughput], str], of_run: Callable[[_WholeRun], str]) -> None:
            super().__init__(Column(no_wrap=True))  # a narrow terminal cuts the text, and the bars keep their lines
            self.of_stage, self.of_run = of_stage, of_run

        def render(self, task: Task) -> Text:
            run = task.fields.get("run")
            return Text(self.of_run(run) if run is not None else self.of_stage(task.fields["throughput"]))

    class Bar(BarColumn):
        def render(self, task: Task) -> Any:
            if (run := task.fields.get("run")) is not None:
                task.completed = run.done() / max(sum(run.expected.values()), 1e-9)
            return super().render(task)

    def left(throughput: _Throughput) -> str:
        return "" if throughput.seconds_left is None else f"{duration(throughput.seconds_left)} left"

    return Progress(
        Described(lambda stage: stage.description, lambda run: run.position if run.started else "starting"),
        Bar(),
        Described(_Throughput.amount, lambda run: run.description),
        Described(lambda stage: f"{stage.rate:,.0f} {stage.unit}/s" if stage.fresh else "", lambda run: ""),
        Described(left, lambda run: f"about {duration(run.seconds_left())} left"),
        console=Console(stderr=True),
        transient=False,
    )
