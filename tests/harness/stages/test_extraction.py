"""The extraction stage: several processes on one folder, skipped passages, other numbers on resume, both packings."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import harness.models.checkpoints
from baselines.fusellm import FuseLLMParameters
from fusion.alignment.fuse import fuse_sequence
from fusion.errors import UserError
from harness.config.loading import load
from harness.data.passages import Passages
from harness.data.sequences import PackedSequences
from harness.data.tokens import Tokens
from harness.experiment.headroom import audit
from harness.experiment.identity import run_fingerprint
from harness.experiment.pipeline import loss_resources, open_experiment, predict, read_predictions, tokenise
from harness.stages import extraction
from harness.store.artifacts import Spec, Store
from harness.store.cleanup import leftovers
from harness.store.leases import Leases
from tests.harness.experiment.test_run import _bytes, _interrupted_extraction

# `fusellm extract`, which says when it has read a shard and stops there for a while before it writes it.
SLOW_WORKER = """
import sys, time
from harness.stages import extraction
from harness.cli import app
write = extraction.write_shard
def slowly(path, *args, **options):
    print(path.name, flush=True)
    time.sleep(float(sys.argv[1]))
    write(path, *args, **options)
extraction.write_shard = slowly
app(["extract", *sys.argv[2:]])
"""


@pytest.fixture(scope="module")
def alone(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extraction of one process."""
    return predict(open_experiment(load(str(experiment_file)), tmp_path_factory.mktemp("alone")), "neox")[1]


def _start(experiment_file: Path, root: Path, pause: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", SLOW_WORKER, str(pause), str(experiment_file), "--role", "neox"]
    return subprocess.Popen([*command, "--root", str(root)], stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_processes_share_an_extraction_and_one_is_killed(
    alone: Path, experiment_file: Path, tmp_path: Path
) -> None:
    count = len(_bytes(alone))
    with _start(experiment_file, tmp_path, pause=600) as stuck:
        try:
            assert stuck.stdout is not None
            held = stuck.stdout.readline().strip()
            with _start(experiment_file, tmp_path, pause=0) as other:
                assert other.stdout is not None
                made = {other.stdout.readline().strip() for _ in range(count - 1)}
                (begun,) = (tmp_path / "artifacts" / "predictions").glob(".*.partial")
                assert held not in made and not (begun / held).exists()
                assert not list(leftovers(Store(tmp_path / "artifacts")))
                stuck.kill()
                assert other.stdout.readline().strip() == held
                said = other.stdout.readline().strip()
        finally:
            stuck.kill()
    whole, *others = (
        p for p in (tmp_path / "artifacts" / "predictions").iterdir() if p.suffix not in (".lock", ".verified")
    )
    assert not others and said == f"neox: {whole}"
    assert _bytes(whole) == _bytes(alone)
    assert sorted(p.name for p in whole.iterdir()) == sorted(p.name for p in alone.iterdir())


@pytest.mark.slow
def test_who_comes_late_uses_what_another_has_completed(tmp_path: Path) -> None:
    store, spec = Store(tmp_path), Spec("thing", "late", 1, {}, {})

    def build(folder: Path) -> None:
        (folder / "part").write_text("made", encoding="utf-8")

    def share(folder: Path, leases: Leases) -> None:
        Store(tmp_path).ensure(spec, build, make_parts=lambda folder, leases: None)
        leases.take("part")
        raise AssertionError("the leases' folder is gone")

    path = store.ensure(spec, build, make_parts=share)
    assert (path / "part").read_text() == "made"
    assert sorted(p.suffix for p in path.parent.iterdir() if p != path) == [".lock", ".verified"]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "fits"), [(1e-7, True), (0.1, False)])
def test_a_model_that_reads_otherwise_on_resume_is_refused(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float, fits: bool
) -> None:
    """The same files, but another machine or library: here, another rounding and a wrong scale."""
    config = load(str(experiment_file))
    begun = _interrupted_extraction(config, tmp_path, monkeypatch)
    loading = harness.models.checkpoints.load_model

    def otherwise(*args: Any, **options: Any) -> Any:
        model = loading(*args, **options)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(1 + change).add_(change)
            model.get_input_embeddings().weight.mul_(1 + change)
            for norm in model.modules():
                if isinstance(norm, torch.nn.LayerNorm):
                    norm.weight.mul_(1 + 10 * change)
        return model

    monkeypatch.setattr(extraction, "load_model", otherwise)
    if fits:
        assert predict(open_experiment(config, tmp_path), "neox")[1].exists()
        return
    with pytest.raises(UserError, match=r"neox reads .* otherwise than when .*shard-000000.* where 0\.001 are allowed"):
        predict(open_experiment(config, tmp_path), "neox")
    assert len(_bytes(begun)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_damage_to_any_finished_shard_is_refused_by_name(
    alone: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    config = load(str(experiment_file))
    begun = _interrupted_extraction(config, tmp_path, monkeypatch)
    shard = begun / "shard-000001.safetensors"  # not the one that is compared
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 16
    shard.write_bytes(raw[:-9] if damage == "truncated" else raw)
    with pytest.raises(UserError, match=r"shard-000001\.safetensors does not match its checksum"):
        predict(open_experiment(config, tmp_path), "neox")
    shard.unlink()
    assert _bytes(predict(open_experiment(config, tmp_path), "neox")[1]) == _bytes(alone)


@pytest.mark.slow
def test_both_packings_are_one_artifact_with_the_same_numbers(
    alone: Path, experiment_file: Path, tmp_path: Path
) -> None:
    config = load(str(experiment_file), overrides=["extraction.compression=none"])
    plain = open_experiment(config, tmp_path)
    packed = open_experiment(load(str(experiment_file)), alone.parents[2])
    assert predict(plain, "neox")[1].name == alone.name
    assert run_fingerprint(plain) == run_fingerprint(packed)
    readers = read_predictions(plain, "neox"), read_predictions(packed, "neox")
    for passage in range(len(Passages(plain.corpora.passages[1]))):
        one, other = (vars(reader.predictions(passage)) for reader in readers)
        for name in ("tokens", "byte_ends", "ids", "log_p", "tail", "nll"):
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])
    assert sum(map(len, _bytes(alone).values())) < sum(map(len, _bytes(predict(plain, "neox")[1]).values()))


@pytest.fixture(scope="module")
def spoilt(experiment_file: Path, made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment whose source has no finite logits about two of its passages, and whose target about one of them."""
    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(made / "train", folder / "train")
    (folder / "train" / "100.txt").write_text("the quick brown § fox", encoding="utf-8")
    (folder / "train" / "101.txt").write_text("seven wizards £ brew", encoding="utf-8")
    for name, characters in (("neox", "§£"), ("llama", "£")):
        tokenizer = AutoTokenizer.from_pretrained(made / name)
        model = AutoModelForCausalLM.from_pretrained(made / name)
        with torch.no_grad():
            for character in characters:
                model.get_input_embeddings().weight[tokenizer(character)["input_ids"][-1]] = float("nan")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    raw = yaml.safe_load(experiment_file.read_text(encoding="utf-8"))
    raw["roles"]["target"]["model"] = str(folder / "llama")
    raw["roles"]["sources"]["neox"]["model"] = str(folder / "neox")
    raw["corpus"]["path"] = str(folder / "train")
    (folder / "spoilt.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder / "spoilt.yaml"


@pytest.mark.slow
def test_too_many_passages_without_finite_logits_end_the_run(spoilt: Path, tmp_path: Path) -> None:
    small = open_experiment(load(str(spoilt)), tmp_path)
    predict(small, "target")  # one passage may always be skipped
    with pytest.raises(
        UserError, match=r"neox about 2 of \d+ passages are not finite \(first 100.txt .*max_skipped_fraction"
    ):
        predict(small, "neox")
    strict = open_experiment(load(str(spoilt), overrides=["extraction.max_skipped_fraction=0"]), tmp_path / "strict")
    with pytest.raises(UserError, match=r"llama about 1 of \d+ passages .*max_skipped_fraction = 0 allows"):
        predict(strict, "target")


@pytest.mark.slow
def test_what_was_left_out_before_an_interruption_counts(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a passage a shard no process sees two; the threshold holds for all of them."""
    settings = ["extraction.passages_per_shard=1"]
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "_check_skipped", lambda *_: None)
        patch.setattr(Store, "_complete", _killed)
        with pytest.raises(KeyboardInterrupt):
            predict(open_experiment(load(str(spoilt), overrides=settings), tmp_path), "neox")
    with pytest.raises(UserError, match="neox about 2 of"):
        predict(open_experiment(load(str(spoilt), overrides=settings), tmp_path), "neox")
    more = load(str(spoilt), overrides=[*settings, "extraction.max_skipped_fraction=0.1"])
    assert predict(open_experiment(more, tmp_path), "neox")[1].exists()


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_passages_without_finite_logits_are_named_counted_and_fused_without(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(str(spoilt), overrides=["extraction.max_skipped_fraction=0.1"])
    small = open_experiment(config, tmp_path)
    manifest = json.loads((predict(small, "neox")[1] / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["info"]["skipped"] == ["100.txt (bytes from 0)", "101.txt (bytes from 0)"]
    told = " ".join(capsys.readouterr().err.split())
    assert "neox: its logits about 100.txt (bytes from 0) are not finite; the passage is skipped." in told
    assert "neox: 2 of" in told
    fusion = FuseLLMParameters().loss(["neox"])
    resources, readers = loss_resources(small, "audit", fusion.requirements("target"))
    passages, (tokenizer, vocabulary) = Passages(small.corpora.passages[1]), small.models.tokenizer("target")
    chosen = {}
    for passage in range(len(passages)):
        row = fuse_sequence(
            [{name: reader.predictions(passage) for name, reader in readers.items()}],
            [int(passages.n_bytes[passage])],
            target="target",
            sources=[resources.source(name) for name in fusion.sources],
            target_vocabulary=vocabulary,
            switches=fusion.switches,
        )
        chosen[passages.name(passage)[:3]] = {row.names[c] if c >= 0 else int(c) for c in row.chosen}
        expected = row.targets.p[row.fusion_weight > 0]
        assert np.isfinite(expected).all()
    assert chosen["100"] == {"target"}
    assert chosen["101"] == {-1}
    features = partial(fusion.features, resources=resources)
    tokens = Tokens(tokenise(small, "target"))
    for row in PackedSequences(passages, tokens, tokenizer, vocabulary, 200, features, readers):
        assert all(np.isfinite(row[name]).all() for name in ("p", "tail", "weight"))
    assert "2 passages are not counted" in audit(config, tmp_path).sentence
