"""`fusellm artifact`: what has been made below `--root`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion.errors import UserError
from harness.cli.console import print_rows
from harness.cli.options import DEFAULT_ROOT, FormatOption, Root
from harness.store.paths import ARTIFACTS

artifacts = typer.Typer(help="Artifacts below --root: list, verify, clean up.", no_args_is_help=True)


@artifacts.command("list")
def artifact_list(form: FormatOption = None, root: Root = DEFAULT_ROOT) -> None:
    """Every complete artifact: kind, name, size, when it was made, how long that took and how much memory."""
    from harness.store.artifacts import read_manifest

    rows: list[list[object]] = []
    for path in _store(root).artifacts():
        m = read_manifest(path)
        size = sum(f["bytes"] for f in m["files"].values())
        rows.append([m["kind"], path.name, size, m["created"], m["duration_s"], m["peak_memory_bytes"]])
    print_rows(["kind", "artifact", "size (bytes)", "made", "duration (s)", "peak memory (bytes)"], rows, form)


@artifacts.command("verify")
def artifact_verify(root: Root = DEFAULT_ROOT) -> None:
    """Check every artifact's bytes against its manifest."""
    store = _store(root)
    bad = []
    count = 0
    for path in store.artifacts():
        count += 1
        try:
            store.verify(path)
        except UserError as error:
            bad.append(str(error))
            typer.echo(str(error), err=True)
    if bad:
        raise UserError(f"{len(bad)} of {count} artifacts do not match their manifests: see the lines above.")
    typer.echo(f"{count} artifacts match their manifests.")


@artifacts.command("gc")
def artifact_gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove them. Default: only list what would be removed.")] = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Remove leftovers of interrupted stages and artifacts that no finished run uses."""
    from harness.store import cleanup

    _store(root)
    for path, size in cleanup.unused(root):
        typer.echo(f"{'removed' if yes else 'unused'} {path} ({size:,} bytes)")
        if yes:
            cleanup.remove(root, path)


def _store(root: Path) -> Any:
    from harness.store.artifacts import Store

    if not root.is_dir():  # a misspelt one would look like an empty one
        raise UserError(f"There is no folder {root}: give the --root that a run was given.")
    return Store(root / ARTIFACTS)
