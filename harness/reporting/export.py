"""Writing what finished runs show: tables in every format, and figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.reporting.figures import drawings, learning_curves
from harness.reporting.runs import Run
from harness.reporting.tables import Tables, all_tables
from harness.store.files import make_folder, write_atomically

if TYPE_CHECKING:
    from results.table import Table

EQUAL_QUALITY = "equal_quality.txt"


def write(tables: Tables, out: Path, forms: Sequence[str]) -> list[Path]:
    """Writes each table below `out` in each of the formats, and the figures of its run; the files written."""
    make_folder(out, "--out")
    written = []
    for name, table in tables.by_name.items():
        stem = name.replace("/", "-")
        written += write_formats({stem: table}, out, forms)
        for drawing in drawings(tables.runs[name], table) if name in tables.runs else ():
            written += drawing.draw(out / f"{stem}-{drawing.name}")
    return written


def write_formats(tables: "Mapping[str, Table]", folder: Path, forms: Sequence[str]) -> list[Path]:
    """Writes tables, by the stem of their files' names, into `folder` in each of the formats; the files written."""
    from results.formats import ENDINGS, render

    written = []
    for stem, table in tables.items():
        for form in forms:
            path = folder / f"{stem}.{ENDINGS[form]}"
            write_atomically(path, render(table, form))
            written.append(path)
    return written


def write_run(run: Run) -> "dict[str, Table]":
    """Writes the tables of a run or an evaluation into its folder, and its learning curves where something was trained.

    Returns the tables by the stem of their files' names: `table`, and `table-SUITE` for every suite.
    """
    from results.formats import FORMATS

    tables = all_tables(run)
    write_formats(tables, run.folder, list(FORMATS))
    if curves := learning_curves(run, run.folder / "learning_curves"):
        lines = [result.sentence(curves.metric) for result in curves.equal_quality]
        write_atomically(run.folder / EQUAL_QUALITY, "\n".join(lines) + "\n")
    return tables


def equal_quality(folder: Path) -> list[str]:
    """The sentences about training tokens at equal quality that a run wrote beside its learning curves."""
    path = folder / EQUAL_QUALITY
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
