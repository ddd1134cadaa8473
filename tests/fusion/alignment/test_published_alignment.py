"""The published alignment and projection, entry for entry: real predictions, and what the published algorithm made."""

import gzip
import json
from functools import cache

import numpy as np
import pytest

from fusion.alignment.fuse import Source, fuse_sequence
from fusion.alignment.pairing import ALIGNMENTS
from fusion.alignment.projection import project_entries
from fusion.alignment.selection import FUSIONS, SourceScores
from fusion.switches import PRESETS, Switches
from fusion.types import Predictions, Sparse
from fusion.vocabulary.token_bytes import Vocabulary
from tests.shared import shared

CASES = ["gemma_to_smol_0", "gemma_to_smol_10", "smol_to_gemma_0", "smol_to_gemma_10"]


@cache
def vocabulary(name: str) -> Vocabulary:
    with gzip.open(shared(f"oracle/vocabularies/{name}.json.gz")) as file:
        listed = json.load(file)
    return Vocabulary.from_tokens(listed["tokens"], space=listed["space"])


@cache
def case(name: str) -> dict:
    with gzip.open(shared(f"oracle/alignment/{name}.json.gz")) as file:
        return json.load(file)


def string_map(oracle: dict, mode: str) -> np.ndarray:
    """The map on strings: `hard` knows only equal strings, `soft` the mined ones (-2 for tokens that do not occur)."""
    source, target = vocabulary(oracle["source"]), vocabulary(oracle["target"])
    id_of = {token: i for i, token in enumerate(target.tokens) if token}
    spelled = [token.replace(oracle["source_space"], oracle["target_space"]) for token in source.tokens]
    if mode == "hard":
        return np.array([id_of.get(token, -1) for token in spelled], np.int32)
    return np.array(
        [id_of[oracle["vocabulary_map"][t]] if t in oracle["vocabulary_map"] else -2 for t in spelled], np.int32
    )


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("name", CASES)
def test_carried_entries_equal_the_published_ones(name: str, mode: str) -> None:
    oracle = case(name)
    source, target = vocabulary(oracle["source"]), vocabulary(oracle["target"])
    mapped = string_map(oracle, mode)
    source_ids, target_ids = (np.array(oracle[f"{side}_ids"], np.int32) for side in ("source", "target"))
    no_ends = [np.full(len(ids), -1, np.int32) for ids in (source_ids, target_ids)]
    partner = ALIGNMENTS.get("dtw")(source_ids, no_ends[0], target_ids, no_ends[1], source, target, mapped)
    ids, logits = project_entries(
        np.array(oracle["top_k_ids"], np.int32),
        np.array(oracle["top_k_logits"]),
        partner,
        mapped,
        vocabulary_size=len(target.tokens),
        duplicates="first",
    )
    expected = oracle["expected"][mode]
    for i, (want_ids, want_logits) in enumerate(zip(expected["ids"], expected["logits"], strict=True)):
        n = int((ids[i] >= 0).sum())
        got = (ids[i, :n].tolist(), logits[i, :n].tolist()) if partner[i] >= 0 else ([oracle["target_ids"][i]], [1.0])
        assert got[0] == want_ids, f"position {i}"
        np.testing.assert_allclose(got[1], want_logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("name", CASES)
def test_published_targets_are_the_softmax_of_the_published_entries(name: str, mode: str) -> None:
    oracle = case(name)
    logits = np.array(oracle["top_k_logits"])
    # Any constant between logits and log-probabilities drops out of the softmax over what is kept.
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)) - 0.25
    target = np.array(oracle["target_ids"], np.int32)
    stored = {
        "source": predictions(np.array(oracle["source_ids"], np.int32), np.array(oracle["top_k_ids"], np.int32), log_p),
        "target": predictions(target, np.zeros((len(target), 0), np.int32), np.zeros((len(target), 0))),
    }
    row = fuse_sequence(
        [stored],
        [1],
        target="target",
        sources=[Source("source", vocabulary(oracle["source"]), string_map(oracle, mode))],
        target_vocabulary=vocabulary(oracle["target"]),
        switches=Switches(**PRESETS["published"], include_target=False),
    )
    expected = oracle["expected"][mode]
    assert [[i for i in ids if i >= 0] for ids in row.targets.ids.tolist()] == expected["ids"]
    for p, want in zip(row.targets.p, expected["logits"], strict=True):
        softmax = np.exp(np.array(want) - max(want))
        np.testing.assert_allclose(p[: len(want)], softmax / softmax.sum(), atol=1e-6)
    assert not row.targets.tail.any()
    assert row.fusion_weight.all()


def predictions(tokens: np.ndarray, ids: np.ndarray, log_p: np.ndarray) -> Predictions:
    ends = np.full(len(tokens), -1, np.int32)
    ends[0] = 0
    zero = np.zeros(len(tokens), np.float32)
    tail = (1 - np.exp(log_p).sum(1)).astype(np.float32)
    return Predictions(tokens, ends, ids, log_p.astype(np.float32), tail, zero)


@pytest.mark.parametrize("fusion", ["mince", "avgce"])
def test_choosing_and_averaging_give_the_published_loss(fusion: str) -> None:
    with gzip.open(shared("oracle/objective/published.json.gz")) as file:
        cases = json.load(file)
    for oracle in cases:
        (feature,), (logits,) = oracle["features"], np.array(oracle["logits"])
        own = [feature["per_step_indices"], feature["per_step_logits"]]
        members, losses = [softmax_of(*own, *own)], [feature["metric_ce"]]
        for s in (0, 1):
            lists = [feature[f"per_step_aligned_{what}_{s}"] for what in ("indices", "logits")]
            members.append(softmax_of(*lists, *own))
            losses.append(feature[f"metric_ce_aligned_{s}"])
        n = len(own[0])
        scores = SourceScores(
            names=("target", "0", "1"),
            nll=np.array(losses)[:, None],
            tokens=np.ones((3, 1), np.int64),
            n_bytes=np.ones(1, np.int64),
            unit=np.zeros(n, np.int64),
        )
        fused, _ = FUSIONS.get(fusion)(members, scores, Switches(**PRESETS["published"]))
        log_q = logits - logits.max(axis=1, keepdims=True)
        log_q -= np.log(np.exp(log_q).sum(axis=1, keepdims=True))
        cross_entropy = -(fused.p * np.take_along_axis(log_q[:n], np.maximum(fused.ids, 0), 1)).sum() / n
        (expected,) = [e for e in oracle["expected"] if (e["mode"], e["loss_type"]) == (fusion, "ce")]
        lambda_ = oracle["lambda_"]
        loss = lambda_ * expected["clm"] + (1 - lambda_) * cross_entropy
        assert loss == pytest.approx(expected["loss"], rel=1e-4)  # theirs keeps probabilities in bfloat16


def softmax_of(ids: list, logits: list, own_ids: list, own_logits: list) -> Sparse:
    """Lists of entries as distributions, an empty list as the target's own."""
    width, n = max(map(len, [*ids, *own_ids])), len(ids)
    out = Sparse(np.full((n, width), -1, np.int32), np.zeros((n, width), np.float32), np.zeros(n, np.float32))
    for i in range(n):
        tokens, scores = (ids[i], logits[i]) if ids[i] else (own_ids[i], own_logits[i])
        p = np.exp(np.array(scores) - max(scores))
        out.ids[i, : len(tokens)], out.p[i, : len(tokens)] = tokens, p / p.sum()
    return out
