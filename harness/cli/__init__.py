"""The command line. Heavy libraries are imported where they are used: `--help` must answer at once."""

import os
import signal
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fusion.errors import UserError
from harness.cli import (
    artifact_commands,
    baseline_commands,
    doctor,
    experiment_commands,
    model_commands,
    run_commands,
    scaffold,
    suite_commands,
)
from harness.cli.console import open_streams
from harness.runtime import distributed
from harness.runtime.user_errors import sentence_about
from harness.store import provenance

EXPERIMENTS, RESULTS, PARTS, OWN, MACHINE = "Experiments", "Results", "Parts", "Your own parts", "This machine"


class _Ordered(TyperGroup):
    """Commands in the order in which a newcomer needs them, groups among them."""

    ORDER = (
        "quickstart",
        "experiment",
        "audit",
        "extract",
        "eval",
        "tables",
        "report",
        "run",
        "baseline",
        "suite",
        "model",
        "artifact",
        "multipl-e",
        "init",
        "schema",
        "doctor",
    )

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.ORDER.index)


app = typer.Typer(
    name="fusellm",
    cls=_Ordered,
    help="Compare knowledge fusion of language models (FuseLLM) with its alternatives.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command(rich_help_panel=EXPERIMENTS)(experiment_commands.quickstart)
app.add_typer(experiment_commands.experiments, name="experiment", rich_help_panel=EXPERIMENTS)
app.command(rich_help_panel=EXPERIMENTS)(experiment_commands.audit)
app.command(rich_help_panel=EXPERIMENTS)(experiment_commands.extract)
app.command("eval", rich_help_panel=EXPERIMENTS)(suite_commands.evaluate)
app.command(rich_help_panel=RESULTS)(run_commands.tables)
app.command(rich_help_panel=RESULTS)(run_commands.report)
app.add_typer(run_commands.runs, name="run", rich_help_panel=RESULTS)
app.add_typer(baseline_commands.baselines, name="baseline", rich_help_panel=PARTS)
app.add_typer(suite_commands.suites, name="suite", rich_help_panel=PARTS)
app.add_typer(model_commands.models, name="model", rich_help_panel=PARTS)
app.add_typer(artifact_commands.artifacts, name="artifact", rich_help_panel=PARTS)
app.add_typer(suite_commands.multipl_e, name="multipl-e", rich_help_panel=PARTS)
app.command(rich_help_panel=OWN)(scaffold.init)
app.command(rich_help_panel=OWN)(experiment_commands.schema)
app.command(rich_help_panel=MACHINE)(doctor.doctor)
experiment_commands.experiments.command("diff")(run_commands.experiment_diff)


def _print_version(value: bool) -> None:
    if value:
        versions = provenance.versions()
        names = ("python", "torch", "transformers")
        libraries = ", ".join(f"{name} {versions.get(name, 'not installed')}" for name in names)
        commit = provenance.commit()
        at = f" (commit {commit})" if commit else ""
        typer.echo(f"{provenance.DISTRIBUTION} {versions[provenance.DISTRIBUTION]}{at}, {libraries}")
        raise typer.Exit


@app.callback()
def _global(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_version,
            help="Show the versions of the harness, Python, torch and transformers, and exit.",
        ),
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = 0,
) -> None:
    # The deepspeed launcher adds --local_rank to every command; the environment says it, too.
    if debug:
        os.environ["FUSELLM_DEBUG"] = "1"
    if distributed.world_size() > 1 and context.invoked_subcommand not in (
        "experiment",
        "baseline",
        "quickstart",
        "extract",
        "audit",
        "eval",
    ):
        raise UserError(f"fusellm {context.invoked_subcommand} is one process: start it without torchrun or deepspeed.")


def main() -> None:
    """The console command: a mistake of the user's is one sentence and exit status 2, a signal's end is one, too."""
    open_streams()
    stopped_by = 0

    def stop(number: int, frame: Any) -> None:
        nonlocal stopped_by
        if number != signal.SIGALRM:
            stopped_by = number
        raise KeyboardInterrupt

    def ignored(unraisable: Any) -> None:
        # Raised in a callback of the garbage collector it stops nothing: once more, when that is over.
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            hook(unraisable)

    # A batch system's signal cleans up as Ctrl-C does.
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        try:
            status = app(prog_name="fusellm", standalone_mode=False)
        except Exception as error:
            status = 0 if stopped_by else _explain(error)  # its loader workers may have got the signal first
        if stopped_by:
            word = "interrupted" if stopped_by == signal.SIGINT else "terminated"
            # A launcher terminates the ranks that are left when one has failed, which has said why.
            if distributed.world_size() == 1 or (distributed.is_main_process() and stopped_by == signal.SIGINT):
                typer.echo(f"fusellm: {word}; the same command goes on from here.", err=True)
            status = 128 + stopped_by
        sys.exit(status)
    finally:
        sys.unraisablehook = hook
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(error: Exception) -> int:
    """Says in one sentence what the user can mend and gives the exit status; raises what is our own mistake."""
    if isinstance(error, typer.TyperException):
        if message := " ".join(error.format_message().split()).replace(
            "Value error, ", ""
        ):  # empty: the help was printed
            context = getattr(error, "ctx", None)
            hint = f" (see `{context.command_path} --help`)" if context else ""
            typer.echo(f"fusellm: {message.rstrip('.')}{hint}.", err=True)
        return 2
    sentence = sentence_about(error)
    distributed.report_root_cause(sentence is not None)
    if os.environ.get("FUSELLM_DEBUG") or sentence is None:
        raise error
    typer.echo(f"fusellm: {sentence}", err=True)
    return 2
