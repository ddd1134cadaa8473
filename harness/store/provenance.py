"""What made a number: command, commit and package versions, and in what two runs differ.

The chain is stored where it cannot come apart. A table's cell names its evaluations; a record file's provenance beside
it names the evaluation and its artifacts; an artifact's manifest holds inputs (hashes of texts, models and rows),
parameters, resolved configuration, versions, commit and command; a run's `run.json` holds them for the run.
"""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from harness.store.paths import SOURCE

DISTRIBUTION = "fusellm-harness"
ABSENT = "—"


def made_by() -> dict[str, Any]:
    """The command line of this process, the commit of the harness, and the versions that it computes with."""
    return {"command": sys.argv, "commit": commit(), "libraries": versions()}


@cache
def commit() -> str | None:
    """The git commit of the checkout that the harness runs from, with a + where files differ; None without one."""
    checkout = SOURCE
    if not (checkout / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # no git on this machine, or somebody else's checkout
        return None


@cache
def versions() -> dict[str, str]:
    """Of Python, of the harness and of every package that it needs to compute."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    needed = [one for one in importlib.metadata.requires(DISTRIBUTION) or [] if 'extra == "dev"' not in one]
    for name in [DISTRIBUTION, *(re.split(r"[^\w.-]", one)[0] for one in needed)]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # what an extra would bring
            continue
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every key (with dots between its parts) in which two runs' descriptions differ, and its two values.

    What two runs always differ in, being two, is left out: when they finished, and where their records lie.
    """
    flat = [dict(_flat(run)) for run in (one, other)]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        first, second = (run.get(key, ABSENT) for run in flat)
        if first != second:
            yield key, str(first), str(second)


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, one in value.items():
        if not before and key in ("finished", "records", "artifacts"):
            continue
        if isinstance(one, Mapping):
            yield from _flat(one, f"{before}{key}.")
        else:
            yield before + key, one
