"""Records, statistics, tables and figures; the paper's published numbers as data.

A table is built from records alone:

    from results import main_table, read
    table = main_table(read(["work/runs/main/small/0123456789abcdef/records"]), ["CLM", "FuseLLM"])
    table.to_frame()

Names are imported when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from results.errors import UnknownName, UserError
    from results.figures.audit import audit_figure, coverage_figure, selection_figure
    from results.figures.differences import differences_figure
    from results.figures.learning_curves import learning_curves
    from results.figures.quality import quality_figure
    from results.formats import FORMATS, render
    from results.layout import Cell, Column
    from results.metrics import METRICS, Metric
    from results.paper_layouts import comparison
    from results.paper_numbers import paper_table
    from results.records import Record, read, write
    from results.table import Table
    from results.tables import main_table, suite_table

__all__ = [
    "FORMATS",
    "METRICS",
    "Cell",
    "Column",
    "Metric",
    "Record",
    "Table",
    "UnknownName",
    "UserError",
    "audit_figure",
    "comparison",
    "coverage_figure",
    "differences_figure",
    "learning_curves",
    "main_table",
    "paper_table",
    "quality_figure",
    "read",
    "render",
    "selection_figure",
    "suite_table",
    "write",
]

_MODULES = {
    "errors": ("UnknownName", "UserError"),
    "figures.audit": ("audit_figure", "coverage_figure", "selection_figure"),
    "figures.differences": ("differences_figure",),
    "figures.learning_curves": ("learning_curves",),
    "figures.quality": ("quality_figure",),
    "formats": ("FORMATS", "render"),
    "layout": ("Cell", "Column"),
    "metrics": ("METRICS", "Metric"),
    "paper_layouts": ("comparison",),
    "paper_numbers": ("paper_table",),
    "records": ("Record", "read", "write"),
    "table": ("Table",),
    "tables": ("main_table", "suite_table"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
