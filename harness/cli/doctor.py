"""`fusellm doctor`: what this machine has, and what that means for a run."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fusion.errors import UserError
from harness.cli.console import prepare, print_rows
from harness.cli.options import DEFAULT_ROOT, FormatOption, Json, Root, completed
from harness.store.paths import ARTIFACTS, MODELS, SOURCE, TOOLCHAINS

_NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "numba")
_LATER = ("lm-eval", "mergekit", "deepspeed")
_NO_TESTS = 5  # pytest's exit status where nothing was selected

Row = tuple[str, str, bool | None]


def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="Also run the tests that need a CUDA device.")] = False,
    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="NAME",
            help="Also try whether this model reads text better after another prefix. Repeatable.",
            autocompletion=completed("models"),
        ),
    ] = [],  # noqa: B006
    form: FormatOption = None,
    json: Json = False,
    root: Root = DEFAULT_ROOT,
) -> None:
    """What this machine has and what that means for a run.

    Ends with exit status 2 if something that every run needs is missing, or if the sandbox does not hold.
    """
    prepare(root)
    rows, healthy = check(root, gpu=gpu, models=models)
    print_rows(["what", "found", "fine"], rows, form)
    if not healthy:
        raise UserError(
            "Something that every run needs is missing, or the sandbox does not hold: see the lines marked 'no'."
        )


def check(root: Path, *, gpu: bool, models: Sequence[str] = ()) -> tuple[list[Row], bool]:
    """Rows (what, found, fine; None: not needed) and whether everything that every run needs is there."""
    import psutil
    import torch

    from harness.runtime.device import compute_dtype

    rows: list[Row] = [("Python", sys.version.split()[0], sys.version_info >= (3, 11))]
    for name in (*_NEEDED, *_LATER):
        try:
            rows.append((name, importlib.metadata.version(name), True))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed", False if name in _NEEDED else None))
    rows.append(("CPU cores", str(os.cpu_count()), True))
    rows.append(("memory", f"{psutil.virtual_memory().total / 2**30:.1f} GiB", True))
    place = next(p for p in [root, *root.resolve().parents] if p.exists())
    rows.append((f"free disk at {place}", f"{shutil.disk_usage(place).free / 2**30:.1f} GiB", True))
    rows.append(("computing precision on the CPU", compute_dtype("auto", "cpu"), True))
    cuda = torch.cuda.is_available()
    rows.append(("CUDA devices", str(torch.cuda.device_count()) if cuda else "none", cuda or None))
    rows += _toolchains(root / TOOLCHAINS)
    rows += [_prefix(name, root) for name in models]
    if gpu:
        rows.append(_gpu_tests(cuda))
    return rows, not any(fine is False for *_, fine in rows)


def _toolchains(cache: Path) -> list[Row]:
    """The sandbox, what holds of it, and the toolchains as they are in it: a program of each language is run."""
    from harness.evaluation.multipl_e.languages import LANGUAGES
    from harness.evaluation.multipl_e.toolchains import available
    from harness.evaluation.sandbox import refusal
    from harness.evaluation.sandbox.guarantees import guarantees

    refused = refusal()
    rows: list[Row] = [("sandbox for generated programs", refused or "bubblewrap works", None if refused else True)]
    found, not_run = available(list(LANGUAGES), cache)
    if "python" in found:
        python = found["python"]
        try:
            tried = guarantees(python.run[0], python.roots)
            rows += [(f"sandbox: {what}", came, holds) for what, came, holds in tried]
        except UserError as error:
            rows.append(("sandbox: what holds", str(error), None))
    for name, language in LANGUAGES.items():
        rows.append(
            (
                f"MultiPL-E in {language.title}",
                not_run.get(name) or found[name].version,
                None if name in not_run else True,
            )
        )
    return rows


def _prefix(name: str, root: Path) -> Row:
    """Whether a model's prefix suits it, tried on documents of the standard library."""
    from harness.data.standard_library import standard_library
    from harness.models.resolution import ModelSpec, resolve
    from harness.runtime.device import compute_dtype, usable_device
    from harness.stages.prefix_check import TEXTS, prefix_warning
    from harness.store.artifacts import Store

    model, device = resolve(ModelSpec(name=name), root / MODELS), usable_device("auto", dry=False, one_gpu=True)
    documents = standard_library("tiny").documents()
    texts = [documents[i * len(documents) // TEXTS].text for i in range(TEXTS)]
    store, dtype = Store(root / ARTIFACTS), compute_dtype("auto", device)
    warning = prefix_warning(store, model, texts, dtype=dtype, device=device)
    return f"prefix of {name}", warning or "no other suits it better", None if warning else True


def _gpu_tests(cuda: bool) -> Row:
    name = "tests marked gpu"
    tests = SOURCE / "tests"
    if not cuda:
        return name, "no CUDA device to run them on", False
    if not tests.is_dir():
        return name, "the tests come with the source, not with the installed package", False
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(tests)], check=False, cwd=SOURCE)
    passed = done.returncode in (0, _NO_TESTS)
    return name, "passed" if passed else f"failed (pytest exit status {done.returncode})", passed
