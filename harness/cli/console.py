"""How commands print: tables, plans, and libraries that must stay quiet."""

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from harness.cli.options import Format
from harness.runtime import distributed
from harness.runtime.device import refuse_missing_device
from harness.store.files import make_folder

if TYPE_CHECKING:
    from rich.console import Console

    from harness.store.artifacts import Estimate, Planned
    from results.table import Table


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[object]], form: Format | None) -> None:
    """A list as a table: for the terminal where `form` is None.

    Lists, objects and truth values in it are those of JSON, and words in every other format.
    """
    from results.formats import plain_rich, plain_table

    if form != "json":
        rows = [[_in_words(value) for value in row] for row in rows]
    if form is None:
        _console().print(plain_rich(columns, rows))
    else:
        typer.echo(plain_table(columns, rows, form), nl=False)


def _in_words(value: object) -> object:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(str(_in_words(item)) for item in value)
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_in_words(item)}" for key, item in value.items())
    return value


def print_table(table: "Table", form: Format | None) -> None:
    """A table of results: for the terminal where `form` is None."""
    from results.formats import render, to_rich

    if form is None:
        _console().print(to_rich(table))
    else:
        typer.echo(render(table, form), nl=False)


def print_document(document: Mapping[str, Any], form: Literal["yaml", "json"] | None) -> None:
    """Nested keys and values, in their order; as YAML where `form` is None."""
    if form == "json":
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False))
    else:
        import yaml

        typer.echo(yaml.safe_dump(dict(document), sort_keys=False, allow_unicode=True), nl=False)


def open_streams() -> None:
    """Makes standard output and standard error take any text.

    What an encoding other than UTF-8 does not have becomes a question mark, and a closed stream swallows everything: a
    table must not be lost, after hours of training, because of the terminal.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def size(n_bytes: float) -> str:
    """A number of bytes for people: `840 B`, `1.2 MB`."""
    units = iter(("B", "kB", "MB", "GB"))
    unit = next(units)
    while n_bytes >= 1000 and unit != "GB":
        n_bytes, unit = n_bytes / 1000, next(units)
    return f"{n_bytes:,.0f} B" if unit == "B" else f"{n_bytes:,.1f} {unit}"


def _console() -> "Console":
    from rich.console import Console

    # Rich takes the width from COLUMNS or from the terminal. Piped output must not be folded at 80 columns.
    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=200 if wide else None)


def print_plan(planned: Sequence["Planned"], root: Path, form: Format | None) -> None:
    """The stages of a plan with their state and estimated costs, and the sum of what is not ready."""
    rows: list[list[Any]] = []
    groups: dict[tuple[str, str], list[Planned]] = {}
    for stage in planned:  # the tasks of a suite are one line a candidate
        groups.setdefault((stage.spec.kind, str(stage.spec.info.get("candidate", stage.spec.label))), []).append(stage)
    for (kind, label), parts in groups.items():
        states = {part.state: sum(other.state == part.state for other in parts) for part in parts}
        state = ", ".join(state if len(states) == 1 else f"{n} {state}" for state, n in states.items())
        every, missing = [part.estimate for part in parts], [part.estimate for part in parts if part.state != "ready"]
        rows.append([kind, label, state, *_costs(every, every, missing)])
    missing = [stage.estimate for stage in planned if stage.state != "ready"]
    rows.append(["total", "", "", *_costs(missing, missing, missing)])
    if form == "json" or form == "csv":
        print_rows(["stage", "of", "state", "disk_bytes", "memory_bytes", "seconds"], rows, form)
    else:
        shown = [
            [*row, f"{disk / 1e9:.3f}", f"{memory / 1e9:.2f}", f"{seconds / 60:.1f}"]
            for *row, disk, memory, seconds in rows
        ]
        print_rows(["stage", "of", "state", "disk (GB)", "memory (GB)", "time (min)"], shown, form)
    typer.echo(f"Estimates, not measurements. Below {root.resolve()}.", err=True)


def _costs(
    disk: Sequence["Estimate"], memory: Sequence["Estimate"], time: Sequence["Estimate"]
) -> tuple[float, float, float]:
    """Bytes on disk and seconds in all, and the most bytes in memory at a time."""
    return (
        sum(estimate.disk for estimate in disk),
        max((estimate.memory for estimate in memory), default=0),
        sum(estimate.seconds for estimate in time),
    )


def prepare(root: Path, *devices: str) -> None:
    """What every command that computes does first, before it imports anything heavy.

    Makes the folder `root` and quiets libraries. Raises UserError for a device that is not there and for a root that
    cannot be made.
    """
    for device in devices:
        refuse_missing_device(device)
    make_folder(root, "--root")
    quiet_libraries()


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
