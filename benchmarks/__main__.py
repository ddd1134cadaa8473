"""Measures, and writes the page."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # As in `harness`: `python -m` puts the current folder first.
    sys.path[0] = __file__[: -len("/benchmarks/__main__.py")]

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import models, store, tables, tokens
from benchmarks.support import machine
from benchmarks.support.inputs import Inputs
from benchmarks.support.page import Result, page
from fusion.errors import UserError
from harness.config.loading import load
from harness.experiment.pipeline import TARGET, open_experiment
from harness.runtime.memory import retain_heap
from harness.runtime.progress import notify
from harness.store.paths import MODELS

WITHOUT_MODELS = {
    "maps": tokens.maps,
    "alignments": tokens.alignments,
    "fusing": tokens.fusing,
    "store": store.store,
    "tables": tables.tables,
    "objective": models.objective,
}
WITH_MODELS = {"training": models.training, "extraction": models.extraction}
NAMES = (*WITHOUT_MODELS, *WITH_MODELS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmarks asked for; exit status 1 where a goal is missed, 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true", help="small sizes, to try: the figures mean nothing")
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="reference inputs (default: ../shared)")
    parser.add_argument("--root", type=Path, default=Path("work"), help="folder that holds models/ (default: work)")
    parser.add_argument("--experiment", default="main", help="whose models train and extract (default: main, small)")
    parser.add_argument("--output", type=Path, help="file for the page (default: standard output)")
    options = parser.parse_args(arguments)
    retain_heap()  # as a run on a CPU does
    try:
        facts = machine.facts()
        results, skipped = measure(options)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    text = page(results, skipped, facts, quick=options.quick)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0 if options.quick or all(result.met() for result in results) else 1


def measure(options: argparse.Namespace) -> tuple[list[Result], list[str]]:
    """The results, and what was left out and why."""
    inputs = Inputs(options.shared)
    results: list[Result] = []
    for name, bench in WITHOUT_MODELS.items():
        if name in options.only:
            notify(f"benchmark: {name}")
            results += bench(inputs, quick=options.quick)
    chosen = [name for name in WITH_MODELS if name in options.only]
    if not chosen:
        return results, []
    with tempfile.TemporaryDirectory() as scratch:
        max_bytes = 4_000 if options.quick else 16_000
        settings = [f"data.root={options.shared / 'data/hub'}", f"corpus.max_bytes={max_bytes}", "device=cpu"]
        (options.root / MODELS).mkdir(parents=True, exist_ok=True)
        (Path(scratch) / MODELS).symlink_to((options.root / MODELS).absolute())
        experiment = open_experiment(load(options.experiment, overrides=settings), Path(scratch))
        try:
            for role in (TARGET, *experiment.config.roles.sources):
                experiment.models.model(role)
        except UserError as error:
            return results, [f"{' and '.join(chosen)}: {error}"]
        prepared = models.prepare(experiment)
        for name in chosen:
            notify(f"benchmark: {name}")
            results += WITH_MODELS[name](prepared, quick=options.quick)
    return results, []


if __name__ == "__main__":
    sys.exit(main())
