"""What a run survives: kills, signals, a full disk, a read-only folder, damaged files, another process beside it.

Afterwards the next start gives the same table byte for byte, or one sentence refuses; nothing half-written has its
final name.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import typer
from filelock import FileLock

from fusion.errors import UserError
from fusion.vocabulary.tokenization import encode
from harness import cli
from harness.config.loading import load
from harness.data import predictions
from harness.evaluation import perplexity
from harness.experiment import run
from harness.experiment.identity import VERSIONS
from harness.experiment.pipeline import open_experiment, read_predictions
from harness.experiment.plan import plan
from harness.runtime import progress
from harness.stages import trainer
from harness.store.artifacts import Store, read_manifest
from harness.store.cleanup import unused
from harness.store.files import exclusive_lock
from tests.harness.command import answer, assert_whole, results, sentence, start

pytestmark = pytest.mark.slow

RUN = ("experiment", "run")


@pytest.fixture(scope="module")
def finished(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run that nothing disturbed."""
    root = tmp_path_factory.mktemp("undisturbed")
    run.run(load(str(experiment_file)), root)
    return root


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run's root."""
    return Path(shutil.copytree(finished, tmp_path / "root"))


# Kills.


def _kill_at(root: str, count: int) -> None:
    """Kills this process where it is about to write, make, rename or remove something below `root` for that time."""
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.link") or root not in str(arguments[0]):
            return
        if event == "open" and not set(str(arguments[1])) & set("wax+"):
            return
        seen += 1
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_run_killed_between_two_files_ends_in_the_same_table(
    finished: Path, experiment_file: Path, tmp_path: Path
) -> None:
    generator = random.Random(5)
    root, err = tmp_path / "root", tmp_path / "err"
    for _ in range(5):
        kill = partial(_kill_at, str(root), generator.randint(20, 150))
        process = start(err, *RUN, experiment_file, "--root", root, before=kill)
        process.join()
        assert process.exitcode == -signal.SIGKILL, err.read_text()
        assert_whole(root)
    status, _, said = answer(*RUN, experiment_file, "--root", root)
    assert status == 0, said
    assert results(root) == results(finished)
    assert not list(Store(root / "artifacts").leftovers())


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_table(tmp_path: Path) -> None:
    """The profile `micro`, which makes its models, too; the moments are shares of the time that it takes."""
    generator = random.Random(20)
    err, root = tmp_path / "err", tmp_path / "root"
    arguments = (*RUN, "quickstart", "--profile", "micro", "--root")
    started = time.monotonic()
    process = start(err, *arguments, tmp_path / "undisturbed")
    process.join()
    seconds = time.monotonic() - started
    assert process.exitcode == 0, err.read_text()
    expected = results(tmp_path / "undisturbed")
    kills = 0
    while kills < 20:
        process = start(err, *arguments, root)
        process.join(generator.uniform(0, 0.25 * seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            assert_whole(root)
        else:
            assert process.exitcode == 0, err.read_text()
            assert results(root) == expected
            shutil.rmtree(root)
    process = start(err, *arguments, root)
    process.join()
    assert process.exitcode == 0, err.read_text()
    assert results(root) == expected


# Signals that can be answered.


def _workers(pid: int) -> list[psutil.Process]:
    """Processes that a process has forked: they have its command line, and those that it started another."""
    parent, found = psutil.Process(pid), []
    for child in parent.children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            found += [child] if child.cmdline() == parent.cmdline() else []
    return found


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_signal_ends_in_one_sentence_and_leaves_no_process(
    finished: Path, experiment_file: Path, tmp_path: Path, number: signal.Signals, status: int, word: str
) -> None:
    err = tmp_path / "err"
    arguments = [*RUN, experiment_file, "--root", tmp_path / "root", "--set", "training.workers=1"]
    arguments += ["--set", "methods.FuseLLM=null", "--set", "methods.FuseLLM published=null"]
    process = start(err, *arguments)
    while not (workers := _workers(process.pid or 0)):
        assert process.is_alive(), err.read_text()
        time.sleep(0.05)
    time.sleep(0.5)  # in its first moments after the fork a worker cannot answer a signal quietly
    # A terminal sends Ctrl-C to every process of the command, a batch system its signal to the first.
    for one in workers if number == signal.SIGINT else []:
        one.send_signal(number)
    os.kill(process.pid or 0, number)
    process.join()
    assert process.exitcode == status, err.read_text()
    assert sentence(err.read_text()) == f"fusellm: {word}; the same command goes on from here."
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert_whole(tmp_path / "root")
    assert answer(*arguments)[0] == 0
    records = {name: raw for name, raw in results(tmp_path / "root").items() if name.endswith(".parquet")}
    assert len(records) == 3 and records.items() <= results(finished).items()


def test_a_signal_is_not_lost_in_a_callback_of_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    class Thing: ...

    app = typer.Typer()

    @app.command()
    def work() -> None:
        thing = Thing()
        _kept = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del thing
        time.sleep(60)

    monkeypatch.setattr(cli, "app", app)
    status, _, err = answer()
    assert status == 143
    assert sentence(err) == "fusellm: terminated; the same command goes on from here."


# Disks.


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no small disk: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_ends_in_one_sentence(finished: Path, experiment_file: Path, disk: Path, tmp_path: Path) -> None:
    err, ballast = tmp_path / "err", disk / "ballast"
    for room in (100_000, 300_000, 345_000, 385_000):
        ballast.write_bytes(b"")
        with ballast.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - room))
        process = start(err, *RUN, experiment_file, "--root", disk / "root")
        process.join()
        assert process.exitcode == 2, err.read_text()
        wanted = "The run needs about" if room == 100_000 else "does not fit on the disk: free space and run again"
        assert wanted in sentence(err.read_text())
        assert_whole(disk / "root")
    ballast.unlink()
    status, _, said = answer(*RUN, experiment_file, "--root", disk / "root")
    assert status == 0, said
    assert results(disk / "root") == results(finished)


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_disk_ends_in_one_sentence(begun: bool, finished: Path, experiment_file: Path, disk: Path) -> None:
    root = disk / "root"
    if begun:
        shutil.copytree(finished, root)
        shutil.rmtree(next(root.glob("artifacts/train/CLM-*")))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    status, _, said = answer(*RUN, experiment_file, "--root", root)
    assert status == 2 and re.search(r"[Rr]ead-only file system\)?: choose another --root", sentence(said)), said
    if begun:  # what is there can still be looked at
        status, printed, _ = answer("tables", "small-experiment", "--format", "json", "--root", root)
        assert status == 0 and printed.encode() == results(finished)["table.json"]
        assert answer("artifact", "verify", "--root", root)[0] == 0


def test_a_folder_without_permission_ends_in_one_sentence(experiment_file: Path, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("permissions do not bind root (the read-only disk stands for this)")
    tmp_path.chmod(0o555)
    status, _, said = answer(*RUN, experiment_file, "--root", tmp_path / "root")
    assert status == 2 and "change its permissions" in sentence(said)


# Damage.


def _flip(path: Path, generator: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
    path.write_bytes(raw)


def _truncate(path: Path, generator: random.Random) -> None:
    os.truncate(path, generator.randrange(path.stat().st_size))


def _remove(path: Path, generator: random.Random) -> None:
    path.unlink()


COUNTS = ("kind", "version", "inputs", "params", "fingerprint", "files")  # of a manifest
DAMAGE: list[Callable[[Path, random.Random], None]] = [_flip, _truncate, _remove]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a finished run of `micro`, which holds every kind of artifact."""
    root = tmp_path_factory.mktemp("micro")
    run.run(load("quickstart", profile="micro"), root)
    return root


def test_there_is_an_artifact_of_every_kind(micro: Path) -> None:
    assert {p.name for p in (micro / "artifacts").iterdir()} == {*VERSIONS, "curve", "perplexity", "tiny"}


@pytest.mark.parametrize("kind", [*VERSIONS, "perplexity", "tiny"])
def test_damaged_artifacts_are_refused_by_name(kind: str, micro: Path, tmp_path: Path) -> None:
    generator = random.Random(kind)
    root = tmp_path / "root"
    config = load("quickstart", profile="micro")
    shutil.copytree(micro, root)
    folder = sorted((root / "artifacts" / kind).glob("[!.]*"))[0]
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    by_run = generator.choice([p for p in paths if p.stat().st_size and p.name != "manifest.json"])
    for path in paths:
        whole = path.read_bytes()
        # Of a manifest not every byte counts: see the next test.
        for damage in [_remove] if not whole else DAMAGE[1:] if path.name == "manifest.json" else DAMAGE:
            damage(path, generator)
            with pytest.raises(UserError, match=r"remove that|it has no manifest\.json") as refused:
                run.run(config, root) if path == by_run else Store(root / "artifacts").verify(folder)
            assert str(path.relative_to(folder)) in str(refused.value), damage
            path.write_bytes(whole)
    run.run(config, root)
    assert results(root) == results(micro)


def test_a_manifest_is_refused_where_what_it_says_counts(micro: Path) -> None:
    """Every byte of it flipped: only what is written for people can change without a word."""
    path = next(micro.glob("artifacts/predictions/target-*/manifest.json"))
    whole, manifest = path.read_bytes(), read_manifest(path.parent)
    generator = random.Random(3)
    for at in range(0, len(whole), 7):
        raw = bytearray(whole)
        raw[at] ^= 1 << generator.randrange(8)
        path.write_bytes(raw)
        with contextlib.suppress(UserError):
            found = Store(micro / "artifacts").verify(path.parent)
            assert all(found[name] == manifest[name] for name in COUNTS), raw[at - 20 : at + 20]
    path.write_bytes(whole)


def test_damaged_runs_are_refused_or_harmless(again: Path, finished: Path, experiment_file: Path) -> None:
    """Every file of a run's folder, damaged in every way: whatever answers has the same table."""
    generator = random.Random(8)
    (run,) = (path.parent for path in again.glob("runs/*/*/*/run.json"))
    table = results(finished)["table.json"].decode()
    for path in sorted(p for p in run.rglob("*") if p.suffix in (".json", ".parquet")):
        whole = path.read_bytes()
        for damage in DAMAGE:
            damage(path, generator)
            status, printed, said = answer("tables", "small-experiment", "--format", "json", "--root", again)
            if path.suffix == ".parquet" and damage is _remove:
                assert status == 0 and "no records of" in printed  # its cells are missing and say so
            elif path.name == "run.json" or path.suffix == ".parquet":
                assert status == 2 and (path.name in sentence(said) or "no finished run" in said), (path, damage)
            elif status:
                assert status == 2 and path.name in sentence(said), (path, damage)
            else:
                assert printed == table, (path, damage)
            path.write_bytes(whole)


@pytest.mark.parametrize("name", ["run.json", "plan.json", "record"])
def test_a_damaged_run_is_not_continued(name: str, again: Path, finished: Path, experiment_file: Path) -> None:
    (run,) = (path.parent for path in again.glob("runs/*/*/*/run.json"))
    path = next(run.glob("records/CLM*.parquet")) if name == "record" else run / name
    os.truncate(path, path.stat().st_size // 2)
    status, _, said = answer(*RUN, experiment_file, "--root", again)
    assert status == 2 and path.name in sentence(said)
    if name != "record":  # nothing is removed while it is unknown what is in use
        with pytest.raises(UserError, match="is damaged"):
            list(unused(again))
    path.unlink()
    assert answer(*RUN, experiment_file, "--root", again)[0] == 0
    assert results(again) == results(finished)


class _Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def _dying(original: Callable[..., object], calls: int) -> Callable[..., object]:
    """`original`, but for the call after so many."""
    seen = 0

    def call(*args: object, **kwargs: object) -> object:
        nonlocal seen
        seen += 1
        if seen > calls:
            raise _Killed
        return original(*args, **kwargs)

    return call


def test_a_damaged_checkpoint_is_not_continued(
    finished: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("passages", "perplexity"):
        shutil.copytree(finished / "artifacts" / kind, tmp_path / "artifacts" / kind)
    config = load(str(experiment_file))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.FusionTrainer, "compute_loss", _dying(trainer.FusionTrainer.compute_loss, 9))
        with pytest.raises(_Killed):
            run.run(config, tmp_path)
    (last,) = tmp_path.glob("artifacts/train/.*.partial/checkpoints/checkpoint-4")
    generator = random.Random(1)
    for path in sorted(p for p in last.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for damage in DAMAGE if path.name != "complete" else DAMAGE[:2]:
            damage(path, generator)
            with pytest.raises(UserError, match=rf"{path.name} is damaged.*remove .*checkpoint-4"):
                run.run(config, tmp_path) if path.name == "optimizer.pt" else trainer.last_checkpoint(
                    last.parent, trainer.layout_of(config.training)
                )
            path.write_bytes(whole)
    shutil.rmtree(last)  # what the sentence advises
    run.run(config, tmp_path)
    assert results(tmp_path) == results(finished)


def test_a_damaged_part_of_an_evaluation_is_not_continued(
    finished: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(str(experiment_file))
    config.methods = {name: entry for name, entry in config.methods.items() if entry["method"] == "as_is"}
    config.reference = next(iter(config.methods))
    monkeypatch.setattr(perplexity, "_PART", 8)
    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "measure_documents", _dying(perplexity.measure_documents, 1))
        with pytest.raises(_Killed):
            run.run(config, tmp_path)
    (part,) = tmp_path.glob("artifacts/perplexity/.*.partial/part-00000.json")
    whole, generator = part.read_bytes(), random.Random(2)
    for damage in DAMAGE[:2]:
        damage(part, generator)
        with pytest.raises(UserError, match=r"part-00000\.json is damaged.*remove that file"):
            run.run(config, tmp_path)
        part.write_bytes(whole)


def test_a_tokenizer_changed_after_the_extraction_is_noticed(
    again: Path, made: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file makes another model of it; its library, where it splits otherwise, is refused."""
    folder = Path(shutil.copytree(made / "llama", tmp_path / "llama"))
    config = load(str(experiment_file), overrides=[f"roles.target.model={folder}"])
    assert {p.state for p in plan(config, again)} == {"ready"}
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    todo = {p.spec.label for p in plan(config, again) if p.state == "missing"}
    assert todo >= {"llama", "CLM-seed0", "FuseLLM-seed0"} and "neox" not in todo
    reader = read_predictions(open_experiment(load(str(experiment_file)), again), "neox")
    for otherwise in (lambda ids: ids[:-1], lambda ids: ids[::-1]):  # fewer tokens, and as many
        monkeypatch.setattr(
            predictions, "encode", lambda tokenizer, text, other=otherwise: other(encode(tokenizer, text))
        )
        with pytest.raises(UserError, match="but the tokenizer now gives"):
            reader.predictions(0)


# Other processes.


def test_two_processes_make_one_run(experiment_file: Path, tmp_path: Path) -> None:
    """Each with a seed of its own; what both need is made by one of them, and both seeds are in the table."""
    settings = [
        "--set",
        "methods.FuseLLM=null",
        "--set",
        "methods.FuseLLM published=null",
        "--set",
        "curve.per_domain=0",
    ]
    command = (*RUN, experiment_file, *settings)
    both = [
        start(tmp_path / f"err{seed}", *command, "--seed", str(seed), "--root", tmp_path / "together")
        for seed in (0, 1)
    ]
    for seed, process in enumerate(both):
        process.join()
        assert process.exitcode == 0, (tmp_path / f"err{seed}").read_text()
    assert_whole(tmp_path / "together")
    assert answer(*command, "--seed", "0", "--seed", "1", "--root", tmp_path / "one")[0] == 0
    assert results(tmp_path / "together") == results(tmp_path / "one")
    assert not list(unused(tmp_path / "together"))


def test_who_waits_for_another_process_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(progress, "notify", said.append)

    def wait() -> None:
        with exclusive_lock(tmp_path / "lock", "train CLM"):
            said.append("alone")

    waiting = threading.Thread(target=wait)
    with FileLock(tmp_path / "lock"):
        waiting.start()
        while not said:
            time.sleep(0.05)
        assert said == ["train CLM: another process is at work on it, waiting for that ..."]
    waiting.join()
    assert said[1:] == ["alone"]
