"""`fusellm baseline`: what FuseLLM is compared with. Heavy libraries are imported where they are used."""

from typing import Annotated

import typer

from fusion.errors import UserError, did_you_mean
from harness.cli.console import print_rows, quiet_libraries
from harness.cli.options import DEFAULT_ROOT, FormatOption, Profile, Root, Seeds, Settings
from harness.runtime import distributed

baselines = typer.Typer(help="What FuseLLM is compared with: list, show and build methods.", no_args_is_help=True)


@baselines.command("list")
def baseline_list(form: FormatOption = None) -> None:
    """Every method, those of installed packages included: what it needs, what can be set, where it is from."""
    from baselines.listing import describe_all

    rows = []
    between = "\n" if form is None else ", "  # in a terminal one below the other
    for one in describe_all():
        settings = between.join(f"{s.name}: {s.type} = {s.default}" for s in one.settings)
        rows.append([one.name, one.refused or one.summary, ", ".join(one.needs), settings, one.reference])
    print_rows(["method", "what it is", "needs", "parameters", "reference"], rows, form)


@baselines.command("show")
def baseline_show(
    name: Annotated[str, typer.Argument(help="A method's name (see `baseline list`).")], form: FormatOption = None
) -> None:
    """The parameters of a method."""
    from baselines.listing import describe

    one = describe(name)
    print_rows(["parameter", "type", "default", "what it is"], [list(vars(s).values()) for s in one.settings], form)
    if form is None:
        typer.echo(f"{one.summary} Needs: {', '.join(one.needs) or 'nothing more'}. Reference: {one.reference or '-'}")


@baselines.command("build")
def baseline_build(
    name: Annotated[str, typer.Argument(help="A row of the experiment, or a method: all rows of it.")],
    of: Annotated[str, typer.Option("--experiment", help="An experiment's name or a YAML file.")] = "quickstart",
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    root: Root = DEFAULT_ROOT,
) -> None:
    """Make the candidate of a method and print its folder; nothing is evaluated.

    Where the experiment has no row of the method, it is given one with the name of the method and its defaults.
    """
    from baselines.registry import METHODS
    from harness.config.loading import load, rows_of

    own = name in METHODS.names() and not rows_of(load(of, profile=profile), name)
    added = [f"methods.{name}.method={name}"] if own else []
    config = load(of, profile=profile, overrides=[*added, *settings], seeds=seeds)
    labels = rows_of(config, name)
    if not labels:
        known = [*config.methods, *METHODS.names()]
        raise UserError(
            f"{of} has no row and there is no method {name!r}{did_you_mean(name, known)}: there are {', '.join(known)}."
        )
    quiet_libraries()
    from harness.experiment.candidates import build

    for row in build(config, labels, root):
        if distributed.is_main_process():
            folders = ", ".join(str(one.folder) for one in row.candidate.checkpoints)
            typer.echo(f"{row.label}{'' if row.seed is None else f' (seed {row.seed})'}: {folders}")
