"""The token that precedes every passage: where it is put, what it is a key of, and whether another suits a model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import MptConfig

from fusion.errors import UserError
from harness.cli.doctor import check
from harness.data.passages import Passages
from harness.data.sequences import PackedSequences
from harness.data.tokens import Tokens
from harness.experiment.candidates import candidates
from harness.experiment.headroom import audit
from harness.experiment.method_context import MethodContext
from harness.experiment.pipeline import (
    TARGET,
    Experiment,
    evaluated_model,
    measure,
    predict,
    read_predictions,
    tokenise,
)
from harness.models.resolution import ModelSpec, resolve
from harness.stages import prefix_check
from harness.stages.prefix_check import prefix_warning
from harness.store.artifacts import Store
from harness.store.files import read_json
from tests.harness.bigrams import Bigrams, experiment
from tests.harness.tiny_models import save_model

# After <s> it knows nothing, after </s> it knows what comes.
MODEL = Bigrams({"</s>": {"ab": 0.9}, "ab": {"cd": 0.9}, "cd": {"ab": 0.9}})


def made(folder: Path, *settings: str) -> Experiment:
    folder.mkdir()
    return experiment(folder, ["abcd", "abcdab"], {"s": MODEL}, *settings, target=MODEL)


@pytest.mark.slow
def test_the_prefix_is_put_before_every_passage_and_is_part_of_every_key(tmp_path: Path) -> None:
    plain = made(tmp_path / "plain")
    other = made(tmp_path / "other", "roles.target.prefix=eos", "roles.sources.s.prefix=</s>")
    for role in (TARGET, "s"):
        assert predict(plain, role)[0].fingerprint != predict(other, role)[0].fingerprint
        before, after = (read_predictions(one, role).predictions(0) for one in (plain, other))
        assert (before.tokens[0], after.tokens[0]) == (0, 1)
        assert after.nll[0] == pytest.approx(-np.log(0.9), abs=1e-5) and before.nll[0] == pytest.approx(np.log(8))
    passages = Passages(other.corpora.passages[1])
    tokens = Tokens(tokenise(other, TARGET))
    assert tokenise(other, TARGET).name == tokenise(plain, TARGET).name  # they hold no prefix
    sequences = PackedSequences(passages, tokens, *other.models.tokenizer(TARGET), 64, prefix="eos")
    assert sequences[0]["input_ids"][0] == 1
    rows = [next(iter(candidates(one))) for one in (plain, other)]
    assert rows[0].candidate.fingerprint != rows[1].candidate.fingerprint
    nats = []
    for one in (plain, other):
        candidate = MethodContext(one, "target", 0).model(TARGET)
        result = measure(one, evaluated_model(one, "target", candidate))["perplexity"]
        nats.append((result.fingerprints, next(iter(result.examples())).numerator))
    assert nats[0][0] != nats[1][0] and nats[0][1] > nats[1][1] + 1


def test_a_prefix_that_there_is_not_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    from harness.experiment.checks import check_lengths

    with pytest.raises(UserError, match="no token '<nothing>'"):
        check_lengths(made(tmp_path / "a", "roles.sources.s.prefix=<nothing>"), [])


@pytest.mark.slow
def test_a_model_that_reads_better_after_another_token_is_named(tmp_path: Path) -> None:
    folder = MODEL.save(tmp_path / "model")
    store, texts = Store(tmp_path / "artifacts"), ["abcd", "abcdab", "abab", "abcdcd"]
    found = {
        prefix: prefix_warning(
            store, resolve(ModelSpec(name=folder, prefix=prefix), tmp_path), texts, dtype="float32", device="cpu"
        )
        for prefix in (None, "bos", "eos")
    }
    assert found[None] and "after the prefix '<s>'" in found[None] and "after '</s>'" in found[None]
    assert found["bos"] and found["eos"] is None


def test_an_answer_is_that_of_the_settings_that_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, asked = MODEL.save(tmp_path / "model"), list[str]()
    monkeypatch.setattr(prefix_check, "_bits_per_byte", lambda model, *rest: asked.append(model.name) or {})
    of_all = {"dtype": "float32", "texts": ["ab"]}
    settings: list[dict[str, Any]] = [
        {},
        {"attn_implementation": "eager"},
        {"prefix": "eos"},
        {"dtype": "bfloat16"},
        {"texts": ["cd"]},
    ]
    for number, setting in enumerate(settings * 2):
        own = {name: setting.get(name, given) for name, given in of_all.items()}
        spec = ModelSpec(name=folder, **{name: value for name, value in setting.items() if name not in own})
        prefix_warning(
            Store(tmp_path / "artifacts"), resolve(spec, tmp_path), own["texts"], dtype=own["dtype"], device="cpu"
        )
        assert len(asked) == min(number + 1, len(settings))


def test_texts_are_cut_to_the_context_whatever_it_is_called(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "mpt", MptConfig, 300, 0, max_seq_len=64, max_position_embeddings=None)
    model, store = resolve(ModelSpec(name=str(folder)), tmp_path), Store(tmp_path / "artifacts")
    prefix_warning(store, model, ["q5 " * 200] * 2, dtype="float32", device="cpu")  # MPT fails beyond its context
    (measured,) = (tmp_path / "artifacts").rglob("prefixes.json")
    assert read_json(measured, "")


@pytest.mark.slow
def test_audit_and_doctor_say_so(tmp_path: Path) -> None:
    config = made(tmp_path / "a").config
    assert "set its role's `prefix`" in audit(config, tmp_path / "root").sentence
    rows, _ = check(tmp_path / "root", gpu=False, models=[str(tmp_path / "a" / "target")])
    assert rows[-1][0].startswith("prefix of") and rows[-1][1] == "no other suits it better"
