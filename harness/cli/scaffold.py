"""`fusellm init`: a small package or file to start from, which works as it is written."""

import importlib.util
import keyword
import re
import sys
from pathlib import Path
from string import Template
from typing import Annotated, Literal

import typer

from fusion.errors import UserError
from harness.cli.options import OUTPUT
from harness.store.files import make_folder

TEMPLATES = Path(__file__).parent / "templates"
"""A folder a kind; in names of files NAME and MODULE stand for the name and for its form in Python."""
_NAME = re.compile(r"[a-z][a-z0-9]*([_-][a-z0-9]+)*")


def init(
    kind: Annotated[Literal["baseline", "suite", "experiment"], typer.Argument(help="What to write.")],
    name: Annotated[str, typer.Argument(help="Its name: small letters, digits, - and _.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder to write it to. Default: the current folder.", show_default=False, rich_help_panel=OUTPUT
        ),
    ] = Path(),
) -> None:
    """Write a package with a baseline or a suite of your own, or the YAML file of an experiment.

    It works as it is and says what to change. Nothing is overwritten.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} cannot name a {kind}: use small letters and digits, with - or _ between them.")
    module = name.replace("-", "_")
    if (known := module if kind != "experiment" else name) in _taken(kind):
        raise UserError(
            f"The name {known!r} is taken by another {kind} (see `fusellm {kind} list`): choose another name."
        )
    words = {"name": name, "module": module, "class": "".join(part.title() for part in module.split("_"))}
    files = {}
    for path in sorted((TEMPLATES / kind).rglob("*.template")):
        relative = path.relative_to(TEMPLATES / kind).as_posix().removesuffix(".template")
        files[out / relative.replace("NAME", name).replace("MODULE", module)] = path
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists already and is not overwritten: choose another name or --out.")
    if kind != "experiment" and (taken := _as_module(module)):
        raise UserError(f"{module} is {taken}, and a package of that name could not be imported: choose another name.")
    for file, path in files.items():
        make_folder(file.parent, "--out")
        file.write_text(Template(path.read_text(encoding="utf-8")).substitute(words), encoding="utf-8")
        typer.echo(str(file))


def _as_module(name: str) -> str | None:
    """What the name of a module means already; None where it is free."""
    if keyword.iskeyword(name):
        return "a word of Python's own"
    if name in sys.stdlib_module_names:
        return "a module of Python's standard library"
    return "the name of an installed package" if importlib.util.find_spec(name) else None


def _taken(kind: str) -> list[str]:
    """Names that the harness or an installed package uses already."""
    from harness.config.shipped import names

    if kind == "baseline":
        return names("methods")
    return names("suites") if kind == "suite" else names("experiments")
