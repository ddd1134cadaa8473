"""Distillation, ULD and ALM through the whole line, on models whose every probability is written down."""

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion.errors import UserError
from fusion.types import LEAST_STD
from harness.data.passages import Passages
from harness.experiment import run as running
from harness.experiment.candidates import candidates
from harness.experiment.identity import run_fingerprint
from harness.experiment.pipeline import Experiment, open_experiment, predict, read_predictions
from harness.experiment.plan import plan
from results.records import read
from tests.harness.bigrams import Bigrams, experiment, other
from tests.harness.listening import rows_of, trained

pytestmark = pytest.mark.slow

TEXTS = ["abcdab", "acbdcd", "ddabc"]
TARGET = Bigrams({"<s>": {"a": 0.3, "ab": 0.2}, "ab": {"cd": 0.3, "c": 0.05}, "a": {"c": 0.4}, "d": {"d": 0.6}})
TEACHER = Bigrams({"<s>": {"ab": 0.5, "d": 0.3}, "ab": {"cd": 0.6, "c": 0.2}, "b": {"d": 0.9}, "cd": {"ab": 0.7}})
FLOAT32 = "extraction.store_dtype=float32"


class Line:
    """From settings of the one row to what its training logs, and the gradient that it follows."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch, self._made = folder, monkeypatch, 0

    def experiment(
        self, row: Mapping[str, Any], *settings: str, teacher: Bigrams = TEACHER, target: Bigrams = TARGET
    ) -> Experiment:
        self._made += 1
        folder = self.folder / str(self._made)
        folder.mkdir()
        return experiment(folder, TEXTS, {"s": teacher}, f"methods.X={json.dumps(row)}", *settings, target=target)

    def learns(self, row: Mapping[str, Any], *settings: str, **models: Any) -> tuple[float, dict[str, torch.Tensor]]:
        """Nats a token of the second term, and the gradient."""
        step, gradients = trained(self.experiment(row, *settings, **models), self.monkeypatch)
        return step["fusion_nats_per_token"], gradients


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Line:
    return Line(tmp_path, monkeypatch)


def apart(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], factor: float = 1) -> float:
    """The greatest difference of two gradients, the second one times `factor`."""
    assert one.keys() == other.keys()
    return max(float((one[name] - factor * other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(("divergence", "temperature"), [("forward_kl", 2), ("reverse_kl", 1), ("jensen_shannon", 1)])
def test_online_is_offline_with_the_whole_vocabulary(line: Line, divergence: str, temperature: float) -> None:
    row = {"method": "distillation", "lambda": 0.25, "divergence": divergence, "temperature": temperature}
    stored = line.learns(row, "extraction.k=8", FLOAT32, "extraction.temperatures=[3, 2]")
    along = line.learns({**row, "online": True})
    assert stored[0] == pytest.approx(along[0], rel=1e-5)
    assert along[0] > 0.01 and apart(stored[1], along[1]) < 1e-6
    # By the tables: divergence of the two rows of the token read, at all positions that a token follows.
    small = line.experiment(row)
    sums = 0.0
    for passage in range(3):
        tokens = [
            small.models.tokenizer("target")[1].tokens[i]
            for i in read_predictions(small, "target").predictions(passage).tokens
        ]
        for token in tokens[:-1]:
            p, q = (_powered(model, token, temperature) for model in (TEACHER, TARGET))
            sums += temperature**2 * _DENSE[divergence](p, q)
    assert along[0] == pytest.approx(sums / _tokens(small), rel=1e-4)


def _powered(model: Bigrams, token: str, temperature: float) -> np.ndarray:
    row = model.table.get(token, {})
    left = (1 - sum(row.values())) / (len(model.tokens) - len(row))
    p = np.array([row.get(t, left) for t in model.tokens]) ** (1 / temperature)
    return p / p.sum()


def _kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


_DENSE = {
    "forward_kl": _kl,
    "reverse_kl": lambda p, q: _kl(q, p),
    "jensen_shannon": lambda p, q: (_kl(p, (p + q) / 2) + _kl(q, (p + q) / 2)) / 2,
}


def _tokens(small: Experiment) -> int:
    """What the sums are divided by: every next token, and an end after each text."""
    return sum(len(read_predictions(small, "target").predictions(passage).tokens) for passage in range(3))


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_model_teaches_itself_nothing(line: Line, online: bool, divergence: str) -> None:
    """Not online, and not with the bucket of what is beyond its top 3; as its own role or as a copy."""
    row = {"method": "distillation", "lambda": 0.5, "online": online, "divergence": divergence}
    _, clm = line.learns({"method": "clm"})
    assert max(float(g.abs().max()) for g in clm.values()) > 0.01
    for teachers in (["target"], ["s"]):
        nats, gradient = line.learns({**row, "teachers": teachers}, "extraction.k=3", FLOAT32, teacher=TARGET)
        assert abs(nats) < 1e-6 and apart(gradient, clm, 0.5) < 1e-6


def test_a_teacher_with_another_tokenizer_comes_through_map_and_alignment(line: Line) -> None:
    """The stored distributions of the source, fused alone: what FuseLLM makes of them without the target."""
    source = other({"<s>": {"ab": 0.5, "x": 0.25}, "ab": {"c": 0.5, "cd": 0.2}, "d": {"a": 0.5}})
    source = Bigrams(source.table, source.tokens, ("ab", "cd"), eos=source.eos)
    models = {"teacher": source, "target": Bigrams(TARGET.table, merges=("ab",))}  # which has no partner within cd
    entries = {"projection": "token", "inside": "none", "true_token": "top_k", "map": "mined"}
    alone = {"include_target": False, "method": "fusellm", **entries}
    distilled = rows_of(line.experiment({"method": "distillation", **entries}, **models), line.monkeypatch)[0]
    fused = rows_of(line.experiment(alone, **models), line.monkeypatch)[0]
    paired = distilled["weight"][:, 0] > 0
    assert 0 < paired.sum() < (fused["weight"] > 0).sum()
    for name in ("ids", "p", "tail"):
        np.testing.assert_allclose(distilled[name][paired, 0], fused[name][paired], atol=1e-7)


def test_sorted_probabilities_of_another_tokenizer(line: Line) -> None:
    source = other({"<s>": {"x": 0.5, "ab": 0.2}, "ab": {"a": 0.6}})
    nats, _ = line.learns({"method": "uld", "lambda": 0.5}, "extraction.k=11", FLOAT32, teacher=source)
    small = line.experiment({"method": "uld"}, teacher=source)
    sums = 0.0
    for passage in range(3):
        ours, theirs = (read_predictions(small, name).predictions(passage) for name in ("target", "s"))
        for i, end in list(enumerate(ours.byte_ends))[:-1]:
            at = [j for j, other_end in enumerate(theirs.byte_ends) if other_end == end]
            if at:
                p = _powered(source, source.tokens[theirs.tokens[at[-1]]], 1)
                q = _powered(TARGET, TARGET.tokens[ours.tokens[i]], 1)
                sums += np.abs(np.sort(p)[::-1] - np.append(np.sort(q)[::-1], [0, 0, 0])).sum()
    assert nats == pytest.approx(sums / _tokens(small), rel=1e-4)


def test_standardised_probabilities_of_another_tokenizer(line: Line) -> None:
    """From the stored standard deviations; a step follows the gradient."""
    source = other({"<s>": {"x": 0.5, "ab": 0.2}, "ab": {"a": 0.6}})
    nats, gradient = line.learns(
        {"method": "infifusion", "lambda": 0.5, "top_k": 3}, "extraction.k=11", FLOAT32, teacher=source
    )
    small = line.experiment({"method": "infifusion"}, teacher=source)
    sums = 0.0
    for passage in range(3):
        ours, theirs = (read_predictions(small, name).predictions(passage) for name in ("target", "s"))
        for i, end in list(enumerate(ours.byte_ends))[:-1]:
            at = [j for j, other_end in enumerate(theirs.byte_ends) if other_end == end]
            if at:
                p, q = (
                    _standardised(_powered(model, model.tokens[token], 1))
                    for model, token in ((source, theirs.tokens[at[-1]]), (TARGET, ours.tokens[i]))
                )
                sums += np.abs(p[:3] - q[:3]).sum()
    assert nats == pytest.approx(sums / _tokens(small), rel=1e-4)
    assert max(float(g.abs().max()) for g in gradient.values()) > 0


def _standardised(p: np.ndarray) -> np.ndarray:
    """The softmax of the logits divided by their standard deviation, sorted."""
    log_p = np.log(p / p.max())
    scaled = np.exp(log_p / max(log_p.std(), LEAST_STD))
    return np.sort(scaled / scaled.sum())[::-1]


def test_likelihoods_of_the_same_bytes(line: Line) -> None:
    """The target reads ab|cd, the source ab|c|d."""
    source = other({"ab": {"c": 0.5}, "c": {"d": 0.9, "b": 0.05}, "d": {"ab": 0.4, "d": 0.3}})
    nats, _ = line.learns({"method": "alm", "lambda": 0.5, "temperature": 3}, teacher=source)
    small = line.experiment({"method": "alm"}, teacher=source)
    sums, chunks = 0.0, 0
    for passage in range(3):
        spelled = [(read_predictions(small, n).predictions(passage), m) for n, m in (("s", source), ("target", TARGET))]
        common = sorted(set(spelled[0][0].byte_ends.tolist()) & set(spelled[1][0].byte_ends.tolist()))
        for start, end in pairwise(common):
            logs = []
            for predictions, model in spelled:
                ends = predictions.byte_ends.tolist()
                steps = range(ends.index(start), ends.index(end))
                tokens = [model.tokens[i] for i in predictions.tokens]
                p = [_powered(model, tokens[i], 1)[model.tokens.index(tokens[i + 1])] for i in steps]
                logs.append(math.fsum(map(math.log, p)))
            pair = [np.array([math.exp(x / 3), 1 - math.exp(x / 3)]) for x in logs]
            sums, chunks = sums + 3 * _kl(*pair), chunks + 1
    assert chunks > 8
    assert nats == pytest.approx(sums / _tokens(small), rel=1e-4)


ROWS = {
    "KD": {"method": "distillation"},
    "KD online": {
        "method": "distillation",
        "online": True,
        "divergence": "jensen_shannon",
        "teachers": ["s", "target"],
    },
    "ULD": {"method": "uld"},
    "ALM": {"method": "alm"},
}


def test_rows_of_a_table(line: Line) -> None:
    small = line.experiment(
        {"method": "clm"}, f"methods={json.dumps(ROWS)}", "training.learning_rate=0.1", "training.epochs=3"
    )
    folder = running.run(small.config, line.folder / "root")
    records = read([folder / "records"])
    assert set(records["method"]) == {"X", *ROWS}
    nats = records[records["tokens"].isna()].groupby("method")["numerator"].sum()
    assert len(set(nats)) == 5
    # All see the same tokens in the same steps.
    logs = [
        [entry["tokens"] for entry in json.loads(path.read_text()) if "tokens" in entry]
        for path in (line.folder / "root" / "artifacts" / "train").glob("*/log.json")
    ]
    assert len(logs) == 5 and all(log == logs[0] for log in logs) and len(logs[0]) == 3
    # One extraction of the source for all of them; the target's own predictions teach nobody but itself.
    made = [p.name for p in (line.folder / "root" / "artifacts" / "predictions").iterdir() if p.is_dir()]
    assert len(made) == 1


def test_a_whole_distribution_is_stored_at_other_temperatures(line: Line) -> None:
    settings = ("extraction.k=3", FLOAT32, "extraction.temperatures=[2]")
    small = line.experiment({"method": "clm"}, *settings)
    predictions = read_predictions(small, "s", 2).predictions(0)
    for i, token in enumerate(predictions.tokens):
        p = _powered(TEACHER, TEACHER.tokens[token], 2)
        np.testing.assert_allclose(np.exp(predictions.log_p[i]), p[predictions.ids[i]], rtol=1e-5)
        assert predictions.tail[i] == pytest.approx(1 - p[predictions.ids[i]].sum(), abs=1e-6)
        following = predictions.tokens[i + 1 :][:1]
        assert predictions.nll[i] == pytest.approx(-np.log(p[following[0]]) if len(following) else 0, rel=1e-5)


def test_what_came_later_changes_no_fingerprint_at_its_default(line: Line) -> None:
    plain = line.experiment({"method": "clm"})
    assert set(predict(plain, "s")[0].params) == {"k", "dtype", "passages_per_shard"}
    for setting in (FLOAT32, "extraction.temperatures=[2]"):
        changed = line.experiment({"method": "clm"}, setting)
        assert predict(plain, "s")[0].fingerprint != predict(changed, "s")[0].fingerprint
        assert run_fingerprint(plain) != run_fingerprint(changed)


def test_an_empty_row_teaches_nothing(line: Line) -> None:
    """Where ranks share rows unevenly, some read one."""
    for row in ROWS.values():
        rows = rows_of(line.experiment(row), line.monkeypatch)
        full, empty = rows[0], rows[len(rows)]
        assert full.keys() == empty.keys() and (empty["labels"] == -100).all()
        for name in full.keys() - {"input_ids", "position_ids", "labels"}:
            assert len(empty[name]) == 0 and empty[name].dtype == full[name].dtype


@pytest.mark.parametrize(
    ("row", "teacher", "sentence"),
    [
        (
            {"method": "distillation", "teachers": ["teacher"]},
            TEACHER,
            "methods.X needs a teacher, and there is none: say who",
        ),
        ({"method": "distillation", "online": True}, other(), "X has s read the target's tokens, but its tokenizer is"),
        ({"method": "distillation", "temperature": 2}, TEACHER, "temperature 2, and those extracted are 1: add it to"),
        (
            {"method": "distillation", "divergence": "jensen_shannon", "tail": "gold"},
            TEACHER,
            "methods.X: jensen_shannon compares all outcomes",
        ),
        ({"method": "distillation", "online": True, "map": "em"}, TEACHER, "methods.X: map is about stored distr"),
        ({"method": "distillation", "divergence": "kl"}, TEACHER, "no divergence 'kl'"),
        ({"method": "alm", "temperature": 0}, TEACHER, "methods.X has temperature = 0, which is wrong"),
    ],
)
def test_what_cannot_be_had_is_refused_by_a_plan(
    line: Line, row: dict[str, Any], teacher: Bigrams, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        plan(line.experiment(row, teacher=teacher).config, line.folder / "root")


@pytest.mark.filterwarnings("ignore:.*its logits are not those of its output projection")
def test_passages_of_which_nothing_is_known_teach_nothing(line: Line) -> None:
    """A teacher whose logits about a passage are not finite takes no part there."""
    settings = ("extraction.max_skipped_fraction=1",)
    for row in ROWS.values():
        if row.get("online"):
            continue
        small = line.experiment(row, *settings)
        weights = small.models.model("s").folder / "model.safetensors"
        tensors = load_file(weights)
        tensors["model.embed_tokens.weight"][list(TEACHER.tokens).index("d")] = math.nan
        save_file(tensors, weights, {"format": "pt"})
        again = open_experiment(small.config, line.folder / row["method"])
        assert any(
            read_predictions(again, "s").predictions(p).skipped for p in range(len(Passages(again.corpora.passages[1])))
        )
        (candidate,) = (r.candidate for r in candidates(again))
        (step,) = [e for e in json.loads((candidate.training / "log.json").read_text()) if "tokens" in e]
        assert math.isfinite(step["fusion_nats_per_token"]) and step["fusion_nats_per_token"] > 0
