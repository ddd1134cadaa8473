"""The commands about finished runs: tables, the report, and in what two runs differ. No model is touched."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.cli.console import DEFAULT_ROOT, FormatOption, Root, print_rows, print_table

NewestProfile = Annotated[str | None, typer.Option("--profile", help="The profile; that of the newest run without.")]


def tables(
    names: Annotated[
        list[str] | None, typer.Argument(help="Experiments, paper/NAME for published tables, or all (as without any).")
    ] = None,
    profile: NewestProfile = None,
    form: Annotated[
        Literal["md", "csv", "json", "latex", "html"] | None,
        typer.Option("--format", help="For the terminal without; with --out every one of them."),
    ] = None,
    with_paper: Annotated[bool, typer.Option("--with-paper", help="The published values beside ours.")] = False,
    reference: Annotated[
        str | None, typer.Option(help="The row that the others are tested against; the experiment's without.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write the tables and their figures to.")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Print or write the tables of finished runs from their stored records; no model is touched."""
    from harness.reporting import runs
    from results.formats import FORMATS, render_all

    found = runs.tables(root, names or [], profile, reference=reference, with_paper=with_paper)
    if out is not None:
        for path in runs.write(found, out, [form] if form else list(FORMATS)):
            typer.echo(path)
    elif form is not None:
        typer.echo(render_all(list(found.made.values()), form), nl=False)
    else:
        for table in found.made.values():
            print_table(table, None)
    for sentence in found.absent:
        typer.echo(sentence, err=True)


def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Experiments (their newest runs) or runs' folders; all without."),
    ] = None,
    profile: NewestProfile = None,
    out: Annotated[Path, typer.Option(help="Folder to write report.html to.")] = Path("report"),
    examples: Annotated[int, typer.Option(min=0, help="Examples of a task that are kept for reading.")] = 30,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Write one HTML page about finished runs: tables, figures, examples, cost, provenance; no model is touched."""
    from harness.reporting import report

    typer.echo(str(report.report(root, names or [], profile, out, examples=examples)))


def experiment_diff(
    one: Annotated[str, typer.Argument(help="An experiment (its newest run) or a run's folder.")],
    other: Annotated[str, typer.Argument(help="Another one.")],
    profile: Annotated[str | None, typer.Option(help="Of the runs that are given by name.")] = None,
    form: FormatOption = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """In what two runs differ: configuration, models, texts, versions, seeds, command."""
    from harness.reporting import runs

    folders = [runs.run_folder(root, name, profile) for name in (one, other)]
    rows = runs.differences(*folders)
    head = ["key", *("/".join(folder.resolve().parts[-3:]) for folder in folders)]
    print_rows(head, rows, form)
    if not rows:
        typer.echo("The two runs do not differ.", err=True)
