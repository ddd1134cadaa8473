"""`fusellm run`, `tables`, `report` and `experiment diff`: finished runs. No model is loaded."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.console import print_document, print_rows, print_table
from harness.cli.options import (
    DEFAULT_ROOT,
    OUTPUT,
    DocumentFormatOption,
    FormatOption,
    Json,
    NewestProfile,
    Reference,
    Root,
    Run,
    Runs,
    TableFormatOption,
    complete_tables,
    completed,
)
from harness.reporting import EXAMPLES

runs = typer.Typer(help="Finished runs: list, show.", no_args_is_help=True)


@runs.command("list")
def run_list(
    profile: Annotated[
        str | None, typer.Option(help="Only runs of this profile. Default: all.", autocompletion=completed("profiles"))
    ] = None,
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Finished runs and evaluations, the newest first, with the folder that `tables` and `report` take."""
    from harness.reporting.runs import finished_runs

    rows = [
        [
            description["configuration"]["experiment"],
            description["configuration"]["profile"],
            datetime.fromtimestamp(description["finished"], UTC).isoformat(timespec="seconds"),
            list(description["configuration"]["methods"]),
            str(folder),
        ]
        for folder, description in finished_runs(root, profile)
    ]
    print_rows(["experiment", "profile", "finished", "rows", "folder"], rows, form)
    if not rows:
        typer.echo(f"There are no finished runs below {root}.", err=True)


@runs.command("show")
def run_show(
    run: Run,
    profile: NewestProfile = None,
    form: DocumentFormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """What a run wrote about itself: configuration, command, commit, versions, artifacts, files of records."""
    from harness.reporting.runs import open_run, resolve_run

    opened = open_run(resolve_run(root, run, profile))
    print_document({"folder": str(opened.folder), **opened.description}, form)


def tables(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN]...",
            help="Experiments (their newest runs), folders of runs, paper/NAME for a published table, or all. "
            "Default: all.",
            autocompletion=complete_tables,
        ),
    ] = None,
    profile: NewestProfile = None,
    reference: Reference = None,
    with_paper: Annotated[bool, typer.Option("--with-paper", help="Show the published values beside ours.")] = False,
    form: TableFormatOption = None,
    json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write the tables and their figures to, in every format or that of --format.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Print or write the tables of finished runs from their stored records."""
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
    names: Runs = None,
    profile: NewestProfile = None,
    reference: Reference = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples of each task to include.")] = EXAMPLES,
    out: Annotated[Path, typer.Option(help="Folder to write report.html to.", rich_help_panel=OUTPUT)] = Path("report"),
    json: Annotated[
        bool, typer.Option("--json", help="Print the page and the runs on it as JSON.", rich_help_panel=OUTPUT)
    ] = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Write one HTML page about finished runs: tables, figures, examples, cost, provenance."""
    from harness.reporting import report

    page, on_it = report.report(root, names or [], profile, out, examples=examples, reference=reference)
    if json:
        print_document({"report": str(page), "runs": [str(folder) for folder in on_it]}, "json")
    else:
        typer.echo(str(page))


def experiment_diff(
    one: Run,
    other: Annotated[str, typer.Argument(help="Another one.", autocompletion=completed("experiments"))],
    numbers: Annotated[
        bool, typer.Option("--numbers", help="Compare the numbers of their tables instead of what they were made with.")
    ] = False,
    profile: NewestProfile = None,
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """In what two runs differ: configuration, models, texts, versions, seeds, command; or numbers of their tables."""
    from harness.reporting.runs import differences, open_run, resolve_run
    from harness.reporting.tables import number_differences

    pair = [open_run(resolve_run(root, name, profile)) for name in (one, other)]
    labels = ["/".join(run.folder.resolve().parts[-3:]) for run in pair]
    if numbers:
        rows: list[list[object]] = [list(row) for row in number_differences(*pair)]
        if form is None:
            rows = [[round(value, 6) if isinstance(value, float) else value for value in row] for row in rows]
        print_rows(["table", "row", "column", *labels, "difference"], rows, form)
    else:
        rows = [list(row) for row in differences(*pair)]
        print_rows(["key", *labels], rows, form)
    if not rows:
        typer.echo(f"The {'tables of the ' if numbers else ''}two runs do not differ.", err=True)
