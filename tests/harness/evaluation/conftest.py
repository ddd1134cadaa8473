"""Running programs that mean harm, in the sandbox and nowhere else."""

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from harness.evaluation import sandbox as sandboxes
from harness.evaluation.multipl_e.toolchains import find
from harness.evaluation.sandbox import Limits, Outcome, Program, Sandbox
from tests.shared import needed

MiB = 1 << 20
LIMITS = Limits(cpu=2, wall=4.0, memory=256 * MiB, processes=40, disk=8 * MiB, shared=2 * MiB)

Continuation = Callable[[str], Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Continuation]:
    """Runs a Python program in the sandbox and sees that no process of it is left."""
    needed(sandboxes.refusal())
    toolchain = find("python", tmp_path)
    mark = f"hostile-{uuid.uuid4().hex}.py"
    with Sandbox(toolchain.roots, LIMITS) as sandbox:

        def once(code: str) -> Outcome:
            return sandbox.run(Program({mark: dedent(code)}, [*toolchain.run[:-1], mark], watch="the nonce"))

        yield once
        assert processes_with(mark) == []


def processes_with(mark: str) -> list[int]:
    """Processes anywhere on the machine that were started with `mark` in their command, zombies included."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
