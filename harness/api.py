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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fusion.errors import UserError
from harness.config.schema import Config
from harness.reporting import EXAMPLES
from harness.reporting.runs import Run
from harness.runtime import distributed
from harness.runtime.user_errors import sentence_about
from harness.store.files import make_folder

if TYPE_CHECKING:
    from harness.store.artifacts import Planned
    from results.table import Table

__all__ = ["Config", "Run", "evaluate", "load", "open_run", "plan", "report", "run", "tables"]

Folder = str | Path


@contextmanager
def _explaining() -> Iterator[None]:
    """Raises UserError with the sentence of the command line for whatever the user can correct."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = sentence_about(error)
        if sentence is None:
            raise
        raise UserError(sentence) from error


@_explaining()
def load(
    name: Folder,
    *,
    profile: str | None = None,
    overrides: str | Sequence[str] = (),
    seeds: int | Sequence[int] = (),
) -> Config:
    """The resolved configuration of an experiment's name or of a user's YAML file.

    overrides: settings as `--set` takes them ("training.learning_rate=1e-5"). Default of profile and seeds: those of
    the experiment. A `ConfigurationError` (a UserError) has every mistake in its `problems`.
    """
    from harness.config import loading

    seeds = [seeds] if isinstance(seeds, int) else seeds
    return loading.load(str(name), profile=profile, overrides=_listed(overrides), seeds=seeds)


@_explaining()
def plan(config: Config | Folder, *, root: Folder | None = None, flops: float | None = None) -> "list[Planned]":
    """The artifacts that `run` would need, with the estimated disk (bytes), memory (bytes) and time (s) of each.

    Nothing is computed or written. config: of `load`, or what `load` takes. flops: operations per second to plan for.
    Default: measured on this machine.
    """
    from harness.experiment.plan import plan as planned

    return planned(_loaded(config), _root(root), flops=flops)


@_explaining()
def run(config: Config | Folder, *, root: Folder | None = None) -> Run:
    """Computes what is missing of an experiment and returns the finished run, with its records.

    config: of `load`, or what `load` takes. What exists below `root` already is reused, and an interrupted call is
    continued by the next one. When a row cannot be made, the others are finished and then
    `harness.experiment.run.IncompleteRun` (a UserError) is raised, whose `folder` can be opened.
    """
    from harness.experiment.run import run as run_experiment

    finished: list[Run] = []

    def show(run: Run, tables: object) -> None:
        finished.append(run)
        distributed.broadcast(0)

    config = _loaded(config)
    make_folder(_root(root), "--root")
    folder = run_experiment(config, _root(root), show=show)
    if not finished:
        distributed.broadcast(0)  # waits until the first rank has written all
    return finished[0] if finished else open_run(folder)


@_explaining()
def evaluate(
    model: Folder,
    suites: str | Sequence[str] | Mapping[str, Mapping[str, Any]],
    *,
    root: Folder | None = None,
    data_root: Folder | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    trust_remote_code: bool = False,
    prefix: str | None = None,
) -> Run:
    """Measures one model on suites and returns the finished run, with its records.

    model: a name of the catalogue, a hub id that was fetched, a local folder or a .gguf file. suites: names, or the
    settings of each by name, as in the `suites` section of an experiment. data_root: folder of
    <hub id>/<configuration>/<split>.parquet (or .jsonl), or `tiny:` for a few example rows. Default: the hub. prefix:
    token that precedes every document of perplexity: bos, eos or a token. Default: bos, else eos.
    """
    from harness.config.loading import suite_settings
    from harness.evaluation import standalone
    from harness.evaluation.suite import SUITES, suite_config
    from harness.models.resolution import model_spec
    from harness.reporting.export import write_run
    from harness.runtime.device import usable_device

    settings = suites if isinstance(suites, Mapping) else {name: {} for name in _listed(suites)}
    _, folder = suite_settings(list(settings), (), None if data_root is None else str(data_root))
    measured = {name: SUITES.get(name)(suite_config(name, given), folder) for name, given in settings.items()}
    spec = model_spec(name=str(model), dtype=dtype, trust_remote_code=trust_remote_code, prefix=prefix)
    make_folder(_root(root), "--root")
    finished = open_run(
        standalone.evaluate(spec, measured, _root(root), device=usable_device(device, dry=False, one_gpu=True))
    )
    write_run(finished)
    return finished


@_explaining()
def open_run(run: Folder, *, root: Folder | None = None, profile: str | None = None) -> Run:
    """A finished run: the one in a folder, or the newest of an experiment's name below `root`.

    Its record files are checked against their hashes. Raises UserError where there is none or where it is damaged.
    """
    from harness.reporting import runs

    return runs.open_run(runs.resolve_run(_root(root), str(run), profile))


@_explaining()
def tables(
    run: Run | Folder, *, root: Folder | None = None, reference: str | None = None, with_paper: bool = False
) -> "dict[str, Table]":
    """The tables of a run by name: `table`, and `table-SUITE` for every suite that the first does not show.

    run: a finished run, or what `open_run` takes. reference: the row that the others are compared with. Default: the
    experiment's. with_paper: the published values beside ours. A table has `to_frame()` and shows itself in a notebook.
    """
    from harness.reporting.tables import printed_tables

    opened = run if isinstance(run, Run) else open_run(run, root=root)
    return printed_tables(opened, reference=reference, with_paper=with_paper)


@_explaining()
def report(
    runs: Run | Folder | Sequence[Run | Folder] = (),
    *,
    out: Folder,
    root: Folder | None = None,
    profile: str | None = None,
    reference: str | None = None,
    examples: int = EXAMPLES,
) -> Path:
    """Writes one HTML page about runs and returns its path.

    runs: finished ones, their folders, or experiments' names for the newest run of each. Default: the newest run of
    every experiment. reference: the row that the others are compared with. Default: that of each experiment. examples:
    how many examples of a task are shown.
    """
    from harness.reporting.report import report as write

    given = [runs] if isinstance(runs, Run | str | Path) else runs
    names = [str(one.folder if isinstance(one, Run) else one) for one in given]
    return write(_root(root), names, profile, Path(out), examples=examples, reference=reference)[0]


def _listed(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _loaded(config: Config | Folder) -> Config:
    return config if isinstance(config, Config) else load(config)


def _root(root: Folder | None) -> Path:
    return Path(root or os.environ.get("FUSELLM_ROOT") or "work")
