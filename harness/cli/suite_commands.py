"""`fusellm suite`, `eval` and `multipl-e`: what can be measured, measuring one model, executing generated programs."""

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from fusion.errors import UserError
from harness.cli.console import prepare, print_rows, print_table
from harness.cli.options import (
    COMPUTING,
    CONFIGURATION,
    DEFAULT_ROOT,
    FILES,
    FormatOption,
    Json,
    Root,
    Unsafe,
    complete_suites,
    completed,
)
from harness.runtime import distributed
from harness.store.files import make_folder
from harness.store.paths import TOOLCHAINS

_MULTIPL_E_PANEL = "MultiPL-E"

suites = typer.Typer(help="What models are measured on: list, show.", no_args_is_help=True)
multipl_e = typer.Typer(help="MultiPL-E: execute generated programs in the sandbox.", no_args_is_help=True)


@suites.command("list")
def suite_list(form: FormatOption = None, json: Json = False) -> None:
    """Every suite, those of installed packages included, with its tasks and where it is from."""
    from harness.evaluation.suite import SUITES

    rows = []
    for name in SUITES.names():
        try:
            kind = SUITES.get(name)
            summary, tasks = (kind.__doc__ or "").strip().partition("\n")[0], list(_tasks(name))
        except UserError as error:  # a package that cannot be imported hides no other suite
            summary, tasks = str(error), []
        rows.append([name, summary, tasks, SUITES.reference(name)])
    print_rows(["suite", "what it is", "tasks", "reference"], rows, form)


@suites.command("show")
def suite_show(
    name: Annotated[str, typer.Argument(help="A suite's name (see `suite list`).", autocompletion=completed("suites"))],
    form: FormatOption = None,
    json: Json = False,
) -> None:
    """What can be set of a suite: type or choices, default and meaning of each setting."""
    from baselines.listing import settings_of
    from harness.evaluation.suite import SUITES, suite_parameters

    kind = SUITES.get(name)
    rows: list[list[object]] = []
    standalone: dict[str, object] = getattr(kind, "standalone_config", lambda options: {})({})
    for setting in settings_of(suite_parameters(name)):
        default = setting.default
        if setting.name in standalone:
            default += f" (eval: {json_text.dumps(standalone[setting.name])})"
        rows.append([setting.name, setting.type, default, setting.description])
    print_rows(["setting", "type", "default", "what it is"], rows, form)
    if form is None:
        tasks = ", ".join(f"{task} ({metric})" for task, metric in _tasks(name).items())
        typer.echo(f"{(kind.__doc__ or '').strip()} Tasks and their metrics: {tasks or 'those that are asked for'}.")


def _tasks(name: str) -> dict[str, str]:
    """The tasks that a suite has when nothing is set, with the metric shown for each; none where they must be named."""
    from pydantic import ValidationError

    from harness.evaluation.suite import SUITES, suite_parameters

    try:
        return SUITES.get(name)(suite_parameters(name).model_validate({}), None).task_metrics()
    except ValidationError:
        return {}


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(help="Catalogue name, hub id, local folder or .gguf file.", autocompletion=completed("models")),
    ] = None,
    suites: Annotated[
        str,
        typer.Option(
            "--suite",
            metavar="NAME,...",
            help="Suites (see `suite list`), separated by commas.",
            autocompletion=complete_suites,
            rich_help_panel=CONFIGURATION,
        ),
    ] = "",
    tasks: Annotated[
        list[str],
        typer.Option(
            "--task", metavar="NAME", help="Only this task or language. Repeatable.", rich_help_panel=CONFIGURATION
        ),
    ] = [],  # noqa: B006
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Only the first N examples of each task.", rich_help_panel=CONFIGURATION),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Seed of sampled answers. Default: 0.", rich_help_panel=CONFIGURATION),
    ] = None,
    settings: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of a suite, as in suites.bbh.variant=zeroshot or bbh.variant=zeroshot, or data.root. "
            "Repeatable.",
            rich_help_panel=CONFIGURATION,
        ),
    ] = [],  # noqa: B006
    samples: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Completions of each problem. Default: 20.", rich_help_panel=_MULTIPL_E_PANEL
        ),
    ] = None,
    generate_only: Annotated[
        bool,
        typer.Option("--generate-only", help="Write completions and execute none.", rich_help_panel=_MULTIPL_E_PANEL),
    ] = False,
    execute: Annotated[
        Path | None,
        typer.Option(
            "--execute", help="Execute completions that were written before.", rich_help_panel=_MULTIPL_E_PANEL
        ),
    ] = None,
    unsafe: Unsafe = False,
    revision: Annotated[
        str | None,
        typer.Option(help="Hub revision. Default: that of the catalogue, else main.", rich_help_panel=COMPUTING),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Computing precision.", rich_help_panel=COMPUTING),
    ] = "auto",
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.", rich_help_panel=COMPUTING)
    ] = "auto",
    batch_size: Annotated[
        str | None, typer.Option(help="Answers generated at a time. Default: auto.", rich_help_panel=COMPUTING)
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            metavar="TOKEN",
            help="Token that precedes every document of perplexity: bos, eos or a token. Default: bos, else eos.",
            rich_help_panel=COMPUTING,
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code of the model's folder.", rich_help_panel=COMPUTING),
    ] = False,
    form: FormatOption = None,
    json: Json = False,
    data_root: Annotated[
        str | None,
        typer.Option(
            help="Folder of <hub id>/<configuration>/<split>.parquet (or .jsonl), or tiny: for a few example rows; as "
            "--set data.root=FOLDER. Default: the hub.",
            rich_help_panel=FILES,
        ),
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Measure one model on suites; what an earlier call finished is not computed again.

    Under torchrun all ranks make parts of it. The exit status is 1 where nothing could be measured.
    """
    if execute is not None:
        if not distributed.is_main_process():
            raise typer.Exit
        multipl_e_execute(execute, unsafe=unsafe, form=form, root=root)
        return
    if model is None or not suites:
        raise UserError("fusellm eval needs a model and --suite, or --execute with a file of completions.")
    names = [name.strip() for name in suites.split(",")]
    from harness.config.loading import suite_settings

    own, data = suite_settings(names, settings, data_root)
    prepare(root, device)
    from harness.evaluation import standalone
    from harness.models.resolution import ModelSpec
    from harness.runtime.device import usable_device

    common = {"limit": limit, "samples": samples, "seed": seed, "batch_size": batch_size}
    common |= {"execute": False if generate_only else None, "sandbox": False if unsafe else None}
    chosen = standalone.sections(names, tasks=tasks, common=common, settings=own, data_root=data)
    spec = ModelSpec(name=model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code, prefix=prefix)
    folder = standalone.evaluate(spec, chosen, root, device=usable_device(device, dry=False, one_gpu=True))
    if not distributed.is_main_process():
        return
    _print_evaluation(folder, standalone.generated(folder) if generate_only else [], form)


def _print_evaluation(folder: Path, completions: Sequence[str], form: str | None) -> None:
    """Write and print the tables of an evaluation, and lines about completions; exit with 1 if there is nothing."""
    from harness.reporting.export import write_run
    from harness.reporting.runs import open_run
    from results.formats import render_all

    run = open_run(folder)
    tables = [table for table in write_run(run).values() if table.columns or not completions]
    if form is not None:
        typer.echo(render_all(tables, form), nl=False)
    else:
        for table in tables:
            print_table(table, None)
    for line in completions:
        typer.echo(line)
    if form is None:
        typer.echo(f"Tables and records: {folder}", err=True)
    if run.records.empty and not completions:
        typer.echo("fusellm: nothing was measured: every task was left out, for the reasons above.", err=True)
        raise typer.Exit(1)


@multipl_e.command("execute")
def multipl_e_execute(
    generations: Annotated[Path, typer.Argument(help="JSON lines with the fields of MultiPL-E's own tools.")],
    out: Annotated[Path | None, typer.Option(help="File of results. Default: beside the generations.")] = None,
    k: Annotated[int, typer.Option(min=1, help="The k of pass@k.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Programs at a time. Default: as many as there are cores.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(min=1, help="Begin no program after so long. Default: no limit.")
    ] = None,
    unsafe: Unsafe = False,
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Execute completions in ten languages and print pass@k; a second start goes on from what is finished."""
    prepare(root)
    if out is not None:
        make_folder(out.parent, "--out")
    from harness.evaluation.multipl_e import execute, scores
    from harness.evaluation.multipl_e.generations import read_generations

    for problem in read_generations(generations):
        scores.check_samples(len(problem.programs), k)  # too few samples should not be found out at the end
    done = execute.execute(
        generations,
        out or execute.results_path(generations),
        cache=root / TOOLCHAINS,
        workers=workers,
        unsafe=unsafe,
        max_seconds=max_seconds,
    )
    rows = scores.summary(scores.read_results(done.results), done.not_run, k)
    print_rows([column.format(k=k) for column in scores.COLUMNS], rows, form)
    typer.echo(f"Results: {done.results}", err=True)
