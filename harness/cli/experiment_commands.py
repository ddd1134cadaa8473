"""`fusellm experiment`, `quickstart`, `audit`, `extract`: configure and run experiments.

Heavy libraries are imported where they are used: `--help` must answer at once.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from harness.cli.console import print_plan, print_rows, print_table, quiet_libraries
from harness.cli.options import DEFAULT_ROOT, FormatOption, Name, Profile, Root, Seeds, Settings
from harness.runtime import distributed

experiments = typer.Typer(help="List, show and run experiments.", no_args_is_help=True)


def quickstart(root: Root = DEFAULT_ROOT, settings: Settings = [], seeds: Seeds = []) -> None:  # noqa: B006
    """Run the main job on tiny models made on the spot: a few minutes on two cores, no network."""
    experiment_run(["quickstart"], profile="tiny", settings=settings, seeds=seeds, root=root)


@experiments.command("list")
def experiment_list(form: FormatOption = None) -> None:
    """The experiments that ship with the harness and their profiles."""
    import yaml

    from harness.config.loading import names
    from harness.store.paths import PRESETS

    rows = []
    for name in names("experiments"):
        raw = yaml.safe_load((PRESETS / "experiments" / f"{name}.yaml").read_text(encoding="utf-8"))
        rows.append([name, ", ".join(raw["profiles"]), raw["title"]])
    print_rows(["experiment", "profiles", "what it is"], rows, form)


@experiments.command("show")
def experiment_show(name: Name, profile: Profile = None, settings: Settings = [], seeds: Seeds = []) -> None:  # noqa: B006
    """Print the resolved configuration as YAML."""
    import yaml

    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings, seeds=seeds)
    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


@experiments.command("run")
def experiment_run(
    names: Annotated[
        list[str],
        typer.Argument(help="Names (see `experiment list`), YAML files, or all: every experiment of the profile."),
    ],
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print stages, their state and their costs.")] = False,
    flops: Annotated[
        float | None,
        typer.Option(min=1, help="--dry-run: operations a second to plan for. Default: as measured on this machine."),
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Make what is missing and print the tables; a second start goes on where the first was interrupted.

    What several experiments have in common is made once, whether they are run together or one after the other.
    """
    from harness.config.loading import chosen, load

    configs = [load(one, profile=profile, overrides=settings, seeds=seeds) for one in chosen(names, profile)]
    quiet_libraries()
    if dry_run:
        from harness.experiment.plan import plan

        planned = {p.spec.fingerprint: p for config in configs for p in plan(config, root, flops=flops)}
        if distributed.is_main_process():
            print_plan(list(planned.values()), root)
        return
    for config in configs:
        _run(config, root)


def _run(config: Any, root: Path) -> None:
    from harness.experiment import run
    from harness.reporting.export import equal_quality
    from harness.reporting.runs import open_run
    from harness.reporting.tables import printed_tables

    folder = run.run(config, root)
    if not distributed.is_main_process():
        return
    for table in printed_tables(open_run(folder)).values():
        print_table(table, None)
    for line in equal_quality(folder):
        typer.echo(line)
    typer.echo(f"Table, figure and records: {folder}", err=True)


def audit(
    name: Name,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    form: FormatOption = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Before anyone pays for training: is there something to learn from the sources?"""
    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings)
    quiet_libraries()
    from harness.experiment import headroom as auditing

    found = auditing.audit(config, root)
    print_rows(list(found.measures.columns), found.measures.values.tolist(), form)
    if form is None:
        typer.echo(found.sentence)
        typer.echo(f"Table and figure: {found.folder}", err=True)


def extract(
    name: Name,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    roles: Annotated[
        list[str], typer.Option("--role", help="target or the name of a source. Repeatable. Default: all roles.")
    ] = [],  # noqa: B006
    root: Root = DEFAULT_ROOT,
) -> None:
    """Only read the training corpus; start it as often as you like, on all machines that share --root."""
    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings)
    quiet_libraries()
    from harness.experiment.pipeline import TARGET, open_experiment, predict, start

    experiment = open_experiment(config, root)
    start(experiment)
    for role in roles or [TARGET, *config.roles.sources]:
        typer.echo(f"{role}: {predict(experiment, role)[1]}")
