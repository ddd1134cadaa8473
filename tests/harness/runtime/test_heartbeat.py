"""The rank that hangs or dies in a collective operation is named in one sentence."""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.runtime import distributed, heartbeat
from harness.runtime.heartbeat import Heartbeat, Rank
from tests.harness.runtime.test_distributed import launch, sentences

LOOP = """
import os, signal, sys, time
from pathlib import Path
import torch
from harness.runtime import distributed
from harness.runtime.heartbeat import Heartbeat

def stop(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, stop)  # as the command line does
distributed.initialize("cpu")
with Heartbeat(Path(sys.argv[1]), what="CLM (seed 0)", patience=3) as beating:
    for step in range(1, 100):
        beating.beat(f"the forward pass of step {step}")
        if step == 5 and distributed.rank() == 1:
            if sys.argv[2] == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        beating.beat(f"the backward pass of step {step}")
        torch.distributed.all_reduce(torch.ones(3))
        time.sleep(0.2)
"""


@pytest.fixture
def peer() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def beside(
    peer: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[Heartbeat, list[str]]]:
    """This process as rank 0 beside rank 1, which never gets on."""
    other = Rank(1, socket.gethostname(), peer.pid, heartbeat._started(peer.pid))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather", lambda me: [me, other])
    monkeypatch.setattr(heartbeat, "_INTERVAL", 0.02)

    def beat(patience: float) -> tuple[Heartbeat, list[str]]:
        said: list[str] = []
        return Heartbeat(tmp_path / "ranks", what="CLM (seed 0)", patience=patience, end=said.append), said

    return beat


def until(said: list[str]) -> str:
    limit = time.monotonic() + 20
    while not said and time.monotonic() < limit:
        time.sleep(0.02)
    return said[0]


def test_a_rank_that_died_is_named(
    beside: Callable[..., tuple[Heartbeat, list[str]]], peer: subprocess.Popen[bytes]
) -> None:
    beating, said = beside(3600)
    with beating:
        beating.beat("step 1")
        peer.kill()
        assert f"rank 1 (process {peer.pid} on {socket.gethostname()}) died in the start of CLM (seed 0)" in until(said)


def test_a_failed_collective_operation_is_explained_by_the_death(
    beside: Callable[..., tuple[Heartbeat, list[str]]],
    peer: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(heartbeat, "_INTERVAL", 1.0)  # the error comes first
    beating, said = beside(3600)
    with pytest.raises(RuntimeError), beating:
        peer.kill()
        raise RuntimeError("Connection closed by peer")
    assert "died" in said[0]


def test_the_rank_that_is_waited_for_is_named(beside: Callable[..., tuple[Heartbeat, list[str]]]) -> None:
    beating, said = beside(0.5)
    with beating:
        beating.beat("step 1")
        assert "rank 1 (process" in until(said) and "did not get on for" in said[0] and "rank 0" not in said[0]


def test_nothing_is_said_while_some_rank_gets_on(beside: Callable[..., tuple[Heartbeat, list[str]]]) -> None:
    beating, said = beside(0.5)
    with beating:
        for step in range(20):
            beating.beat(f"step {step}")
            time.sleep(0.05)
    assert not said and not beating._folder.exists()


def test_a_rank_that_has_finished_is_not_missed(
    beside: Callable[..., tuple[Heartbeat, list[str]]], peer: subprocess.Popen[bytes]
) -> None:
    beating, said = beside(3600)
    with beating:
        (beating._folder / "rank-1").write_text("left")
        time.sleep(0.2)
        peer.kill()
        time.sleep(0.2)
    assert not said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_two_ranks(how: str, tmp_path: Path) -> None:
    (tmp_path / "loop.py").write_text(LOOP)
    started = time.monotonic()
    done = launch(tmp_path / "loop.py", tmp_path / "ranks", how, check=False)
    assert time.monotonic() - started < 120
    (sentence,) = sentences(done)
    what = "died in" if how == "dies" else "did not get on for 0.05 minutes (training.timeout_minutes) in"
    assert "rank 1 (process" in sentence
    assert f"{what} the forward pass of step 5 of CLM (seed 0)" in sentence or how == "dies"
