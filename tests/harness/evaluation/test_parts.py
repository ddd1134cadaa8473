"""Answers in parts: the same bytes whoever makes them, and what cannot be answered stops nothing else."""

import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.evaluation.lm_eval import parts
from harness.evaluation.lm_eval.parts import AnswerParts, Lines
from harness.evaluation.suite import Unfinished, read_lines
from harness.store.artifacts import Spec, Store
from harness.store.leases import Leases

SPECS = {name: Spec("task", name, 1, {}, {"name": name}) for name in ("one", "two", "three")}
EXAMPLES = [f"{i:02d}" for i in range(20)]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "REQUESTS", 6)


def answers(
    made: list[list[str]], failing: Sequence[str] = (), known: Sequence[str] = (), dies_after: int | None = None
) -> AnswerParts:
    """Answers to examples of 2 requests each, of which every fourth is skipped; notes the examples of each part."""

    def answer(folder: Path, leases: Leases, examples: Sequence[str], kept: Lines) -> tuple[Lines, dict[str, str]]:
        if len(made) == dies_after:
            os._exit(9)
        time.sleep(0.02)
        lines = {line["example"]: line for line in kept.get("answers", [])}
        made.append([e for e in examples if e not in lines])
        for example in made[-1]:
            if example not in failing and int(example) % 4:
                lines[example] = {"example": example, "by": "the part"}
        skipped = [{"example": e} for e in examples if int(e) % 4 == 0]
        return {"answers": [lines[e] for e in examples if e in lines], "skipped": skipped}, {
            e: "no" for e in made[-1] if e in failing
        }

    def of_before(folder: Path) -> dict[str, Lines]:
        return {e: {"answers": [{"example": e, "by": "another"}]} for e in known}

    return AnswerParts("test", lambda: dict.fromkeys(EXAMPLES, 2), answer, of_before, ("answers", "skipped"))


def ensure(store: Store, name: str, some: AnswerParts) -> Path:
    def build(folder: Path) -> None:
        if some.failures:
            raise Unfinished(", ".join(some.failures))
        some.join(folder)

    return store.ensure(SPECS[name], build, make_parts=some.make)


def test_parts_are_joined_in_the_order_of_the_examples(tmp_path: Path) -> None:
    made: list[list[str]] = []
    path = ensure(Store(tmp_path), "one", answers(made))
    assert made == [EXAMPLES[i : i + 3] for i in range(0, 20, 3)]
    assert [line["example"] for line in read_lines(path / "answers")] == [e for e in EXAMPLES if int(e) % 4]
    assert [line["example"] for line in read_lines(path / "skipped")] == EXAMPLES[::4]
    assert sorted(file.name for file in path.iterdir()) == ["answers", "manifest.json", "skipped"]


def test_what_cannot_be_answered_is_named_and_asked_again(tmp_path: Path) -> None:
    made: list[list[str]] = []
    store = Store(tmp_path)
    with pytest.raises(Unfinished, match="07, 09"):
        ensure(store, "one", answers(made, failing=["07", "09"]))
    assert len(made) == 7
    ensure(store, "two", answers([]))
    made.clear()
    path = ensure(store, "one", answers(made))
    assert [[e for e in some if int(e) % 4] for some in made] == [["07"], ["09"]]
    assert [line["example"] for line in read_lines(path / "answers")] == [e for e in EXAMPLES if int(e) % 4]


def test_answers_that_are_known_are_not_asked_for(tmp_path: Path) -> None:
    made: list[list[str]] = []
    path = ensure(Store(tmp_path), "one", answers(made, known=["01", "02", "05"]))
    assert made[:2] == [["00"], ["03", "04"]] and len(read_lines(path / "answers")) == 15


def test_a_store_that_shares_completes_nothing_and_waits_for_nobody(tmp_path: Path) -> None:
    made: list[list[str]] = []
    store, some = Store(tmp_path), answers(made)
    leases = tmp_path / "task" / f".{SPECS['one'].fingerprint[:16]}.leases"
    leases.mkdir(parents=True)
    with Leases(leases) as other:  # another process is at work on one part
        assert other.take("part-00002")
        path = ensure(store.sharing(), "one", some)
        assert not path.exists() and len(made) == 6 and not store._verified
    assert ensure(store, "one", some) == path and made[-1] == EXAMPLES[6:9]
    assert store.verify(path)["resumed"] is False


def _measure(root: Path, names: Sequence[str], dies_after: int | None) -> None:
    for name in names:
        ensure(Store(root), name, answers([], dies_after=dies_after))


@pytest.mark.slow
def test_processes_that_take_tasks_in_any_order_and_are_killed_make_what_one_makes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    orders: list[tuple[list[str], int | None]] = [(list(SPECS), None), (list(SPECS)[::-1], None), (list(SPECS), 2)]
    processes = [context.Process(target=_measure, args=(tmp_path / "many", *order)) for order in orders]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    alive = [process for process in processes if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive and sorted(process.exitcode or 0 for process in processes) == [0, 0, 9]
    _measure(tmp_path / "one", list(SPECS), None)
    files = {
        path.relative_to(root): path.read_bytes()
        for root in (tmp_path / "one",)
        for path in root.rglob("*")
        if path.name in ("answers", "skipped")
    }
    assert len(files) == 6 and all((tmp_path / "many" / name).read_bytes() == data for name, data in files.items())
