"""The figures of a finished run: drawn from its records, its table and its audit, and so again from those alone."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.reporting.runs import Run
from harness.store.fingerprint import canonical

if TYPE_CHECKING:
    import pandas as pd

    from results.figures.learning_curves import LearningCurves
    from results.table import Table

AUDIT = Path("audit", "audit.json")  # in the run's folder, where the sources were audited


@dataclass(frozen=True)
class Drawing:
    """One figure: the end of its files' names, what it shows, and what draws it at a path without an ending."""

    name: str
    caption: str
    draw: Callable[[Path], Sequence[Path]]


def drawings(run: Run, table: "Table") -> Iterator[Drawing]:
    """All figures that there are of `run`, whose main table is `table`; a draw may find nothing to draw."""
    from results.figures.differences import differences_figure
    from results.figures.quality import quality_figure

    held_out = f"Held-out text against training tokens (bits per byte, lower is better, {_precision_of_curves(run)})"
    yield Drawing("learning-curves", held_out, partial(_curve_files, run))
    yield Drawing(
        "differences",
        f"Differences to {table.reference} in every task ({table.measured_in})",
        lambda place: differences_figure(table, place),
    )
    for along, rows in _series(run.configuration).items():
        for column in _columns(table):
            about = "" if column == "average" else f": {column}"
            if len(shown := _with_difference(table, rows, column)) > 1:
                yield Drawing(
                    re.sub(r"\W+", "-", f"by {along}{about}"),
                    f"Quality against {along}{about} ({table.measured_in})",
                    partial(quality_figure, table, {along: shown}, along=along, column=column),
                )
    if (run.folder / AUDIT).exists():
        yield from audited(read_audit(run.folder), run.configuration["title"], run.banner)


def audited(measures: "pd.DataFrame", title: str, banner: str) -> Iterator[Drawing]:
    """The figures of an audit's measures."""
    from results.figures.audit import audit_figure, coverage_figure, selection_figure

    for name, caption, draw in (
        (
            "audit",
            "What each source knows more than the target, and what every step leaves of it (bits per byte, higher is "
            "better)",
            audit_figure,
        ),
        ("selection", "Which source is selected where (share of passages)", selection_figure),
        ("coverage", "How much of the text each source's alignment covers (share of positions)", coverage_figure),
    ):
        yield Drawing(name, caption, partial(draw, measures, title=title, banner=banner))


def read_audit(folder: Path) -> "pd.DataFrame":
    """The measures that the audit left in a run's folder."""
    import pandas as pd

    return pd.DataFrame(json.loads((folder / AUDIT).read_text(encoding="utf-8")))


def learning_curves(run: Run, place: Path) -> "LearningCurves | None":
    """Draws the held-out text against training tokens; None where the reference was not measured along its training."""
    from results.figures.learning_curves import Selection
    from results.figures.learning_curves import learning_curves as draw_learning_curves

    along = run.records[run.records["tokens"].notna()]
    trained = [label for label in run.methods if label in set(along["method"])]
    if run.reference is None or run.reference not in trained:
        return None
    chosen = [
        Selection(
            entry["row"], entry["seed"], entry["tokens"], tuple((t, nll / math.log(2)) for t, nll in entry["points"])
        )
        for entry in run.description.get("checkpoints", [])
    ]
    return draw_learning_curves(
        run.records,
        trained,
        place,
        reference=run.reference,
        metric=str(along["metric"].iloc[0]),
        title=run.configuration["title"],
        banner=run.banner,
        precision=_precision_of_curves(run),
        selections=chosen,
    )


def _precision_of_curves(run: Run) -> str:
    """Float32, or that of training, where another one is set or the weights are sharded: nothing is converted for a
    measurement.
    """
    settings = run.configuration.get("suites", {}).get("perplexity", {})
    training = run.configuration.get("training", {})
    sharded = training.get("deepspeed") or training.get("fsdp2")
    exact = settings.get("dtype", "float32") == "float32" and not sharded
    return "float32" if exact else "in the precision of training"


def _curve_files(run: Run, place: Path) -> Sequence[Path]:
    curves = learning_curves(run, place)
    return curves.files if curves else ()


def _columns(table: "Table") -> list[str]:
    """The columns of averages that methods, being the rows, are compared in."""
    if table.best_along == "row":
        return []
    compared = [column.label for column in table.columns if column.compared]
    return ["average"] if "average" in compared else compared


def _with_difference(table: "Table", rows: Mapping[str, float], column: str) -> dict[str, float]:
    index = [other.label for other in table.columns].index(column)
    cells = {row: line[index] for row, line in zip(table.rows, table.cells, strict=True)}
    return {row: x for row, x in rows.items() if row in cells and cells[row].difference is not None}


def _series(configuration: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """By setting the rows that differ in it alone, with its values: lambda, k, number of sources."""
    values: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "lambda": lambda entry: entry["lambda"] if "lambda" in entry else _usual_lambda(),
        "k": lambda entry: entry.get("k") or configuration["extraction"]["k"],
        "sources": lambda entry: len(entry.get("sources") or configuration["roles"]["sources"]),
    }
    rows = {
        label: entry
        for label, entry in configuration["methods"].items()
        if entry["method"] == "fusellm" and not isinstance(entry.get("lambda"), Mapping)
    }
    series = {}
    for setting, value in values.items():
        alike: dict[str, dict[str, Mapping[str, Any]]] = {}
        for label, entry in rows.items():
            rest = {"preset": "corrected", **{key: one for key, one in entry.items() if key != setting}}
            alike.setdefault(canonical(rest), {})[label] = entry
        largest = max(alike.values(), key=len, default={})
        if len({canonical(entry.get(setting)) for entry in largest.values()}) > 1:
            name = "number of sources" if setting == "sources" else setting
            series[name] = {label: value(entry) for label, entry in largest.items()}
    return series


def _usual_lambda() -> float:
    from baselines.fusellm import FuseLLMParameters

    return float(FuseLLMParameters.model_fields["lam"].default)
