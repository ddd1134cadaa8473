"""Damaged files of artifacts, runs, checkpoints and parts: one sentence refuses them by name, or they are harmless."""

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusion.errors import UserError
from fusion.vocabulary.tokenization import encode_all
from harness.config.loading import load
from harness.data import tokens
from harness.evaluation import perplexity
from harness.experiment import run
from harness.experiment.identity import VERSIONS
from harness.experiment.pipeline import open_experiment, read_predictions, tokenise
from harness.experiment.plan import plan
from harness.stages.trainer.fusion_trainer import FusionTrainer
from harness.stages.trainer.sealing import last_checkpoint, layout_of
from harness.store.artifacts import Store, read_manifest
from harness.store.cleanup import unused
from tests.harness.command import answer, results, sentence

pytestmark = pytest.mark.slow
RUN = ("experiment", "run")


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


def test_damaged_runs_are_refused_or_harmless(again: Path, undisturbed: Path, experiment_file: Path) -> None:
    """Every file of a run's folder, damaged in every way: whatever answers has the same table."""
    generator = random.Random(8)
    (run,) = (path.parent for path in again.glob("runs/*/*/*/run.json"))
    table = results(undisturbed)["table.json"].decode()
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
def test_a_damaged_run_is_not_continued(name: str, again: Path, undisturbed: Path, experiment_file: Path) -> None:
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
    assert results(again) == results(undisturbed)


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
    undisturbed: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("passages", "perplexity"):
        shutil.copytree(undisturbed / "artifacts" / kind, tmp_path / "artifacts" / kind)
    config = load(str(experiment_file))
    with monkeypatch.context() as patch:
        patch.setattr(FusionTrainer, "compute_loss", _dying(FusionTrainer.compute_loss, 9))
        with pytest.raises(_Killed):
            run.run(config, tmp_path)
    (last,) = tmp_path.glob("artifacts/train/.*.partial/checkpoints/checkpoint-4")
    generator = random.Random(1)
    for path in sorted(p for p in last.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        for damage in DAMAGE if path.name != "complete" else DAMAGE[:2]:
            damage(path, generator)
            with pytest.raises(UserError, match=rf"{path.name} is damaged.*remove .*checkpoint-4"):
                run.run(config, tmp_path) if path.name == "optimizer.pt" else last_checkpoint(
                    last.parent, layout_of(config.training)
                )
            path.write_bytes(whole)
    shutil.rmtree(last)  # what the sentence advises
    run.run(config, tmp_path)
    assert results(tmp_path) == results(undisturbed)


def test_a_damaged_part_of_an_evaluation_is_not_continued(
    undisturbed: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    """Its file makes another model of it; its library, where tokens made anew are others, is refused."""
    folder = Path(shutil.copytree(made / "llama", tmp_path / "llama"))
    config = load(str(experiment_file), overrides=[f"roles.target.model={folder}"])
    assert {p.state for p in plan(config, again)} == {"ready"}
    with (folder / "tokenizer.json").open("a") as file:
        file.write("\n")
    todo = {p.spec.label for p in plan(config, again) if p.state == "missing"}
    assert todo >= {"llama", "CLM-seed0", "FuseLLM-seed0"} and "neox" not in todo
    experiment = open_experiment(load(str(experiment_file)), again)
    for otherwise in (lambda ids: ids[:-1], lambda ids: ids[::-1]):  # fewer tokens, and as many

        def encode_otherwise(tokenizer: object, texts: list[str], other: Any = otherwise) -> list[list[int]]:
            return [other(ids) for ids in encode_all(tokenizer, texts)]

        monkeypatch.setattr(tokens, "encode_all", encode_otherwise)
        shutil.rmtree(tokenise(experiment, "neox"))
        with pytest.raises(UserError, match=r"was made of other tokens of .* than .*: the tokenizer's library"):
            read_predictions(experiment, "neox").predictions(0)
