"""`fusellm tables`, `report` and `experiment diff`: finished runs. No model is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.console import print_rows, print_table
from harness.cli.options import DEFAULT_ROOT, OUTPUT, FormatOption, NewestProfile, Root, TableFormat


def tables(
    names: Annotated[
        list[str] | None, typer.Argument(help="Experiments, paper/NAME for a published table, or all. Default: all.")
    ] = None,
    profile: NewestProfile = None,
    form: Annotated[
        TableFormat | None,
        typer.Option(
            "--format",
            "-f",
            help="Output format. Default: a table for the terminal; with --out, all formats.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    with_paper: Annotated[bool, typer.Option("--with-paper", help="Show the published values beside ours.")] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="Row that the others are compared with. Default: the reference of the experiment."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write the tables and their figures to.", rich_help_panel=OUTPUT)
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Print or write the tables of finished runs from their stored records; no model is touched."""
    from harness.reporting import export
    from harness.reporting.tables import tables as tables_of
    from results.formats import FORMATS, render_all

    tables = tables_of(root, names or [], profile, reference=reference, with_paper=with_paper)
    if out is not None:
        for path in export.write(tables, out, [form] if form else list(FORMATS)):
            typer.echo(path)
    elif form is not None:
        typer.echo(render_all(list(tables.by_name.values()), form), nl=False)
    else:
        for table in tables.by_name.values():
            print_table(table, None)
    for sentence in tables.absent:
        typer.echo(sentence, err=True)


def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...", help="Experiments (their newest runs) or folders of runs. Default: all experiments."
        ),
    ] = None,
    profile: NewestProfile = None,
    out: Annotated[Path, typer.Option(help="Folder to write report.html to.", rich_help_panel=OUTPUT)] = Path("report"),
    examples: Annotated[int, typer.Option(min=0, help="Examples of each task to include.")] = 30,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Write one HTML page about finished runs: tables, figures, examples, cost, provenance; no model is touched."""
    from harness.reporting import report

    typer.echo(str(report.report(root, names or [], profile, out, examples=examples)))


def experiment_diff(
    one: Annotated[str, typer.Argument(help="An experiment (its newest run) or the folder of a run.")],
    other: Annotated[str, typer.Argument(help="Another one.")],
    profile: Annotated[
        str | None, typer.Option(help="Profile of the runs that are given by name. Default: that of the newest run.")
    ] = None,
    form: FormatOption = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """In what two runs differ: configuration, models, texts, versions, seeds, command."""
    from harness.reporting import runs

    folders = [runs.run_folder(root, name, profile) for name in (one, other)]
    rows = runs.differences(*map(runs.open_run, folders))
    head = ["key", *("/".join(folder.resolve().parts[-3:]) for folder in folders)]
    print_rows(head, rows, form)
    if not rows:
        typer.echo("The two runs do not differ.", err=True)
