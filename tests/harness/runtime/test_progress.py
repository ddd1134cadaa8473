"""Progress: what is printed where there is no terminal, and the time that is left of a whole run."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.runtime import progress
from harness.store.artifacts import Spec, Store


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    printed: list[str] = []
    monkeypatch.setattr(progress, "notify", printed.append)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    return printed


def test_stages_are_counted_and_the_time_left_follows_their_pace(clock: Clock, lines: list[str]) -> None:
    with progress.whole_run({"a": 10.0, "b": 20.0, "c": 30.0}):
        with progress.stage("a", "passages"):
            clock.now += 20  # twice as long as expected
        with progress.stage("b", "train CLM"):
            clock.now += 40
        with progress.stage("c", "evaluation"):
            pass
    assert lines == [
        "stage 1 of 3: passages, about 60 s left in all",
        "stage 2 of 3: train CLM, about 2 min left in all",
        "stage 3 of 3: evaluation, about 60 s left in all",
    ]


def test_short_stages_do_not_flood_a_log(clock: Clock, lines: list[str]) -> None:
    stages = {str(i): 1.0 for i in range(100)}
    with progress.whole_run(stages):
        for name in stages:
            with progress.stage(name, name):
                clock.now += 1
    assert len(lines) == 7  # at 0 s and every 15 s of 100 s


def test_a_long_stage_prints_lines_that_place_it_in_the_run(clock: Clock, lines: list[str]) -> None:
    with (
        progress.whole_run({"a": 100.0, "b": 100.0}),
        progress.stage("a", "train CLM"),
        progress.track("train CLM", 100, "tokens") as advance,
    ):
        for _ in range(10):
            clock.now += 10
            advance(10)
    assert lines[1] == "train CLM: 20/100 tokens, 1 tokens/s, 80 s left (stage 1 of 2, about 3 min left in all)"
    assert lines[-1] == "train CLM: 100 tokens in 100 s, 1 tokens/s"


def test_the_rate_counts_only_what_this_process_has_done(clock: Clock, lines: list[str]) -> None:
    with progress.track("predictions", 1000, "passages", done=900) as advance:
        clock.now += 20
        advance(20)
    assert lines == [
        "predictions: 920/1,000 passages, 1 passages/s, 80 s left",
        "predictions: 920 passages in 20 s, 1 passages/s",
    ]


def test_what_was_not_planned_is_not_counted(clock: Clock, lines: list[str]) -> None:
    with progress.stage("a", "nothing"):
        pass
    with progress.whole_run({"a": 1.0}), progress.stage("b", "another"), progress.stage("a", "planned"):
        pass
    assert lines == ["stage 1 of 1: planned, about 1 s left in all"]


def test_a_store_names_the_stage_that_makes_an_artifact(tmp_path: Path, lines: list[str]) -> None:
    spec = Spec("map", "coder", 1, {}, {})
    store = Store(tmp_path)
    with progress.whole_run({spec.fingerprint: 5.0}):
        for _ in range(2):  # the second time it is there
            store.ensure(spec, lambda folder: (folder / "map").touch())
    assert lines == ["stage 1 of 1: map coder, about 5 s left in all"]


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (89, "89 s"), (90, "2 min"), (7100, "118 min"), (7500, "2 h 5 min")]
)
def test_durations_are_read_at_a_glance(seconds: float, words: str) -> None:
    assert progress.duration(seconds) == words


def test_a_long_line_is_not_folded_where_it_is_piped(capsys: pytest.CaptureFixture[str]) -> None:
    progress.notify("word " * 60)
    assert len(capsys.readouterr().err.splitlines()) == 1
