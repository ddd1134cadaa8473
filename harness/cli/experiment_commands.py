"""`fusellm experiment`, `quickstart`, `audit`, `extract`: configure and run experiments.

Heavy libraries are imported where they are used: `--help` must answer at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusion.errors import UnknownName, UserError
from harness.cli.console import prepare, print_document, print_plan, print_rows, print_table, quiet_libraries
from harness.cli.options import (
    CONFIGURATION,
    DEFAULT_ROOT,
    DocumentFormatOption,
    Format,
    FormatOption,
    Json,
    Name,
    Names,
    Profile,
    Root,
    Seeds,
    Settings,
    TableFormatOption,
    complete_roles,
    complete_rows,
    completed,
)
from harness.runtime import distributed
from harness.runtime.device import refuse_missing_device

if TYPE_CHECKING:
    from harness.config.schema import Config
    from harness.reporting.runs import Run
    from results.table import Table

experiments = typer.Typer(help="List, show, plan, run and compare experiments.", no_args_is_help=True)

Flops = Annotated[
    float | None,
    typer.Option(min=1, help="Operations a second to plan for. Default: measured on this machine."),
]


def quickstart(
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    form: TableFormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Run the main job on tiny models made on the spot: a few minutes on two cores, no network."""
    experiment_run(["quickstart"], profile="tiny", settings=settings, seeds=seeds, form=form, root=root)


@experiments.command("list")
def experiment_list(form: FormatOption = None, json: Json = False) -> None:
    """The experiments that ship with the harness and their profiles."""
    from harness.config.shipped import names, shipped

    rows = []
    for name in names("experiments"):
        experiment = shipped("experiments", name)
        rows.append([name, list(experiment.profiles), experiment.title])
    print_rows(["experiment", "profiles", "what it is"], rows, form)


@experiments.command("show")
def experiment_show(
    name: Name,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    form: DocumentFormatOption = None,
    json: Json = False,
) -> None:
    """Print the resolved configuration."""
    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings, seeds=seeds)
    print_document(config.model_dump(mode="json"), form)


@experiments.command("validate")
def experiment_validate(
    names: Names,
    profile: Annotated[
        str | None,
        typer.Option(
            help="Check them in this profile. Default: in each of their profiles.",
            autocompletion=completed("profiles"),
            rich_help_panel=CONFIGURATION,
        ),
    ] = None,
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    form: FormatOption = None,
    json: Json = False,
) -> None:
    """Name every mistake of experiments and YAML files, with file and line: keys, values, names, paths.

    The exit status is 2 if there is a mistake.
    """
    from harness.config.loading import validate
    from harness.config.shipped import choose_experiments

    problems = validate(choose_experiments(names, profile), profile, settings, seeds)
    n_problems = sum(map(len, problems.values()))
    if form is not None:
        rows = [
            [name, ".".join(problem.key), problem.place, problem.sentence]
            for name, of_name in problems.items()
            for problem in of_name
        ]
        print_rows(["experiment", "key", "place", "problem"], rows, form)
    for name, of_name in problems.items() if form is None else ():
        typer.echo(f"{name}: {len(of_name) or 'no'} error{'s' * (len(of_name) > 1)}")
        for problem in of_name:
            typer.echo(f"  {problem}")
    if n_problems:
        wrong = sum(map(bool, problems.values()))
        errors = "1 error" if n_problems == 1 else f"{n_problems} errors"
        raise UserError(f"{errors} in {wrong} of {len(problems)} experiment{'s' * (len(problems) != 1)}.")


@experiments.command("plan")
def experiment_plan(
    names: Names,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    flops: Flops = None,
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Print the stages of experiments, their state and what the missing ones cost; the same as `run --dry-run`."""
    _plan(_load(names, profile, settings, seeds), root, flops, form)


@experiments.command("run")
def experiment_run(
    names: Names,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="ROW",
            help="Row that the others are compared with, as --set reference=ROW. Default: that of the experiment.",
            autocompletion=complete_rows,
            rich_help_panel=CONFIGURATION,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the plan, as `experiment plan`.")] = False,
    flops: Flops = None,
    form: TableFormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Make what is missing and print the tables; a second start goes on where the first was interrupted.

    What several experiments have in common is made once, whether they are run together or one after the other.
    """
    overrides = [*settings, *([f"reference={reference}"] if reference else [])]
    configs = _load(names, profile, overrides, seeds)
    if dry_run:
        if form == "latex" or form == "html":
            raise UserError(f"A plan has no format {form}: choose md, csv or json.")
        _plan(configs, root, flops, form)
        return
    prepare(root, *(config.device for config in configs))
    tables: list[Table] = []
    incomplete: list[UserError] = []
    for config in configs:
        tables += _run(config, root, incomplete, quiet=form is not None)
    if form is not None and distributed.is_main_process():
        from results.formats import render_all

        typer.echo(render_all(tables, form), nl=False)
    if incomplete:
        raise UserError(" ".join(dict.fromkeys(map(str, incomplete))))


def _load(names: Sequence[str], profile: str | None, settings: Sequence[str], seeds: Sequence[int]) -> "list[Config]":
    from harness.config.loading import load
    from harness.config.shipped import choose_experiments

    return [load(name, profile=profile, overrides=settings, seeds=seeds) for name in choose_experiments(names, profile)]


def _plan(configs: "Sequence[Config]", root: Path, flops: float | None, form: Format | None) -> None:
    for config in configs:
        refuse_missing_device(config.device)
    quiet_libraries()
    from harness.experiment.plan import plan

    planned = {stage.spec.fingerprint: stage for config in configs for stage in plan(config, root, flops=flops)}
    if distributed.is_main_process():
        print_plan(list(planned.values()), root, form)


def _run(config: "Config", root: Path, incomplete: list[UserError], *, quiet: bool) -> "list[Table]":
    """Runs an experiment and gives its tables, which are printed for the terminal unless `quiet`.

    incomplete: takes the error of a run that has finished without some of its rows.
    """
    from harness.experiment.run import IncompleteRun, run
    from harness.reporting.export import equal_quality
    from harness.reporting.tables import summary

    shown: list[Table] = []

    def show(finished: "Run", tables: "Mapping[str, Table]") -> None:
        shown.extend(summary(finished, tables).values())
        for table in () if quiet else shown:
            print_table(table, None)
        for line in () if quiet else equal_quality(finished.folder):
            typer.echo(line)
        typer.echo(f"Table, figure and records: {finished.folder}", err=True)

    try:
        run(config, root, show=show)
    except IncompleteRun as error:
        incomplete.append(error)
    return shown


def schema() -> None:
    """Print the JSON schema of experiments' files, with which editors complete and check them.

    Methods and suites of installed packages are in it.
    """
    import json

    from harness.config.json_schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def audit(
    name: Name,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    passages: Annotated[
        int, typer.Option(min=1, metavar="N", help="Passages to measure, drawn by seed 0. Default: 2000.")
    ] = 2000,
    row: Annotated[
        str | None,
        typer.Option(
            help="Row of FuseLLM or distillation that is followed. Default: the first FuseLLM row.",
            autocompletion=complete_rows,
        ),
    ] = None,
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Show what the sources know more than the target, and what every step of the fusion leaves of it.

    Only the passages that are measured are extracted, by all ranks under torchrun.
    """
    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings)
    prepare(root, config.device)
    from harness.experiment import headroom as auditing

    if not distributed.is_main_process():
        auditing.contribute(config, root, passages, row)
        return
    result = auditing.audit(config, root, passages, row)
    shown = result.measures if form else result.measures[list(auditing.SHOWN)]
    print_rows(list(shown.columns), auditing.plain_rows(shown, None if form == "json" else 4), form)
    if form is None:
        typer.echo(result.sentence)
        typer.echo(f"Table and figure: {result.folder}", err=True)


def extract(
    name: Name,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    roles: Annotated[
        list[str],
        typer.Option(
            "--role",
            help="target or the name of a source. Repeatable. Default: all roles.",
            autocompletion=complete_roles,
        ),
    ] = [],  # noqa: B006
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Run the extraction stage alone: store every model's predictions on the training corpus.

    Start any number of workers on machines that share --root; they split the shards.
    """
    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings)
    known = list(config.roles.by_name())
    for role in roles:
        if role not in known:
            raise UnknownName("role", role, known)
    prepare(root, config.device)
    from harness.experiment.pipeline import TARGET, open_experiment, predict, start
    from harness.store.paths import command_path

    experiment = open_experiment(config, root)
    start(experiment)
    rows: list[list[object]] = []
    with experiment.workspace.store.in_use(command_path(root, config.experiment, config.profile, "extract")):
        for role in roles or [TARGET, *config.roles.sources]:
            folder = predict(experiment, role)[1]
            rows.append([role, str(folder)])
            if form is None:
                typer.echo(f"{role}: {folder}")
    if form is not None:
        print_rows(["role", "folder"], rows, form)
