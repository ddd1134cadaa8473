"""A table from the records of a large run, by the command that a user types."""

import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.support.inputs import Inputs
from benchmarks.support.page import Result
from harness.config.loading import load
from harness.store.files import write_json
from harness.store.paths import RUN_FILE
from harness.store.run_files import record_hashes
from results.paper_layouts import BBH
from results.records import NO_SEED, Record, write

_SEEDS = 5
_GOAL = 2.0


def tables(_: Inputs, *, quick: bool) -> list[Result]:
    """`fusellm tables` on the records of table 1 with five seeds: made up, as many as BBH has."""
    examples = 20 if quick else 290
    config = load("table1", profile="small").model_dump(mode="json")
    drawn = random.Random(0)
    count = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "runs" / "table1" / "small" / "made-up"
        written = []
        for method, entry in config["methods"].items():
            for seed in (NO_SEED,) if entry["method"] == "as_is" else range(_SEEDS):
                records = [
                    Record("table1", "small", method, seed, part.suite, part.task, str(i), part.metric, score, 1.0)
                    for part in BBH.values()
                    for i in range(examples)
                    for score in [float(drawn.random() < 0.5)]
                ]
                count += len(records)
                written.append(f"{method}-{seed}.parquet")
                write(folder / "records" / written[-1], records, provenance={"evaluation": f"{method} {seed}"})
        write_json(
            folder / RUN_FILE, {"configuration": config, "records": record_hashes(folder, written), "finished": 1.0}
        )
        command = [sys.executable, "-c", "from harness.cli import main; main()", "tables", "table1", "--root", name]
        seconds = min(_seconds(command) for _ in range(3))
    note = f"The whole command, from {count:,} records: table 1, three rows as they are and two with {_SEEDS} seeds."
    return [Result("`fusellm tables`, 100,000 records", "s", seconds, _GOAL, note=note)]


def _seconds(command: Sequence[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started
