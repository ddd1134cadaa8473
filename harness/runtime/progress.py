"""Progress of long steps: a bar with throughput and time left on a terminal, a line now and then elsewhere.

Of several ranks the first one shows it.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from harness.runtime import distributed

Advance = Callable[[float], None]


def notify(message: str) -> None:
    """One line for the user, beside any bar; standard error, so that tables on standard output stay clean."""
    from rich.console import Console

    if distributed.is_main_process():
        Console(stderr=True, highlight=False).print(message, markup=False)


@contextmanager
def track(description: str, total: float, unit: str, *, done: float = 0) -> Iterator[Advance]:
    """Yields `advance(amount)`; `done` of `total` (in `unit`s) were finished by an earlier run."""
    if sys.stderr.isatty() and distributed.is_main_process():
        yield from _bar(description, total, unit, done)
    else:
        yield from _lines(description, total, unit, done)


def _bar(description: str, total: float, unit: str, done: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        task = progress.add_task(description, total=total, completed=int(done), unit=unit, rate="")
        started, fresh = time.monotonic(), 0.0

        def advance(amount: float) -> None:
            nonlocal fresh
            fresh += amount
            rate = fresh / max(time.monotonic() - started, 1e-9)
            progress.update(task, advance=amount, rate=f"{rate:,.0f} {unit}/s")

        yield advance


def _lines(description: str, total: float, unit: str, done: float, every: float = 15.0) -> Iterator[Advance]:
    started = said = time.monotonic()
    fresh = 0.0

    def advance(amount: float) -> None:
        nonlocal fresh, said
        fresh += amount
        now = time.monotonic()
        if now - said >= every and fresh:
            said = now
            rate = fresh / (now - started)
            left = max(total - done - fresh, 0) / rate
            notify(f"{description}: {done + fresh:,.0f}/{total:,.0f} {unit}, {rate:,.0f} {unit}/s, {left:,.0f} s left")

    yield advance
    seconds = time.monotonic() - started
    if fresh and seconds > 1:
        notify(f"{description}: {done + fresh:,.0f} {unit} in {seconds:,.0f} s, {fresh / seconds:,.0f} {unit}/s")
