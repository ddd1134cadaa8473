"""Executes a file of generations: identical programs once, on all cores, each in the sandbox.

Every result is appended to a journal beside the results as soon as it is known, and a second start goes on from there.
The file of results is complete or absent, and does not depend on the order in which programs ended.
"""

import json
import os
import queue
import secrets
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.evaluation.multipl_e.generations import Problem, json_lines, read_generations
from harness.evaluation.multipl_e.languages import LANGUAGES, language_of, nonce_line
from harness.evaluation.multipl_e.toolchains import Toolchain, available, locate
from harness.evaluation.sandbox import Limits, Sandbox, refusal
from harness.runtime.progress import notify, track
from harness.store.files import intact_lines, write_atomically

VERSION = 3  # of the way in which programs are put together, run and scored

Key = tuple[str, str]
"""A toolchain, with everything else that can change a verdict, and a program."""


@dataclass(frozen=True)
class Executed:
    """The outcome of an execution: results, number of programs run, and the reason for every language not run."""

    results: Path
    ran: int
    not_run: Mapping[str, str]


class OutOfTime(UserError):
    """An execution took longer than it may; its results are kept."""


def results_path(generations: Path) -> Path:
    """The file beside the completions that their results are written to unless another is named."""
    return generations.with_suffix(".results.jsonl")


def execute(
    generations: Path,
    out: Path,
    *,
    cache: Path,
    workers: int | None = None,
    limits: Limits | None = None,
    unsafe: bool = False,
    max_seconds: float | None = None,
) -> Executed:
    """Runs every completion of `generations` and writes `out` (formats: harness.evaluation.multipl_e.generations).

    `cache` keeps the prepared toolchains. Languages whose toolchain is missing are left out of `out` and named in the
    result. After `max_seconds` no further program is begun (default: no limit).

    Raises:
        OutOfTime: Programs are left after `max_seconds`; finished results are kept.
        UserError: There is no sandbox (unless `unsafe`), `out` holds results of other completions, or a toolchain has
            disappeared meanwhile; finished results are kept.
    """
    from filelock import FileLock, Timeout

    limits = limits or Limits()
    problems = read_generations(generations)
    if not unsafe and (why := refusal()):
        raise UserError(f"{why} Programs are not executed without it, unless you say --unsafe-no-sandbox.")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out.with_name(f".{out.name}.lock"), timeout=0):
            workers = workers or len(os.sched_getaffinity(0))
            return _execute(problems, out, cache, workers, limits, unsafe, max_seconds)
    except Timeout:
        raise UserError(f"Another process executes into {out}: wait for it or choose another file.") from None


def _execute(
    problems: list[Problem],
    out: Path,
    cache: Path,
    workers: int,
    limits: Limits,
    unsafe: bool,
    max_seconds: float | None,
) -> Executed:
    started = time.monotonic()
    old = _old_lines(out, problems)
    names = sorted({problem.language.name for problem in problems})
    found, not_run = available(names, cache, unsafe=unsafe)
    kind = {name: _identity(toolchain, limits, unsafe) for name, toolchain in found.items()}
    journal = out.with_name(f"{out.name}.journal")
    results = _finished(journal, old.values())
    programs: dict[Key, Problem] = {}
    for problem in problems:
        if problem.language.name in found:
            programs |= {(kind[problem.language.name], program): problem for program in problem.programs}
    todo = {key: problem for key, problem in programs.items() if key not in results}
    with (
        track("executing", len(programs), "programs", done=len(programs) - len(todo)) as advance,
        journal.open("a", encoding="ascii") as file,
        closing(_run_all(todo, found, workers, limits, unsafe)) as running,
    ):
        try:
            for result in running:
                file.write(json.dumps(result) + "\n")
                file.flush()
                results[result["toolchain"], result["program"]] = result
                advance(1)
                if max_seconds is not None and time.monotonic() - started > max_seconds:
                    break
        except UserError as error:
            raise UserError(f"{error} {_kept(programs, results)}") from None
    _refuse_broken({p.language.name: kind[p.language.name] for p in todo.values()}, journal, cache, limits, unsafe)
    if not programs.keys() <= results.keys():
        raise OutOfTime(f"The {max_seconds:g} seconds of the execution are used up: {_kept(programs, results)}")

    lines, skipped = [], set()
    for problem in problems:
        name = problem.language.name
        if name in found:
            ours = [results[kind[name], program] for program in problem.programs]
            lines.append({**problem.row, "results": ours})
        elif problem.key in old:
            lines.append(old[problem.key])
        else:
            skipped.add(name)
    write_atomically(out, "".join(json.dumps(line) + "\n" for line in lines))
    if not skipped:
        journal.unlink()
    for name in sorted(skipped):
        notify(not_run[name])
    return Executed(out, len(todo), {name: not_run[name] for name in sorted(skipped)})


def _kept(programs: Iterable[Key], results: Iterable[Key]) -> str:
    wanted = set(programs)
    return f"{len(wanted.intersection(results))} of {len(wanted)} results are kept; the same command goes on."


def _run_all(
    todo: Mapping[Key, Problem], found: Mapping[str, Toolchain], workers: int, limits: Limits, unsafe: bool
) -> Generator[dict[str, Any], None, None]:
    """Yields the results in the order in which programs end."""
    roots = [root for toolchain in found.values() for root in toolchain.roots]
    boxes: queue.SimpleQueue[Sandbox] = queue.SimpleQueue()

    def one(key: Key) -> dict[str, Any]:
        box = boxes.get()
        try:
            return _run(found[todo[key].language.name], key, todo[key].row["tests"], box)
        finally:
            boxes.put(box)

    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        # Closed before the pool, so that an interrupt ends the programs that its threads wait for.
        for slot in range(min(workers, len(todo))):
            boxes.put(stack.enter_context(Sandbox(roots, limits, slot=slot, unsafe=unsafe)))
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for done in as_completed([pool.submit(one, key) for key in todo]):
            yield done.result()


def _refuse_broken(used: Mapping[str, str], journal: Path, cache: Path, limits: Limits, unsafe: bool) -> None:
    """Raises UserError, and drops its results, where a toolchain no longer works as it did when the run began.

    Otherwise a toolchain that an upgrade has left incomplete, for instance, would count against the completions.
    """
    found, not_run = available(sorted(used), cache, unsafe=unsafe)
    changed = [name for name in used if name not in found or _identity(found[name], limits, unsafe) != used[name]]
    if changed:
        dropped = {used[name] for name in changed}
        kept = [line for line in intact_lines(journal) if json.loads(line)["toolchain"] not in dropped]
        write_atomically(journal, "".join(kept))
        titles = " and ".join(LANGUAGES[name].title for name in changed)
        why = " ".join(not_run.values())
        raise UserError(f"{titles} changed during the run, so its results are dropped; run again. {why}".rstrip())


def _identity(toolchain: Toolchain, limits: Limits, unsafe: bool) -> str:
    """Everything beside the program on which a verdict may depend."""
    bounds = f"{limits.cpu} s of processor, {limits.wall:g} s, {limits.memory >> 20} MiB, {limits.processes} processes"
    return f"{toolchain.version}; {bounds}{'; no sandbox' if unsafe else ''}; version {VERSION}"


def verdict_keys(names: Sequence[str], *, unsafe: bool = False) -> dict[str, str | None]:
    """By language, everything beside the program on which a verdict may depend, as the key of results holds it.

    None for a language whose toolchain is not on this machine. Nothing is prepared.
    """

    def key(name: str) -> str | None:
        try:
            return _identity(locate(name), Limits(), unsafe)
        except UserError:
            return None

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(names, pool.map(key, names), strict=True))


def _run(toolchain: Toolchain, key: Key, tests: str, sandbox: Sandbox) -> dict[str, Any]:
    """The result of one program. Raises UserError where its toolchain is gone, which is no failure of the program."""
    kind, program = key
    nonce = secrets.token_hex(16)
    language = toolchain.language
    outcome = sandbox.run(toolchain.program(language.with_nonce(program, tests, nonce), nonce_line(nonce)))
    if outcome.exit_code and (lost := toolchain.lacking()):
        raise UserError(f"{language.title} stopped: {lost} has disappeared, install it again.")
    return {
        "program": program,
        "stdout": outcome.stdout.replace(nonce_line(nonce), ""),
        "stderr": outcome.stderr,
        "exit_code": outcome.exit_code,
        "status": language.status(outcome),
        "timestamp": int(time.time()),
        "strict": outcome.exit_code == 0 and outcome.seen,
        "cpu_ms": round(1000 * outcome.cpu),
        "toolchain": kind,
    }


def _old_lines(out: Path, problems: list[Problem]) -> dict[tuple[str, str], dict[str, Any]]:
    """The lines of earlier results by problem. Raises UserError where they belong to other completions."""
    if not out.exists():
        return {}
    by_key = {problem.key: problem for problem in problems}
    old = {}
    for number, row in json_lines(out):
        try:
            key = language_of(row["language"]).name, row["name"]
            programs = [result["program"] for result in row["results"]]
        except (KeyError, TypeError):
            raise UserError(f"{out}, line {number} is no result of an execution: choose another file.") from None
        if key not in by_key or programs != by_key[key].programs:
            raise UserError(f"{out} holds results of other completions ({row['name']}): choose another file.")
        old[key] = row
    return old


def _finished(journal: Path, lines: Iterable[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """The results that need not be computed again: the journal of an interrupted execution, and earlier results."""
    kept = intact_lines(journal)
    if journal.exists():
        write_atomically(journal, "".join(kept))  # without the lines that a kill or a power loss has damaged
    results = [result for line in lines for result in line["results"]]
    try:
        results += [json.loads(line) for line in kept]
        return {(result["toolchain"], result["program"]): result for result in results}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{journal} is damaged: remove it and run again.") from None
