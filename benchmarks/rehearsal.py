"""The paper's run rehearsed: every table of the profile `rehearsal` by two ranks under ZeRO-2, killed twice on the way.

The run is started by torchrun. While it extracts all of its processes are killed, as by a machine that goes down; while
it trains one rank is killed, as by a driver that fails. It is started again after each. Then it is audited, its tables
and its report are written, every value of a table is computed a second time from the stored records, and the finished
run is started once more, which must make nothing. Writes a page about it.

    python -m benchmarks.rehearsal --root work/rehearsal --output docs/results/rehearsal/README.md
"""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import pandas as pd
import psutil

from benchmarks.support import machine
from results.paper_numbers import AVERAGE
from results.records import read

PROFILE = ["--profile", "rehearsal"]
_POLL = 0.2  # seconds between two looks at the log
_PAPERS_NAMES = {"py": "python", "lambada": "lambada_openai"}  # of tasks in tables
_TOLERANCE = 1e-9  # of a table's value, relative


@dataclass
class Step:
    """One command of the rehearsal and what became of it."""

    name: str
    command: Sequence[str]
    seconds: float
    status: int
    expected: bool
    """Whether it ended as it should."""
    made: int
    """Artifacts that it completed."""


@dataclass
class Rehearsal:
    """Runs commands one after the other, each with a log of its own below `root`."""

    root: Path
    ranks: int
    names: Sequence[str]
    settings: Sequence[str]
    steps: list[Step] = field(default_factory=list)

    def fusellm(self, name: str, *arguments: str) -> Step:
        """Runs the command in one process."""
        return self._run(name, ["fusellm", *arguments, "--root", str(self.root)], None)

    def run(self, name: str, kill: "Kill | None" = None) -> Step:
        """Runs the experiments by torchrun, and kills it there if asked to."""
        launcher = ["torchrun", "--standalone", "--no-python", "--nproc_per_node", str(self.ranks)]
        command = ["fusellm", "experiment", "run", *self.names, *PROFILE, *self.settings, "--root", str(self.root)]
        return self._run(name, [*launcher, *command], kill)

    def _run(self, name: str, command: Sequence[str], kill: "Kill | None") -> Step:
        log = self.root / "logs" / f"{len(self.steps) + 1:02d}-{'-'.join(re.findall('[a-z]+', name))}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        print(f"{name}: {' '.join(command)}", file=sys.stderr, flush=True)
        environment = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        started, before, killed = time.monotonic(), artifacts(self.root).keys(), False
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
            while process.poll() is None:
                time.sleep(_POLL)
                if kill is not None and not killed and kill.due(self.root):
                    kill.kill(process)
                    killed = True
        status = process.returncode
        as_expected = status == 0 if kill is None else killed and status != 0
        made = len(artifacts(self.root).keys() - before)
        step = Step(name, command, time.monotonic() - started, status, as_expected, made)
        self.steps.append(step)
        outcome = "" if step.expected else f": NOT AS EXPECTED, see {log}"
        print(f"{name}: status {status} after {step.seconds:,.0f} s{outcome}", file=sys.stderr, flush=True)
        return step


@dataclass(frozen=True)
class Kill:
    """Kills a run, all its processes or its last rank, in the middle of an artifact."""

    what: Literal["all processes", "one rank"]
    kind: str
    """Of the artifact."""
    after: int
    """The number of artifacts of the kind that are complete then, at least."""
    part: str
    """A file or folder of the artifact, as a pattern, that is there then."""

    def due(self, root: Path) -> bool:
        """True once it is time, or later, where an artifact was made between two looks."""
        folder = root / "artifacts" / self.kind
        complete = len(list(folder.glob("[!.]*")))
        return complete > self.after or (complete == self.after and any(folder.glob(f".*.partial/{self.part}")))

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """Sends SIGKILL."""
        if self.what == "all processes":
            children = psutil.Process(process.pid).children(recursive=True)
            os.killpg(process.pid, signal.SIGKILL)
            for child in children:  # ranks are in sessions of their own
                if child.is_running():
                    child.kill()
        else:
            psutil.Process(process.pid).children()[-1].kill()


def recomputed(records: pd.DataFrame) -> dict[tuple[str, str, str, str], float]:
    """Every value of a table of one seed by row, suite, task and metric, by the plainest computation."""
    final = records[records["tokens"].isna()]
    values = {}
    for (method, suite, task, metric), of_key in final.groupby(["method", "suite", "task", "metric"]):
        numerator, denominator = of_key["numerator"], of_key["denominator"]
        value = numerator.sum() / denominator.sum() / math.log(2)
        if metric != "bits_per_byte":
            value = 100 * (numerator / denominator).mean()
        values[str(method), str(suite), str(task), str(metric)] = float(value)
    return values


def check_tables(run: Path) -> tuple[int, list[str]]:
    """Compares every cell of a run's tables with its records; the number of cells, and a sentence for each difference.

    A cell over several tasks is the mean of theirs. Where a table has a row a task, it does not say which metric of the
    task it shows; the value must be that of one of them.
    """
    expected = recomputed(read(sorted((run / "records").glob("*.parquet"))))
    cells, wrong = 0, []
    for path in sorted(run.glob("table*.json")):
        table = json.loads(path.read_text(encoding="utf-8"))
        for j, column in enumerate(table["columns"]):
            values = {row: of_row[j]["value"] for row, of_row in zip(table["rows"], table["cells"], strict=True)}
            for row, value in values.items():
                if value is None:
                    continue
                cells += 1
                if column["parts"]:
                    parts = [expected.get((row, *part), math.nan) for part in column["parts"]]
                    known = [sum(parts) / len(parts)]
                elif row == AVERAGE:
                    tasks = [one for task, one in values.items() if task != AVERAGE]
                    known = [sum(tasks) / len(tasks)]
                else:
                    shown = column["label"], _PAPERS_NAMES.get(row, row)
                    known = [v for (method, _, task, _), v in expected.items() if (method, task) == shown]
                if not any(math.isclose(value, one, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE) for one in known):
                    where = f"{run.parent.parent.name}/{path.name}, {row}, {column['label']}"
                    wrong.append(f"{where}: the table has {value}, the records give {', '.join(map(str, known))}.")
    return cells, wrong


def runs(root: Path) -> list[Path]:
    """The folder of every finished run."""
    return sorted(path.parent for path in root.glob("runs/*/rehearsal/*/run.json"))


def artifacts(root: Path) -> dict[str, int]:
    """The time (ns) at which each artifact was completed."""
    return {str(path.parent): path.stat().st_mtime_ns for path in (root / "artifacts").glob("*/[!.]*/manifest.json")}


def stage_times(root: Path) -> dict[str, tuple[int, float]]:
    """Number of the artifacts of each kind, and the seconds in which one of them or more were being made."""
    intervals: dict[str, list[tuple[float, float]]] = {}
    for path in artifacts(root):
        manifest = json.loads((Path(path) / "manifest.json").read_text(encoding="utf-8"))
        began = datetime.fromisoformat(manifest["created"]).timestamp()
        intervals.setdefault(manifest["kind"], []).append((began, began + manifest["duration_s"]))
    times = {}
    for kind, of_kind in intervals.items():
        seconds, end = 0.0, 0.0
        for began, ended in sorted(of_kind):  # tasks of one suite are made together
            seconds += max(0.0, ended - max(began, end))
            end = max(end, ended)
        times[kind] = len(of_kind), seconds
    return dict(sorted(times.items(), key=lambda item: -item[1][1]))


KILLS = (
    Kill("all processes", "predictions", 1, "shard-*"),
    Kill("one rank", "train", 2, "checkpoints/checkpoint-*/*"),
)


def rehearse(root: Path, ranks: int, names: Sequence[str], settings: Sequence[str]) -> tuple[Rehearsal, list[str]]:
    """Runs all steps; the rehearsal, and what went wrong in sentences."""
    rehearsal, wrong = Rehearsal(root, ranks, names, settings), []
    for kill in KILLS:
        rehearsal.run(f"run, {kill.what} killed", kill)
    rehearsal.run("run")
    before = artifacts(root)
    rehearsal.run("run again")
    if artifacts(root) != before:
        wrong.append("The finished run was started again and made artifacts.")
    audited = "table1" if "all" in names else names[0]
    rehearsal.fusellm("audit", "audit", audited, *PROFILE, *settings)
    with_paper = ["tables", *names, *PROFILE, "--with-paper", "--out", str(root / "tables")]
    rehearsal.fusellm("tables", *with_paper)
    reported = [name for name in names if name != "all"]  # of which the report has all unless it is given some
    rehearsal.fusellm("report", "report", *reported, *PROFILE, "--out", str(root / "report"))
    rehearsal.fusellm("verify", "artifact", "verify")
    wrong += [f"`{step.name}` ended with status {step.status}." for step in rehearsal.steps if not step.expected]
    if not (checked := [check_tables(run) for run in runs(root)]):
        wrong.append("There is no finished run.")
    print(f"{sum(cells for cells, _ in checked)} cells of {len(checked)} runs compared", file=sys.stderr)
    return rehearsal, wrong + [sentence for _, sentences in checked for sentence in sentences]


def page(rehearsal: Rehearsal, wrong: Sequence[str], facts: Sequence[tuple[str, str]]) -> str:
    """The page in Markdown."""
    steps = [
        f"| {step.name} | `{_short(step.command)}` | {step.made} | {step.seconds:,.0f} | "
        f"{'yes' if step.expected else f'**no: status {step.status}**'} |"
        for step in rehearsal.steps
    ]
    kinds = [f"| {kind} | {n} | {seconds:,.0f} |" for kind, (n, seconds) in stage_times(rehearsal.root).items()]
    return _PAGE.format(
        ranks=rehearsal.ranks,
        facts="\n".join(f"- {name}: {value}" for name, value in facts),
        steps="\n".join(steps),
        kinds="\n".join(kinds),
        outcome="\n".join(["What went wrong:", "", *(f"- {one}" for one in wrong)]) if wrong else _agreement(rehearsal),
    )


_PAGE = """# `rehearsal`: the paper's run in small, killed twice

    make rehearsal

The profile `rehearsal` has the paper's architectures, kinds of tokenizer, context and roles, with models of some
100,000 parameters, and text that has all that a large corpus has, a line of 3 MB included. Plumbing, not a result: what
is shown is that every table is made by {ranks} ranks under ZeRO-2, whatever is killed on the way.

{facts}

| step | command | artifacts made | seconds | as expected |
| --- | --- | --- | --- | --- |
{steps}

{outcome}

| artifacts | number | seconds |
| --- | --- | --- |
{kinds}
"""


def _short(command: Sequence[str]) -> str:
    """The command without what depends on the place."""
    return re.sub(r" --(root|out) \S+", "", " ".join(command))


def _agreement(rehearsal: Rehearsal) -> str:
    finished = runs(rehearsal.root)
    cells = sum(check_tables(run)[0] for run in finished)
    return (
        f"All {cells:,} values of the tables of {len(finished)} experiments are those that the stored records give by "
        "a plain computation, all artifacts match their manifests, and the finished run, started again, made nothing."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearses and writes the page; exit status 1 where anything went wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rehearsal", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("names", nargs="*", default=["all"], help="experiments (default: all)")
    parser.add_argument(
        "--root", type=Path, default=Path("work/rehearsal"), help="an empty folder (default: %(default)s)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes of torchrun (default: 2)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of fusellm")
    parser.add_argument("--output", type=Path, help="file for the page (default: standard output)")
    options = parser.parse_args(arguments)
    facts = [fact for fact in machine.facts() if fact[0] != "threads"]
    settings = [word for setting in options.set for word in ("--set", setting)]
    rehearsal, wrong = rehearse(options.root, options.ranks, options.names, settings)
    text = page(rehearsal, wrong, facts)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    print("\n".join(wrong) or "The rehearsal passed.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
