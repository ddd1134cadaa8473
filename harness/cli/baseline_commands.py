"""`fusellm baseline`: what FuseLLM is compared with. Heavy libraries are imported where they are used."""

from typing import Annotated

import typer

from fusion.errors import UnknownName
from harness.cli.console import prepare, print_rows
from harness.cli.options import (
    CONFIGURATION,
    DEFAULT_ROOT,
    FormatOption,
    Json,
    Profile,
    Root,
    Seeds,
    Settings,
    complete_rows_and_methods,
    completed,
)
from harness.runtime import distributed

baselines = typer.Typer(help="What FuseLLM is compared with: list, show and build methods.", no_args_is_help=True)


@baselines.command("list")
def baseline_list(form: FormatOption = None, json: Json = False) -> None:
    """Every method, those of installed packages included: what it needs, what can be set, where it is from."""
    from baselines.listing import describe_all

    rows = []
    between = "\n" if form is None else ", "  # in a terminal one below the other
    for method in describe_all():
        settings: object = [vars(setting) for setting in method.settings]
        if form != "json":
            settings = between.join(f"{one.name}: {one.type} = {one.default}" for one in method.settings)
        rows.append([method.name, method.refused or method.summary, list(method.needs), settings, method.reference])
    print_rows(["method", "what it is", "needs", "parameters", "reference"], rows, form)


@baselines.command("show")
def baseline_show(
    name: Annotated[
        str, typer.Argument(help="A method's name (see `baseline list`).", autocompletion=completed("methods"))
    ],
    form: FormatOption = None,
    json: Json = False,
) -> None:
    """The parameters of a method: choices, effective default and meaning of each."""
    from baselines.listing import describe

    method = describe(name)
    rows = [list(vars(setting).values()) for setting in method.settings]
    print_rows(["parameter", "type", "default", "what it is"], rows, form)
    if form is None:
        needs = ", ".join(method.needs) or "nothing more"
        typer.echo(f"{method.summary} Needs: {needs}. Reference: {method.reference or '-'}")


@baselines.command("build")
def baseline_build(
    name: Annotated[
        str,
        typer.Argument(
            help="A row of the experiment, or a method: all rows of it.", autocompletion=complete_rows_and_methods
        ),
    ],
    of: Annotated[
        str,
        typer.Option(
            "--experiment",
            help="An experiment's name or a YAML file.",
            autocompletion=completed("experiments"),
            rich_help_panel=CONFIGURATION,
        ),
    ] = "quickstart",
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Make the candidate of a method and print its folder; nothing is evaluated.

    Where the experiment has no row of the method, it is given one with the name of the method and its defaults.
    """
    from baselines.registry import METHODS
    from harness.config.loading import load

    own = name in METHODS.names() and not load(of, profile=profile).rows_of(name)
    added = [f"methods.{name}.method={name}"] if own else []
    config = load(of, profile=profile, overrides=[*added, *settings], seeds=seeds)
    labels = config.rows_of(name)
    if not labels:
        raise UnknownName(f"row of {of} or method", name, [*config.methods, *METHODS.names()])
    prepare(root, config.device)
    from harness.experiment.candidates import build

    built: list[list[object]] = []
    for row in build(config, labels, root):
        folders = [str(checkpoint.folder) for checkpoint in row.candidate.checkpoints]
        built += [[row.label, row.seed, folder] for folder in folders]
        if form is None and distributed.is_main_process():
            typer.echo(f"{row.label}{'' if row.seed is None else f' (seed {row.seed})'}: {', '.join(folders)}")
    if form is not None and distributed.is_main_process():
        print_rows(["row", "seed", "folder"], built, form)
