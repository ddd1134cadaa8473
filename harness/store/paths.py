"""Where things lie: what ships with the package, and the folders and files below `--root`.

Files that ship are found beside this module and never by package name: a folder called `results` or `harness` in the
current folder would otherwise be read in their place.
"""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SOURCE = PACKAGE.parent
"""The checkout, where the package is installed from one."""
PRESETS = PACKAGE / "config" / "presets"
EXAMPLE_ROWS = PACKAGE / "models" / "tiny" / "rows"
"""A few evaluation rows of our own, laid out as `data.root` is."""

RUN_FILE = "run.json"
PLAN_FILE = "plan.json"
SUITES_FILE = "suites.json"
RUNS = "runs"
EVALUATIONS = "evaluations"
ARTIFACTS = "artifacts"
MODELS = "models"
