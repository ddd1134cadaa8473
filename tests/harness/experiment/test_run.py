"""The whole line from text to table, on random models."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion.errors import UserError
from harness.config.loading import load
from harness.config.schema import Config
from harness.experiment import run
from harness.experiment.headroom import audit
from harness.experiment.pipeline import open_experiment, predict, read_predictions
from harness.experiment.plan import plan
from harness.stages import extraction
from harness.store.artifacts import Store
from harness.store.cleanup import leftovers, unused
from results.records import read

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, Path]:
    """Configuration, root and folder of a finished run."""
    config = load(str(experiment_file))
    root = tmp_path_factory.mktemp("root")
    return config, root, run.run(config, root)


def test_table_has_every_row_and_the_curve(finished: tuple[Config, Path, Path]) -> None:
    config, _, folder = finished
    table = json.loads((folder / "table.json").read_text())
    assert table["rows"] == list(config.methods)
    records = read([folder / "records"])
    assert set(records["method"]) == {"llama", "neox", "CLM", "FuseLLM", "FuseLLM published"}
    along = records[records["tokens"].notna()]
    # Measured before the first step and at two later ones, on three documents.
    assert along.groupby("method")["tokens"].nunique().to_dict() == {
        "CLM": 3,
        "FuseLLM": 3,
        "FuseLLM published": 3,
    }
    start = along[along["tokens"] == 0].pivot(index="example", columns="method", values="numerator")
    assert (start["CLM"] == start["FuseLLM"]).all()
    assert (folder / "learning_curves.png").exists()


def test_the_last_curve_point_is_the_saved_model(finished: tuple[Config, Path, Path]) -> None:
    _, _, folder = finished
    records = read([folder / "records"])
    records = records[records["method"] == "FuseLLM"]
    last = records[records["tokens"] == records["tokens"].max()].set_index("example")["numerator"]
    final = records[records["tokens"].isna()].set_index("example")["numerator"]
    np.testing.assert_allclose(last, final.loc[last.index], rtol=1e-5)


def test_training_learns(finished: tuple[Config, Path, Path]) -> None:
    _, _, folder = finished
    records = read([folder / "records"])
    nats = records[records["tokens"].isna()].groupby("method")["numerator"].sum()
    assert nats["CLM"] < nats["llama"] - 1
    assert nats["FuseLLM"] < nats["llama"] - 1


def test_the_checkpoint_is_a_plain_one(finished: tuple[Config, Path, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, root, _ = finished
    (trained,) = (root / "artifacts" / "train").glob("FuseLLM-seed0-*/model")
    _, info = AutoModelForCausalLM.from_pretrained(trained, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert AutoTokenizer.from_pretrained(trained)("a fox")["input_ids"]
    assert "Resolved configuration" in (trained / "README.md").read_text()


def test_a_second_run_makes_nothing_and_gives_the_same_bytes(finished: tuple[Config, Path, Path]) -> None:
    config, root, folder = finished
    before = {p: p.stat().st_mtime_ns for p in (root / "artifacts").rglob("*") if p.is_file()}
    tables = {p.name: p.read_bytes() for p in folder.glob("table.*")}
    assert run.run(config, root) == folder
    after = {p: p.stat().st_mtime_ns for p in (root / "artifacts").rglob("*") if p.is_file()}
    assert {p: t for p, t in after.items() if p.suffix != ".lock"} == {
        p: t for p, t in before.items() if p.suffix != ".lock"
    }
    assert {p.name: p.read_bytes() for p in folder.glob("table.*")} == tables


def test_plan_knows_what_is_there(finished: tuple[Config, Path, Path], tmp_path: Path) -> None:
    config, root, _ = finished
    assert {p.state for p in plan(config, root)} == {"ready"}
    fresh = plan(config, tmp_path)
    assert {p.state for p in fresh} == {"missing"}
    assert not (tmp_path / "artifacts").exists()
    assert sum(p.spec.kind == "train" for p in fresh) == 3
    # Another lambda extracts nothing again.
    other = config.model_copy(deep=True)
    other.methods["FuseLLM"]["lambda"] = 0.7
    todo = [p.spec for p in plan(other, root) if p.state == "missing"]
    assert sorted(s.kind for s in todo) == ["curve", "perplexity", "train"]


def test_lambda_one_is_clm(finished: tuple[Config, Path, Path], experiment_file: Path) -> None:
    """The same code at lambda = 1: not a digit differs, whatever the sources say."""
    _, root, _ = finished
    config = load(str(experiment_file), overrides=["methods.FuseLLM.lambda=1.0", "experiment=lambda-one"])
    records = read([run.run(config, root) / "records"])
    nats = records[records["tokens"].isna()].pivot(index="example", columns="method", values="numerator")
    assert (nats["FuseLLM"] == nats["CLM"]).all()
    assert (nats["FuseLLM published"] != nats["CLM"]).any()


def test_rows_at_once_do_not_change_the_training(finished: tuple[Config, Path, Path], experiment_file: Path) -> None:
    """Token-exact accumulation: two rows at once, or one after the other from a loader of its own, are one step."""
    _, root, _ = finished
    config = load(str(experiment_file), overrides=["training.micro_batch_size=2", "seeds=[5]", "experiment=micro-rows"])
    single = load(str(experiment_file), overrides=["training.workers=1", "seeds=[5]", "experiment=micro-rows"])
    # The number of rows at once is no part of an artifact's identity, so each gets a store of its own.
    nats = []
    for i, c in enumerate((config, single)):
        c.methods = {k: v for k, v in c.methods.items() if k in ("CLM", "FuseLLM")}
        own = root / f"micro-rows-{i}"
        records = read([run.run(c, own) / "records"])
        nats.append(records[records["tokens"].isna()].pivot(index="example", columns="method", values="numerator"))
    pd.testing.assert_frame_equal(nats[0], nats[1], rtol=1e-5)


def test_stored_predictions_are_those_of_the_model(finished: tuple[Config, Path, Path]) -> None:
    import torch

    from harness.data.passages import Passages
    from harness.models.checkpoints import load_model

    config, root, _ = finished
    small = open_experiment(config, root)
    model, passages = load_model(small.models.model("neox")), Passages(small.corpora.passages[1])
    reader = read_predictions(small, "neox")
    for passage in range(0, len(passages), 7):
        predictions = reader.predictions(passage)
        with torch.no_grad():
            log_q = model(torch.tensor(predictions.tokens[None]).long()).logits[0].log_softmax(-1)
        top = log_q.topk(5, -1)
        np.testing.assert_allclose(predictions.log_p, top.values.numpy(), rtol=1e-3)
        np.testing.assert_allclose(
            predictions.nll[:-1], -log_q[range(len(log_q) - 1), predictions.tokens[1:]], rtol=1e-4
        )
        assert predictions.byte_ends[0] == 0 and predictions.byte_ends[-1] == passages.n_bytes[passage]
        text = passages.text(passage).encode()
        for token, start, end in zip(
            predictions.tokens[1:], predictions.byte_ends[:-1], predictions.byte_ends[1:], strict=True
        ):
            assert reader.vocabulary.token_bytes[token] == text[start:end]


class _Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def _interrupt(monkeypatch: pytest.MonkeyPatch, place: object, name: str, calls: int) -> None:
    original, seen = getattr(place, name), 0

    def dying(*args: object, **kwargs: object) -> object:
        nonlocal seen
        seen += 1
        if seen > calls:
            raise _Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, dying)


def _interrupted_extraction(config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an extraction leaves behind that is killed when two shards are finished."""
    with monkeypatch.context() as patch:
        _interrupt(patch, extraction, "write_shard", 2)
        with pytest.raises(_Killed):
            predict(open_experiment(config, root), "neox")
    (begun,) = leftovers(Store(root / "artifacts"))
    return begun


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def test_a_resumed_extraction_has_the_same_bytes(
    finished: tuple[Config, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, root, _ = finished
    begun = _interrupted_extraction(config, tmp_path, monkeypatch)
    assert len(list(begun.glob("shard-*"))) == 2
    spec, resumed = predict(open_experiment(config, tmp_path), "neox")
    assert _bytes(resumed) == _bytes(Store(root / "artifacts").path(spec))
    assert len(_bytes(resumed)) > 3


def test_a_damaged_shard_of_an_interrupted_extraction_is_refused(
    finished: tuple[Config, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _, _ = finished
    begun = _interrupted_extraction(config, tmp_path, monkeypatch)
    (shard, _) = sorted(begun.glob("shard-*"))
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(UserError, match="does not match its checksum"):
        predict(open_experiment(config, tmp_path), "neox")


def test_a_resumed_training_is_bit_identical(
    finished: tuple[Config, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.stages.trainer.fusion_trainer import FusionTrainer

    config, root, _ = finished
    for kind in ("passages", "predictions", "map", "perplexity"):
        shutil.copytree(root / "artifacts" / kind, tmp_path / "artifacts" / kind)
    only = config.model_copy(deep=True)
    only.methods = {k: v for k, v in only.methods.items() if k in ("FuseLLM", "CLM")}
    with monkeypatch.context() as patch:
        _interrupt(patch, FusionTrainer, "compute_loss", 7)  # in the middle of the fourth step of the CLM row
        with pytest.raises(_Killed):
            run.run(only, tmp_path)
    (begun,) = leftovers(Store(tmp_path / "artifacts"))
    assert (begun / "checkpoints" / "checkpoint-2" / "complete").exists()
    run.run(only, tmp_path)
    for trained in (tmp_path / "artifacts" / "train").glob("*-seed0-*"):
        twin = root / "artifacts" / "train" / trained.name
        assert _bytes(trained) == _bytes(twin), trained.name
    for curve in (tmp_path / "artifacts" / "curve").glob("*-seed0-*"):
        twin = root / "artifacts" / "curve" / curve.name
        assert (curve / "curve.jsonl").read_bytes() == (twin / "curve.jsonl").read_bytes()


def test_changed_bytes_are_refused_by_name(finished: tuple[Config, Path, Path], tmp_path: Path) -> None:
    config, root, _ = finished
    shutil.copytree(root / "artifacts", tmp_path / "artifacts")
    (shard, *_) = sorted((tmp_path / "artifacts" / "predictions").glob("*/shard-000001.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 4
    shard.write_bytes(raw)
    with pytest.raises(UserError, match=r"shard-000001\.safetensors does not match its SHA-256"):
        run.run(config, tmp_path)


def test_text_in_both_corpora_is_refused(experiment_file: Path, made: Path, tmp_path: Path) -> None:
    config = load(str(experiment_file), overrides=[f"suites.perplexity.documents.path={made / 'train'}"])
    with pytest.raises(UserError, match="held-out documents are in the training corpus"):
        run.run(config, tmp_path)


def test_audit(finished: tuple[Config, Path, Path]) -> None:
    config, root, folder = finished
    found = audit(config, root)
    m = found.measures.set_index(["source", "domain"])
    target, neox, fused = (m.loc[(name, "all domains")] for name in ("llama (target)", "neox", "fused"))
    assert target["paired"] == 1 and 0.2 < neox["paired"] <= 1
    stages = ["native", "aligned", "projected", "kept", "selected", "in_loss"]
    assert target[stages].tolist() == pytest.approx([0] * 6, abs=1e-3)
    assert neox["native"] == pytest.approx(target["bits_per_byte"] - neox["bits_per_byte"], abs=1e-3)
    assert fused["in_loss"] == pytest.approx(target["in_loss"] + neox["in_loss"])
    assert target["chosen"] + neox["chosen"] == pytest.approx(1)
    # All domains are the sum of the domains, by their bytes.
    parts = found.measures.query("source == 'neox' and domain != 'all domains'")
    assert neox["projected"] * neox["bytes"] == pytest.approx((parts["projected"] * parts["bytes"]).sum())
    # The rows of the run, on the suite's documents.
    table = json.loads((folder / "table.json").read_text())
    learnt = m.loc[("FuseLLM", "all domains")]
    assert m.loc[("CLM", "all domains"), "ahead_of_reference"] == 0
    assert learnt["ahead_of_reference"] == pytest.approx(
        m.loc[("CLM", "all domains"), "bits_per_byte"] - learnt["bits_per_byte"]
    )
    assert set(found.measures.query("kind == 'row'")["source"]) == set(table["rows"]) - {"llama", "neox"}
    assert (found.folder / "audit.png").exists() and "neox" in found.sentence
    # The sentence names the step that loses most, the training as the last one.
    left = [*fused[stages], learnt["ahead_of_reference"]]
    steps = ["positions without a partner", "map and projection", "top k and tail", "the selection among sources"]
    steps += ["positions between partners", "the training"]
    lost = dict(zip((before - after for before, after in pairwise(left)), steps, strict=True))
    if fused["native"] > 0:
        first, *_ = found.sentence.split(". ")
        assert first.endswith(f"; what loses most is {lost[max(lost)]} ({max(lost):.4f})")


def test_the_audit_of_a_row(finished: tuple[Config, Path, Path], experiment_file: Path) -> None:
    _, root, _ = finished
    rows = ["methods.KD.method=distillation", "methods.KD.teachers=[neox,target]"]
    rows += ["methods.Online.method=distillation", "methods.Online.online=true", "methods.Online.teachers=[target]"]
    config = load(str(experiment_file), overrides=rows)
    by_row = {row: audit(config, root, row=row) for row in ("FuseLLM", "FuseLLM published", "KD")}
    whole = {row: found.measures.query("domain == 'all domains'").set_index("source") for row, found in by_row.items()}
    assert len({found.folder for found in by_row.values()}) == 3
    # Both follow the text, and see the same entries; the teachers' distributions are averaged, which is nobody's.
    before_selection = ["native", "aligned", "projected", "kept"]
    assert whole["KD"].loc["neox", before_selection].tolist() == whole["FuseLLM"].loc["neox", before_selection].tolist()
    assert np.isnan(whole["KD"].loc["neox", "in_loss"]) and np.isfinite(whole["KD"].loc["fused", "in_loss"])
    # Without a tail a true next token may be impossible, and what is left has no value.
    published = whole["FuseLLM published"].loc["fused"]
    assert published["no_entry"] > 0 and np.isnan(published["kept"]) and np.isfinite(published["projected"])
    assert "top k and tail, without limit" in by_row["FuseLLM published"].sentence
    assert json.loads((by_row["FuseLLM published"].folder / "audit.json").read_text())
    with pytest.raises(UserError, match="There is no row 'FusLLM'"):
        audit(config, root, row="FusLLM")
    for row in ("CLM", "Online"):
        with pytest.raises(UserError, match=f"There is no audit of {row}: choose a row of FuseLLM, or of distillation"):
            audit(config, root, row=row)


def test_an_audit_of_some_passages_draws_the_same_ones(finished: tuple[Config, Path, Path]) -> None:
    config, root, _ = finished
    some, again = audit(config, root, 3).measures, audit(config, root, 3).measures
    pd.testing.assert_frame_equal(some, again)
    assert set(some.query("domain == 'all domains' and kind != 'row'")["passages"]) == {3}


def test_unused_lists_what_no_run_names(finished: tuple[Config, Path, Path]) -> None:
    _, root, _ = finished
    used = set(json.loads((finished[2] / "run.json").read_text())["artifacts"])
    assert not used & {str(p.relative_to(root)) for p, _ in unused(root)}


def test_records_of_other_text_are_never_pooled(experiment_file: Path, made: Path, tmp_path: Path) -> None:
    """The same configuration on another text is another run, though every path is the same."""
    shutil.copytree(made / "test", tmp_path / "text")
    settings = [f"suites.perplexity.documents.path={tmp_path / 'text'}", "methods.CLM.method=as_is"]
    settings += ["methods.FuseLLM=null", "methods.FuseLLM published=null"]
    config = load(str(experiment_file), overrides=settings)
    first = run.run(config, tmp_path / "root")
    (tmp_path / "text" / "000.txt").write_text("quite another text", encoding="utf-8")
    second = run.run(config, tmp_path / "root")
    assert first != second
    assert len(read([second / "records"]).query("method == 'neox'")) == 24


def test_seeds_of_finished_runs_are_pooled(experiment_file: Path, tmp_path: Path) -> None:
    settings = ["methods.FuseLLM=null", "methods.FuseLLM published=null", "curve.per_domain=0"]
    for seed in (0, 1):
        folder = run.run(load(str(experiment_file), overrides=settings, seeds=[seed]), tmp_path)
    assert set(read([folder / "records"]).query("method == 'CLM'")["seed"]) == {0, 1}
    assert "| CLM | 2 |" in (folder / "table.md").read_text()


def test_a_head_that_cannot_be_fused_is_trained_all_the_same(
    finished: tuple[Config, Path, Path], experiment_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loud fallback: the model's own logits, in training and at the points of the curve."""
    import fusion.modeling.heads

    _, root, _ = finished
    monkeypatch.setattr(
        fusion.modeling.heads, "_find", lambda model: fusion.modeling.heads.Split(False, "it is a test")
    )
    config = load(str(experiment_file), overrides=["experiment=dense", "seeds=[7]"])
    config.methods = {k: v for k, v in config.methods.items() if k in ("CLM", "FuseLLM")}
    with pytest.warns(UserWarning, match="it is a test"):
        dense = read([run.run(config, root / "dense") / "records"])
    monkeypatch.undo()
    fused = read([run.run(config, root / "fused") / "records"])
    keys = ["method", "example", "tokens"]
    merged = dense.merge(fused, on=keys, suffixes=("_dense", "_fused"))
    assert len(merged) == len(dense) > 0
    np.testing.assert_allclose(merged["numerator_dense"], merged["numerator_fused"], rtol=1e-4)


def test_every_manifest_tells_how_it_was_made(finished: tuple[Config, Path, Path]) -> None:
    config, root, _ = finished
    manifests = [json.loads(p.read_text()) for p in (root / "artifacts").glob("*/*/manifest.json")]
    assert {m["kind"] for m in manifests} == {
        "passages", "tokens", "predictions", "prefix_check", "map", "train", "curve", "perplexity",
    }  # fmt: skip
    for manifest in manifests:
        assert manifest["info"]["configuration"]["training"] == config.model_dump(mode="json")["training"]
        assert manifest["command"] and manifest["libraries"]["torch"] and manifest["files"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [["training.dtype=bfloat16"], ["training.gradient_checkpointing=true"], ["training.epochs=1.5"]]
)
def test_other_ways_of_training_come_near(
    finished: tuple[Config, Path, Path], experiment_file: Path, tmp_path: Path, settings: list[str]
) -> None:
    _, root, folder = finished
    shutil.copytree(root / "artifacts" / "predictions", tmp_path / "artifacts" / "predictions")
    config = load(str(experiment_file), overrides=settings)
    config.methods = {k: v for k, v in config.methods.items() if k in ("CLM", "FuseLLM")}
    other, records = (read([f / "records"]) for f in (run.run(config, tmp_path), folder))
    final, expected = (
        r[r["tokens"].isna() & r["method"].isin(config.methods)].groupby("method")["numerator"].sum()
        for r in (other, records)
    )
    start = records.query("method == 'llama'")["numerator"].sum()
    if "epochs" in settings[0]:
        assert (final < expected).all()
    else:
        np.testing.assert_allclose((start - final).to_numpy(), (start - expected).to_numpy(), rtol=1e-2)


def test_strided_perplexity_is_another_metric(
    finished: tuple[Config, Path, Path], experiment_file: Path, tmp_path: Path
) -> None:
    _, _, folder = finished
    settings = [
        "suites.perplexity.mode=strided",
        "suites.perplexity.window=32",
        "methods.FuseLLM=null",
        "methods.FuseLLM published=null",
    ]
    config = load(str(experiment_file), overrides=[*settings, "curve.per_domain=0"])
    config.methods["CLM"] = {"method": "as_is", "role": "target"}
    strided = read([run.run(config, tmp_path) / "records"])
    assert set(strided["metric"]) == {"bits_per_byte_strided"}
    rolling = read([folder / "records"])
    rolling = rolling[rolling["tokens"].isna()]
    both = strided.merge(rolling, on=["method", "example"], suffixes=("", "_rolling")).query("method == 'neox'")
    assert len(both) == 24 and (both["numerator"] != both["numerator_rolling"]).any()
