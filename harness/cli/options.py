"""The options that several commands share, with their help panels and what a shell completes for them."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from harness.config.schema import Config

Format = Literal["md", "csv", "json"]
TableFormat = Literal["md", "csv", "json", "latex", "html"]

CONFIGURATION = "Configuration"
COMPUTING = "Computing"
OUTPUT = "Output"
FILES = "Files"


def completed(kind: Literal["experiments", "profiles", "methods", "suites", "models"]) -> Callable[[str], list[str]]:
    """A function that gives a shell the names of a kind that begin with what has been typed. Imports nothing heavy."""

    def complete(incomplete: str) -> list[str]:
        from harness.config.shipped import names

        return [name for name in names(kind) if name.startswith(incomplete)]

    return complete


def complete_suites(incomplete: str) -> list[str]:
    """Names of suites, the last one of a list that is separated by commas."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in completed("suites")(last)]


def complete_tables(incomplete: str) -> list[str]:
    """Experiments, published tables and `all`."""
    from harness.config.shipped import ALL, names
    from results.paper_numbers import NAMES

    every = [*names("experiments"), *(f"paper/{name}" for name in NAMES), ALL]
    return [name for name in every if name.startswith(incomplete)]


def complete_rows(context: typer.Context, incomplete: str) -> list[str]:
    """The rows of the experiments that were typed before."""
    return [row for config in _typed(context) for row in config.methods if row.startswith(incomplete)]


def complete_rows_and_methods(context: typer.Context, incomplete: str) -> list[str]:
    """The rows of the experiment that was typed before, else of the quickstart, and the methods."""
    return list(dict.fromkeys([*complete_rows(context, incomplete), *completed("methods")(incomplete)]))


def complete_roles(context: typer.Context, incomplete: str) -> list[str]:
    """The roles of the experiment that was typed before."""
    return [role for config in _typed(context) for role in config.roles.by_name() if role.startswith(incomplete)]


def _typed(context: typer.Context) -> "Iterator[Config]":
    """The configurations of the experiments in the command line so far; those that do not hold are passed over."""
    from fusion.errors import UserError
    from harness.config.loading import load

    of = context.params.get("of")
    for name in [of] if of else context.args:  # what is positional is not parsed before the line is complete
        with contextlib.suppress(UserError):
            yield load(name, profile=context.params.get("profile"))


def _remember_json(context: typer.Context, value: bool) -> bool:
    context.meta["json"] = value
    return value


def _format(context: typer.Context, value: str | None) -> str | None:
    """The value of --format, which --json (processed before it, being eager) sets as well."""
    if not context.meta.get("json"):
        return value
    if value not in (None, "json"):
        raise typer.BadParameter(f"--json contradicts --format {value}: give one of them.")
    return "json"


_FORMAT = typer.Option(
    "--format",
    "-f",
    callback=_format,
    help="Output format. Default: for the terminal.",
    rich_help_panel=OUTPUT,
)
FormatOption = Annotated[Format | None, _FORMAT]
TableFormatOption = Annotated[TableFormat | None, _FORMAT]
DocumentFormatOption = Annotated[
    Literal["yaml", "json"] | None,
    typer.Option("--format", "-f", callback=_format, help="Output format. Default: yaml.", rich_help_panel=OUTPUT),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", is_eager=True, callback=_remember_json, help="Same as --format json.", rich_help_panel=OUTPUT
    ),
]
"""Commands take this option beside a format and do nothing with it: the callbacks have set the format already."""

DEFAULT_ROOT = Path("work")
Root = Annotated[
    Path,
    typer.Option(
        "--root",
        envvar="FUSELLM_ROOT",
        help="Folder of models, artifacts, runs and tables.",
        rich_help_panel=FILES,
    ),
]
Name = Annotated[
    str,
    typer.Argument(
        help="An experiment's name (see `experiment list`) or a YAML file.", autocompletion=completed("experiments")
    ),
]
Names = Annotated[
    list[str],
    typer.Argument(
        help="Names (see `experiment list`), YAML files, or all: every experiment of the profile.",
        autocompletion=completed("experiments"),
    ),
]
Profile = Annotated[
    str | None,
    typer.Option(
        help="Profile: tiny, small, paper or micro. Default: the first profile of the experiment.",
        autocompletion=completed("profiles"),
        rich_help_panel=CONFIGURATION,
    ),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One setting, as in training.learning_rate=1e-5. Repeatable.",
        rich_help_panel=CONFIGURATION,
    ),
]
Seeds = Annotated[
    list[int],
    typer.Option(
        "--seed",
        help="Seed of training. Repeatable. Default: the seeds of the configuration (0).",
        rich_help_panel=CONFIGURATION,
    ),
]
Run = Annotated[
    str,
    typer.Argument(
        help="An experiment (its newest run) or the folder of a run.", autocompletion=completed("experiments")
    ),
]
Runs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN]...",
        help="Experiments (their newest runs) or folders of runs. Default: all experiments.",
        autocompletion=completed("experiments"),
    ),
]
NewestProfile = Annotated[
    str | None,
    typer.Option(
        "--profile",
        help="Profile of a run that is given by the name of its experiment. Default: that of the newest run.",
        autocompletion=completed("profiles"),
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="ROW",
        help="Row that the others are compared with. Default: the reference of the experiment.",
        autocompletion=complete_rows,
    ),
]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--unsafe-no-sandbox",
        help="Run generated programs without bubblewrap: they may do whatever you may do.",
        rich_help_panel=COMPUTING,
    ),
]
