"""The functions of the command line for scripts and notebooks; `harness` itself offers them under the same names.

    from harness import load, run, tables

    config = load("quickstart", profile="micro", overrides=["training.learning_rate=2e-3"])
    finished = run(config)
    tables(finished)["table"].to_frame()

A user's mistake raises `UserError` with the sentence that the command line would print. `root` is the folder of all
output; its default is the environment variable FUSELLM_ROOT, else `work`. Heavy libraries are imported when a function
needs them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness.config.loading import load
from harness.config.schema import Config
from harness.reporting.runs import Run
from harness.runtime import distributed

if TYPE_CHECKING:
    from harness.store.artifacts import Planned
    from results.table import Table

__all__ = ["Config", "Run", "evaluate", "load", "open_run", "plan", "report", "run", "tables"]

Folder = str | Path


def plan(config: Config, *, root: Folder | None = None, flops: float | None = None) -> "list[Planned]":
    """The artifacts that `run` would need, with the estimated disk (bytes), memory (bytes) and time (s) of each.

    Nothing is computed or written. flops: operations per second to plan for. Default: measured on this machine.
    """
    from harness.experiment.plan import plan as planned

    return planned(config, _root(root), flops=flops)


def run(config: Config, *, root: Folder | None = None) -> Run:
    """Computes what is missing of an experiment and returns the finished run, with its records.

    What exists below `root` already is reused, and an interrupted call is continued by the next one. When a row cannot
    be made, the others are finished and then `harness.experiment.run.IncompleteRun` (a UserError) is raised, whose
    `folder` can be opened.
    """
    from harness.experiment.run import run as run_experiment

    def release(*written: object) -> None:
        distributed.broadcast(0)

    folder = run_experiment(config, _root(root), show=release)
    if not distributed.is_main_process():
        release()  # waits until the first rank has written all
    return open_run(folder)


def evaluate(
    model: str,
    suites: Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    root: Folder | None = None,
    data_root: Folder | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust_remote_code: bool = False,
) -> Run:
    """Measures one model on suites and returns the finished run, with its records.

    model: a name of the catalogue, a hub id that was fetched, a local folder or a .gguf file. suites: names, or the
    settings of each by name, as in the `suites` section of an experiment. data_root: folder of
    <hub id>/<configuration>/<split>.parquet (or .jsonl). Default: the hub.
    """
    from harness.evaluation import standalone
    from harness.evaluation.suite import SUITES, suite_config
    from harness.models.resolution import ModelSpec
    from harness.runtime.device import usable_device

    settings: Mapping[str, Mapping[str, Any]] = suites if isinstance(suites, Mapping) else {name: {} for name in suites}
    folder = None if data_root is None else Path(data_root)
    measured = {name: SUITES.get(name)(suite_config(name, given), folder) for name, given in settings.items()}
    spec = ModelSpec(name=model, dtype=dtype, trust_remote_code=trust_remote_code)
    return open_run(standalone.evaluate(spec, measured, _root(root), device=usable_device(device, dry=False)))


def open_run(run: Folder, *, root: Folder | None = None, profile: str | None = None) -> Run:
    """A finished run: the one in a folder, or the newest of an experiment's name below `root`.

    Its record files are checked against their hashes. Raises UserError where there is none or where it is damaged.
    """
    from harness.reporting import runs

    return runs.open_run(runs.run_folder(_root(root), str(run), profile))


def tables(run: Run, *, reference: str | None = None, with_paper: bool = False) -> "dict[str, Table]":
    """The tables of a run by name: `table`, and `table-SUITE` for every suite that the first does not show.

    reference: the row that the others are compared with. Default: the experiment's. with_paper: the published values
    beside ours. A table has `to_frame()` and shows itself in a notebook.
    """
    from harness.reporting.tables import printed_tables

    return printed_tables(run, reference=reference, with_paper=with_paper)


def report(
    runs: Sequence[Folder] = (),
    *,
    out: Folder,
    root: Folder | None = None,
    profile: str | None = None,
    examples: int = 20,
) -> Path:
    """Writes one HTML page about runs and returns its path.

    runs: folders, or experiments' names for the newest run of each. Default: the newest run of every experiment.
    examples: how many examples of a task are shown.
    """
    from harness.reporting.report import report as write

    return write(_root(root), [str(one) for one in runs], profile, Path(out), examples=examples)


def _root(root: Folder | None) -> Path:
    return Path(root or os.environ.get("FUSELLM_ROOT") or "work")
