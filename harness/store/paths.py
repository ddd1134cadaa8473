"""The only module that knows names of files and folders: those that ship with the package, and those below `--root`.

    root/
      artifacts/KIND/LABEL-FINGERPRINT/           one artifact: its files and manifest.json
      models/NAME/                                a fetched or converted model
      runs/EXPERIMENT/PROFILE/FINGERPRINT/        a run: run.json, plan.json, suites.json, records/, tables and figures
      runs/EXPERIMENT/PROFILE/COMMAND/plan.json   what extract, audit and baseline build have made: clean-ups spare it
      evaluations/MODEL/FINGERPRINT/              the evaluation of one model, laid out like a run
      toolchains/                                 prepared toolchains of MultiPL-E's languages

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

_LONGEST_LABEL = 80  # bytes of 255, beside which fingerprints and endings stand

# Folders below --root.
ARTIFACTS = "artifacts"
MODELS = "models"
RUNS = "runs"
EVALUATIONS = "evaluations"
TOOLCHAINS = "toolchains"
IN_USE = ".in-use"
"""What running processes use, for clean-ups."""

HASHES = ".hashes.json"
"""In the folder of models: the SHA-256 of the files of models and texts, by path and `stamp`."""

# Files and folders of a run or an evaluation.
RUN_FILE = "run.json"
PLAN_FILE = "plan.json"
SUITES_FILE = "suites.json"
RECORDS = "records"

# Files and folders of an artifact.
MANIFEST = "manifest.json"
MODEL_FOLDER = "model"
"""The checkpoint of an artifact that is a trained model."""


def safe_name(label: str) -> str:
    """A label as part of a file's name: hyphens for what no name should hold, and not longer than a name may be."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in label)
    return safe.encode()[:_LONGEST_LABEL].decode(errors="ignore")


def run_path(root: Path, experiment: str, profile: str, fingerprint: str) -> Path:
    """The folder of a run."""
    return root / RUNS / experiment / profile / fingerprint[:16]


def command_path(root: Path, experiment: str, profile: str, command: str) -> Path:
    """The folder of what a command other than a run has made of an experiment: a plan that lists its artifacts."""
    return root / RUNS / experiment / profile / command


def evaluation_path(root: Path, model: str, fingerprint: str) -> Path:
    """The folder of the evaluation of one model."""
    return root / EVALUATIONS / model / fingerprint[:16]


def root_of_run(folder: Path) -> Path:
    """The `--root` of a run's folder."""
    return folder.resolve().parents[3]


def root_of_evaluation(folder: Path) -> Path:
    """The `--root` of an evaluation's folder."""
    return folder.resolve().parents[2]


def run_files(root: Path, name: str = RUN_FILE) -> list[Path]:
    """The files of that name of all runs and evaluations below `--root`."""
    return [*(root / RUNS).glob(f"*/*/*/{name}"), *(root / EVALUATIONS).glob(f"*/*/{name}")]


def experiment_of(run_file: Path) -> str:
    """The experiment of a run, by the path of its file."""
    return run_file.parents[2].name


def place_of_artifact(path: Path) -> str:
    """The path of an artifact's folder relative to `--root`, as runs and records name it."""
    return path.relative_to(path.parents[2]).as_posix()
