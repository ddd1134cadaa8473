"""Programs that mean harm run in the sandbox and nowhere else; tiny models and rows for the suites."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

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


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What makes toolchains fast, made once for all processes of a test run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "toolchains"


# Few of the rows' words are tokens of the tiny vocabulary, so that a BBH prompt has thousands of them.
CONTEXT = 8192


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows of every data set."""
    from tests.harness.suite_rows import make_data_root

    return make_data_root(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models with room for few-shot prompts, and one without."""
    from transformers import LlamaConfig

    from tests.harness.tiny_models import save_model

    folder = tmp_path_factory.mktemp("models")
    made = {name: save_model(folder / name, LlamaConfig, 400, seed, 6, max_position_embeddings=CONTEXT)
            for seed, name in enumerate(["one", "two"])}  # fmt: skip
    return made | {"short": save_model(folder / "short", LlamaConfig, 400, 0, 6)}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub does not answer."""
    from harness.data import hub

    monkeypatch.setattr(hub, "_answers", lambda: False)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The prompts that were generated for."""
    from harness.evaluation.shared_prefix_lm import SharedPrefixLM

    prompts: list[str] = []
    own = SharedPrefixLM._decode

    def decode(self: Any, rows: dict[int, Any], answers: list[str]) -> None:
        prompts.extend(row.request.args[0] for row in rows.values())
        own(self, rows, answers)

    monkeypatch.setattr(SharedPrefixLM, "_decode", decode)
    yield prompts
