"""The provenance of a number: command, commit and package versions, and the differences between two runs.

The chain is stored in three places. A table's cell names its evaluations. The provenance beside a file of records names
the evaluation and its artifacts. An artifact's manifest holds inputs (hashes of texts, models and rows), parameters,
resolved configuration, versions, commit and command; a run's `run.json` holds them for the run.
"""

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from harness.runtime.programs import which
from harness.store.paths import SOURCE

DISTRIBUTION = "fusellm-harness"
ABSENT = "—"


def made_by() -> dict[str, Any]:
    """The command line of this process, the commit of the harness, and the versions of the libraries."""
    return {"command": sys.argv, "commit": commit(), "libraries": versions()}


@cache
def commit() -> str | None:
    """The git commit of the checkout that the harness runs from, with a + where files differ; None without one."""
    checkout = SOURCE
    program = which("git")
    if program is None or not (checkout / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        process = subprocess.run([program, "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
        return process.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):  # somebody else's checkout
        return None


@cache
def versions() -> dict[str, str]:
    """The versions of Python, of the harness and of every package that it depends on."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    requirements = [r for r in importlib.metadata.requires(DISTRIBUTION) or [] if 'extra == "dev"' not in r]
    for name in [DISTRIBUTION, *(re.split(r"[^\w.-]", requirement)[0] for requirement in requirements)]:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a package of an extra
            continue
    return installed


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every key (dotted) in which the descriptions of two runs differ, and its two values.

    Times and the places of records and artifacts, which always differ, are left out.
    """
    flat = [dict(_flat(run)) for run in (one, other)]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        first, second = (run.get(key, ABSENT) for run in flat)
        if first != second:
            yield key, str(first), str(second)


def _flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, entry in value.items():
        if not before and key in ("finished", "measured", "records", "artifacts"):
            continue
        if isinstance(entry, Mapping):
            yield from _flat(entry, f"{before}{key}.")
        else:
            yield before + key, entry
