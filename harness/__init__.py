"""The front door: command line, configuration, experiments, artifacts, corpora, training, suites.

The public functions (see `harness.api`) are imported when they are first used, so that importing the package costs
nothing:

    from harness import evaluate, load, open_run, plan, report, run, tables
"""

import sys

if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == "harness" and not sys.flags.safe_path:
    # `python -m harness` puts the current folder first, and what lies there (`typing.py`) would be imported in place of
    # the libraries: nothing else is imported above this line. Another program's `python -m` keeps its folder.
    sys.path[0] = __path__[0][: -len("/harness")]

from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.runtime.import_path import prefer_own_packages

if TYPE_CHECKING:
    from fusion.errors import UserError
    from harness.api import Config, Run, evaluate, load, open_run, plan, report, run, tables

__version__ = "0.2.0"

__all__ = [
    "Config",
    "Run",
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "open_run",
    "plan",
    "report",
    "run",
    "tables",
]


prefer_own_packages()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("fusion.errors" if name == "UserError" else "harness.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
