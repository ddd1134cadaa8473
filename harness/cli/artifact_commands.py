"""`fusellm artifact`: what has been made below `--root`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fusion.errors import UserError
from harness.cli.console import print_document, print_rows, size
from harness.cli.options import DEFAULT_ROOT, DocumentFormatOption, FormatOption, Json, Root
from harness.store.paths import ARTIFACTS

if TYPE_CHECKING:
    from harness.store.artifacts import Store

artifacts = typer.Typer(help="Artifacts below --root: list, show, verify, clean up.", no_args_is_help=True)


@artifacts.command("list")
def artifact_list(form: FormatOption = None, json: Json = False, root: Root = DEFAULT_ROOT) -> None:
    """Every complete artifact: kind, name, size, when it was made, how long that took and how much memory."""
    from harness.runtime.progress import duration
    from harness.store.artifacts import read_manifest

    rows: list[list[object]] = []
    for path in _store(root).artifacts():
        manifest = read_manifest(path)
        n_bytes = sum(file["bytes"] for file in manifest["files"].values())
        seconds, memory = manifest["duration_s"], manifest["peak_memory_bytes"]
        costs = [n_bytes, manifest["created"], seconds, memory]
        if form is None:
            costs = [size(n_bytes), manifest["created"], duration(seconds), size(memory)]
        rows.append([manifest["kind"], path.name, *costs])
    if form is None:
        print_rows(["kind", "artifact", "size", "made", "duration", "peak memory"], rows, form)
    else:
        print_rows(["kind", "artifact", "size (bytes)", "made", "duration (s)", "peak memory (bytes)"], rows, form)


@artifacts.command("show")
def artifact_show(
    name: Annotated[str, typer.Argument(help="The folder of an artifact, or its name in `artifact list`.")],
    form: DocumentFormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """The manifest of an artifact: what it was made of, by which command and versions, and its files."""
    from harness.store.artifacts import read_manifest

    folders = {path.name: path for path in _store(root).artifacts()}
    folder = folders.get(name, Path(name))
    if not folder.is_dir():
        raise UserError(f"There is no artifact {name!r} below {root}: see `fusellm artifact list`.")
    print_document({"folder": str(folder), **read_manifest(folder)}, form)


@artifacts.command("verify")
def artifact_verify(form: FormatOption = None, json: Json = False, root: Root = DEFAULT_ROOT) -> None:
    """Check every artifact's bytes against its manifest. Exit status 2 if one does not match."""
    store = _store(root)
    rows: list[list[object]] = []
    for path in store.artifacts():
        problem = None
        try:
            store.verify(path, anew=True)
        except UserError as error:
            problem = str(error)
            if form is None:
                typer.echo(problem, err=True)
        rows.append([path.parent.name, path.name, problem])
    if form is not None:
        print_rows(["kind", "artifact", "problem"], rows, form)
    if problems := [problem for *_, problem in rows if problem]:
        where = "see the lines above" if form is None else "see the column problem"
        raise UserError(f"{len(problems)} of {len(rows)} artifacts do not match their manifests: {where}.")
    if form is None:
        typer.echo(f"{len(rows)} artifacts match their manifests.")


@artifacts.command("gc")
def artifact_gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove them. Default: only list what would be removed.")] = False,
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Remove what nothing uses: artifacts, and leftovers of interrupted stages, that no run, evaluation, extraction,
    audit or built method lists and that no running command is using. To let go of what a run uses, remove its folder.
    """
    from harness.store import cleanup

    _store(root)
    state = "removed" if yes else "unused"
    folders = cleanup.unused(root, remove=yes)
    if form is not None:
        print_rows(["state", "folder", "size (bytes)"], [[state, str(path), n] for path, n in folders], form)
        return
    for path, n_bytes in folders:
        typer.echo(f"{state} {path} ({n_bytes:,} bytes)")
    total = sum(n_bytes for _, n_bytes in folders)
    freed = f"{total:,} bytes ({size(total)})"
    if not folders:
        typer.echo(f"Nothing to remove: every artifact below {root} is used by a run.")
    elif yes:
        typer.echo(f"{freed} in {len(folders)} folders are freed.")
    else:
        typer.echo(f"--yes removes these {len(folders)} folders and frees {freed}.")


def _store(root: Path) -> "Store":
    from harness.store.artifacts import Store

    if not root.is_dir():  # a misspelt one would look like an empty one
        raise UserError(f"There is no folder {root}: give the --root that a run was given.")
    return Store(root / ARTIFACTS)
