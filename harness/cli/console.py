"""How commands print: tables, plans, and libraries that must stay quiet."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import typer

from harness.cli.options import Format
from harness.runtime import distributed


def print_rows(columns: list[str], rows: list[Any], form: Format | None) -> None:
    from results.formats import plain_rich, plain_table

    if form is None:
        _console().print(plain_rich(columns, rows))
    else:
        typer.echo(plain_table(columns, rows, form), nl=False)


def print_table(table: Any, form: Format | None) -> None:
    from results.formats import render, to_rich

    if form is None:
        _console().print(to_rich(table))
    else:
        typer.echo(render(table, form), nl=False)


def _console() -> Any:
    from rich.console import Console

    # Piped output must not be folded at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 200)


def print_plan(planned: list[Any], root: Path) -> None:
    rows: list[list[object]] = []
    disk = memory = seconds = 0.0
    groups: dict[tuple[str, str], list[Any]] = {}
    for p in planned:  # the tasks of a suite are one line a candidate
        groups.setdefault((p.spec.kind, str(p.spec.info.get("candidate", p.spec.label))), []).append(p)
    for (kind, label), parts in groups.items():
        states = {p.state: sum(q.state == p.state for q in parts) for p in parts}
        todo = [p.estimate for p in parts if p.state != "ready"]
        costs = [p.estimate for p in parts]
        rows.append(
            [
                kind,
                label,
                ", ".join(state if len(states) == 1 else f"{n} {state}" for state, n in states.items()),
                f"{sum(e.disk for e in costs) / 1e9:.3f}",
                f"{max(e.memory for e in costs) / 1e9:.2f}",
                f"{sum(e.seconds for e in todo) / 60:.1f}",
            ]
        )
        disk, seconds = disk + sum(e.disk for e in todo), seconds + sum(e.seconds for e in todo)
        memory = max([memory, *(e.memory for e in todo)])
    rows.append(["total", "", "", f"{disk / 1e9:.3f}", f"{memory / 1e9:.2f}", f"{seconds / 60:.1f}"])
    print_rows(["stage", "of", "state", "disk (GB)", "memory (GB)", "time (min)"], rows, None)
    typer.echo(f"Estimates, not measurements. Below {root.resolve()}.", err=True)


def quiet_libraries() -> None:
    """Progress bars and advice of libraries would tear our own bars apart, and one rank's warnings are enough."""
    if not distributed.is_main_process():
        warnings.simplefilter("ignore")
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # what DeepSpeed calls is being renamed
    # It finds that the Trainer and DeepSpeed accumulate differently, which they do on purpose: the Trainer alone does.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
