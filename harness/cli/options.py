"""The options that several commands share, with their help panels."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Format = Literal["md", "csv", "json"]
TableFormat = Literal["md", "csv", "json", "latex", "html"]

CONFIGURATION = "Configuration"
OUTPUT = "Output"
COMPUTING = "Computing"
FILES = "Files"

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
Name = Annotated[str, typer.Argument(help="An experiment's name (see `experiment list`) or a YAML file.")]
Profile = Annotated[
    str | None,
    typer.Option(
        help="Profile: tiny, small, paper or micro. Default: the first profile of the experiment.",
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
NewestProfile = Annotated[
    str | None,
    typer.Option("--profile", help="Profile of the run. Default: that of the newest run.", rich_help_panel="Runs"),
]
FormatOption = Annotated[
    Format | None,
    typer.Option("--format", "-f", help="Output format. Default: a table for the terminal.", rich_help_panel=OUTPUT),
]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--unsafe-no-sandbox",
        help="Run generated programs without bubblewrap: they may do whatever you may do.",
        rich_help_panel=COMPUTING,
    ),
]
