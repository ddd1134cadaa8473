"""Passages that are too long for a model are left out, named and counted, and targets that cannot be packed train."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import BloomConfig, MptConfig

from fusion.errors import UserError
from fusion.vocabulary.token_bytes import Vocabulary
from harness.config.loading import load
from harness.data.corpus import Document
from harness.data.passages import Passages, write_passages
from harness.data.sequences import PackedSequences
from harness.data.tokens import write_tokens
from harness.experiment import run
from harness.experiment.checks import check_lengths
from harness.experiment.headroom import audit
from harness.experiment.pipeline import open_experiment, predict, read_predictions
from harness.experiment.plan import plan_stages
from harness.store.artifacts import read_manifest
from tests.harness.tiny_models import save_model, sentences, tokenizer

CONTEXT = 20


@pytest.fixture(scope="module")
def passages(tmp_path_factory: pytest.TempPathFactory) -> Passages:
    """Documents of one to six lines, each a passage."""
    folder = tmp_path_factory.mktemp("passages")
    texts = ["".join(sentences(n, n)) for n in range(1, 7)]
    write_passages(folder, [Document(f"{n}.txt", "all", text, str(n)) for n, text in enumerate(texts, 1)], 10_000)
    return Passages(folder)


def packed(passages: Passages, sequence_length: int, context: int | None = None) -> PackedSequences:
    own, tokens = tokenizer(300), write_tokens(passages._folder, passages, tokenizer(300))
    return PackedSequences(passages, tokens, own, Vocabulary.from_tokenizer(own), sequence_length, context=context)


@pytest.mark.parametrize(("sequence_length", "context"), [(100, None), (400, 100)])
def test_passages_that_do_not_fit_are_left_out_and_the_rest_is_trained_on(
    passages: Passages, sequence_length: int, context: int | None
) -> None:
    """Whether it is the sequence or the model's context that they do not fit."""
    rows = packed(passages, sequence_length, context)
    assert 0 < len(rows.skipped) < len(passages)
    assert sorted([*rows.skipped, *(p for i in range(len(rows)) for p in rows.members(i))]) == list(
        range(len(passages))
    )
    assert rows.n_tokens == sum(int((row["labels"] >= 0).sum()) for row in rows)
    sentence = str(rows.skipped_sentence())
    assert sentence.startswith(f"{len(rows.skipped)} of 6 passages (")
    assert "longer than 100 tokens and are not trained on (first " in sentence
    assert packed(passages, 400).skipped_sentence() is None


def test_text_of_which_nothing_fits_is_refused(passages: Passages) -> None:
    with pytest.raises(UserError, match=r"every passage is longer than 5 tokens.* lower passages.max_bytes"):
        packed(passages, 5)


def test_one_passage_a_sequence_has_the_same_tokens_and_labels(passages: Passages) -> None:
    rows = packed(passages, 400)
    alone = rows.one_passage_each()
    assert len(rows) < len(alone) == len(passages) and alone.n_tokens == rows.n_tokens
    assert alone.sequence_length == 1 + rows._tokens.counts.max()
    labels = [np.sort(np.concatenate([row["labels"][row["labels"] >= 0] for row in some])) for some in (rows, alone)]
    assert np.array_equal(*labels)
    for row in alone:
        assert (np.diff(row["position_ids"]) != 1).sum() <= 1  # the passage, then padding


@pytest.fixture(scope="module")
def file(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BLOOM, which no packing serves, learns from MPT, which fails on texts that its configuration calls too long."""
    folder = tmp_path_factory.mktemp("too_long")
    save_model(folder / "bloom", BloomConfig, 300, 0)
    save_model(folder / "mpt", MptConfig, 340, 1, max_seq_len=CONTEXT, max_position_embeddings=None)
    raw: dict[str, Any] = yaml.safe_load(experiment_file.read_text(encoding="utf-8"))
    raw["roles"] = {
        "target": {"model": str(folder / "bloom"), "dtype": "float32"},
        "sources": {"mpt": {"model": str(folder / "mpt"), "dtype": "float32"}},
    }
    raw["methods"] = {name: raw["methods"][name] for name in ("{target}", "CLM", "FuseLLM")}
    path = folder / "too-long.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.mark.slow
def test_an_extraction_leaves_out_what_exceeds_the_models_context(
    file: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load(str(file))
    experiment = open_experiment(config, root)
    info = read_manifest(predict(experiment, "mpt")[1])["info"]
    passages = Passages(experiment.corpora.passages[1])
    lengths = {
        passages.name(p): len(read_predictions(experiment, "mpt").predictions(p).tokens) for p in range(len(passages))
    }
    long = [name for name, length in lengths.items() if length > CONTEXT]
    assert 0 < len(long) < len(lengths)
    assert info["too_long"] == long and "skipped" not in info
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"mpt: {len(long)} of {len(lengths)} passages are skipped, {len(long)} of them because they are longer" in told
    )
    assert f"{len(long)} passages are not counted" in audit(config, root).sentence


@pytest.mark.slow
def test_a_target_that_cannot_be_packed_is_trained_and_what_is_too_long_stands_below_the_table(
    file: Path, root: Path
) -> None:
    config = load(str(file), overrides=["training.sequence_length=50"])
    with pytest.warns(UserWarning, match="one passage a sequence, padded on the right"):
        folder = run.run(config, root)
    trained = [read_manifest(path.parent) for path in (root / "artifacts" / "train").glob("*/manifest.json")]
    assert len(trained) == 2 and trained[0]["info"]["skipped"] == trained[1]["info"]["skipped"] != []
    table = next(folder.glob("table*.md")).read_text(encoding="utf-8")
    assert table.count("are longer than 50 tokens and are not trained on") == 1


def test_what_is_skipped_is_counted_over_all_passages(
    experiment_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One passage of hundreds, which no sample need hold, is too long for the sequences."""
    words = "seven wizards brew potent ale "
    (tmp_path / "text").mkdir()
    for n in range(700):
        (tmp_path / "text" / f"{n:03d}.txt").write_text(f"{n} {words * (12 if n == 333 else 1)}", encoding="utf-8")
    settings = [f"corpus.path={tmp_path / 'text'}", "passages.max_bytes=1000", "training.sequence_length=64"]
    config = load(str(experiment_file), overrides=settings)
    dry = open_experiment(config, tmp_path, dry=True)
    check_lengths(open_experiment(config, tmp_path), plan_stages(dry))
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("333.txt (bytes from 0) is") == 1
    assert re.search(r"exceeds training\.sequence_length, 64\. 1\.\d% of the text is too long and is skipped", said)
