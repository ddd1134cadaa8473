"""Fusing: what must hold for any passages, maps and switches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment.fuse import FusedSequence, Source, fuse_sequence
from fusion.alignment.selection import score_sources
from fusion.switches import Switches
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary
from tests.fusion.alignment.fusing import TOKEN_BY_TOKEN, predictions


def random_row(
    seed: int, n_sources: int, k: int = 4
) -> tuple[list[dict[str, Predictions]], list[int], list[Source], Vocabulary]:
    """Passages over "ab", every model with the same strings under permuted ids and a cut of its own."""
    rng = np.random.default_rng(seed)
    strings = ["a", "b", "aa", "ab", "ba", "bb", "aba", "c"]
    names = ["target", *(f"source{s}" for s in range(n_sources))]
    vocabularies = {
        name: Vocabulary.from_tokens(["<s>", *rng.permutation(strings).tolist()], space=" ", control={0})
        for name in names
    }
    texts = ["".join(rng.choice(["a", "b"], rng.integers(1, 12))) for _ in range(rng.integers(1, 4))]
    stored = []
    for text in texts:
        passage = {}
        for name, vocabulary in vocabularies.items():
            tokens, place = [], 0
            while place < len(text):
                fits = [t for t in strings if text.startswith(t, place)]
                tokens.append(fits[rng.integers(len(fits))])
                place += len(tokens[-1])
            m = len(tokens) + 1
            p = rng.dirichlet(np.ones(k + 1), m)[:, :k]
            read = predictions(vocabulary, tokens, [{}] * m, nll=rng.exponential(2, m - 1).round(1).tolist())
            ids = np.array([rng.permutation(len(vocabulary.tokens))[:k] for _ in range(m)], np.int32)
            if rng.random() < 0.2:
                read.byte_ends[rng.integers(1, m + 1) :] = -1
            passage[name] = replace(read, ids=ids, log_p=np.log(p).astype(np.float32), tail=np.float32(1 - p.sum(1)))
        stored.append(passage)
    sources = []
    for name in names[1:]:
        exact = np.array([vocabularies["target"].tokens.index(t) for t in vocabularies[name].tokens], np.int32)
        change = rng.integers(-1, 9, len(exact)).astype(np.int32)
        sources.append(Source(name, vocabularies[name], np.where(rng.random(len(exact)) < 0.4, change, exact)))
    return stored, [len(t) for t in texts], sources, vocabularies["target"]


SWITCHES = st.builds(
    Switches,
    alignment=st.sampled_from(["same_end", "dtw"]),
    unaligned=st.sampled_from(["next", "current"]),
    unmapped=st.sampled_from(["tail", "target"]),
    duplicates=st.sampled_from(["sum", "first"]),
    tail=st.sampled_from(["bucket", "renormalise", "gold"]),
    fusion=st.sampled_from(["mince", "avgce"]),
    select_over=st.sampled_from(["passage", "token", "sequence"]),
    select_by=st.sampled_from(["nats_per_byte", "mean_ce_bfloat16"]),
    weights=st.sampled_from(["nats_per_byte", "exp_ce"]),
    loss_positions=st.sampled_from(["with_next", "all"]),
    include_target=st.booleans(),
    projection=st.just("token"),
    inside=st.just("none"),
    true_token=st.sampled_from(["always", "top_k"]),
)
SEEDS = st.integers(0, 2**32 - 1)


def run(
    seed: int, switches: Switches, n_sources: int = 3, order: Sequence[int] | None = None, **more: Any
) -> FusedSequence:
    stored, n_bytes, sources, vocabulary = random_row(seed, n_sources)
    return fuse_sequence(
        stored,
        n_bytes,
        target="target",
        sources=[sources[s] for s in order] if order is not None else sources,
        target_vocabulary=vocabulary,
        switches=switches,
        **more,
    )


@settings(deadline=None, max_examples=80)
@given(SEEDS, SWITCHES, st.sampled_from([None, 1, 3]))
def test_every_position_holds_one_distribution(seed: int, switches: Switches, max_entries: int | None) -> None:
    row = run(seed, switches, max_entries=max_entries)
    ids, p, tail = row.targets.ids, row.targets.p, row.targets.tail
    np.testing.assert_allclose(p.sum(axis=1, dtype=np.float64) + tail, 1, atol=3e-7)
    assert ((p >= 0) & (tail[:, None] >= 0)).all()
    assert (p[ids < 0] == 0).all()
    assert (np.diff((ids < 0).astype(int), axis=1) >= 0).all(), "pads stand last"
    for present in ids:
        kept = present[present >= 0].tolist()
        assert len(kept) == len(set(kept))
    assert (ids.dtype, p.dtype, tail.dtype) == (np.int32, np.float32, np.float32)
    assert (row.fusion_weight.dtype, row.gold.dtype, row.chosen.dtype) == (np.float32, np.int32, np.int16)
    if switches.tail != "bucket" and max_entries is None:
        assert not tail[row.fusion_weight > 0].any()
    if switches.loss_positions == "with_next":
        assert (row.fusion_weight == (row.gold >= 0)).all()


@settings(deadline=None, max_examples=50)
@given(SEEDS, SWITCHES, st.permutations(range(3)))
def test_targets_do_not_depend_on_the_order_of_the_sources(seed: int, switches: Switches, order: list[int]) -> None:
    switches = replace(switches, select_by="nats_per_byte")  # the published choice breaks ties by order
    one, two = run(seed, switches), run(seed, switches, order=order)
    for field in ("ids", "p", "tail"):
        np.testing.assert_array_equal(getattr(one.targets, field), getattr(two.targets, field))
    names = [[*row.names, "mixture", "unaligned"] for row in (one, two)]  # -1 and -2 index the end
    assert [names[0][c] for c in one.chosen] == [names[1][c] for c in two.chosen]
    by_name = [dict(zip(row.names, row.paired.tolist(), strict=True)) for row in (one, two)]
    assert by_name[0] == by_name[1]


@settings(deadline=None, max_examples=40)
@given(SEEDS, SWITCHES)
def test_fusing_one_source_is_that_source(seed: int, switches: Switches) -> None:
    switches = replace(switches, include_target=False)
    alone = [run(seed, replace(switches, fusion=fusion), n_sources=1) for fusion in ("mince", "avgce")]
    np.testing.assert_array_equal(alone[0].targets.ids, alone[1].targets.ids)
    np.testing.assert_allclose(alone[0].targets.p, alone[1].targets.p, atol=1e-7)
    assert (alone[0].chosen == np.where(alone[0].paired[0], 0, -1)).all()


@settings(deadline=None, max_examples=60)
@given(SEEDS, SWITCHES, st.lists(st.sets(st.integers(0, 3)), min_size=3, max_size=3))
def test_a_passage_is_fused_without_those_that_left_it_out(
    seed: int, switches: Switches, skipped: list[set[int]]
) -> None:
    """As if the passages that the same models have read were a row, and only they had been asked."""
    stored, n_bytes, sources, vocabulary = random_row(seed, 3)
    names = ["target", *(source.name for source in sources)]
    absent = [frozenset(names[s] for s in skipped[number]) for number in range(len(stored))]
    stored = [
        {n: Predictions.empty(r.tokens, r.byte_ends, r.ids.shape[1]) if n in gone else r for n, r in passage.items()}
        for passage, gone in zip(stored, absent, strict=True)
    ]
    passage_of = np.repeat(np.arange(len(stored)), [len(passage["target"].tokens) for passage in stored])

    def fused(members: Sequence[int], gone: frozenset[str]) -> FusedSequence:
        return fuse_sequence(
            [stored[m] for m in members],
            [n_bytes[m] for m in members],
            target="target",
            sources=[source for source in sources if source.name not in gone],
            target_vocabulary=vocabulary,
            switches=replace(switches, include_target=switches.include_target and "target" not in gone),
        )

    row = fused(range(len(stored)), frozenset())
    absent = [gone & set(row.names) for gone in absent]  # a target that is no source is not asked anywhere
    called = [*row.names, "mixture", "unaligned"]
    for gone in set(absent):
        members = [m for m, others in enumerate(absent) if others == gone]
        at = np.flatnonzero(np.isin(passage_of, members))
        if not set(row.names) - gone:
            one_hot = row.gold if switches.unaligned == "next" else np.concatenate([p["target"].tokens for p in stored])
            assert (row.chosen[at] == -1).all()
            weighted = at[row.fusion_weight[at] > 0]
            everywhere = switches.loss_positions == "all" and switches.unaligned == "current"
            assert weighted.tolist() == at[(row.gold[at] >= 0) | everywhere].tolist()
            assert (row.targets.ids[weighted, 0] == one_hot[weighted]).all() and (row.targets.p[weighted, 0] == 1).all()
            continue
        part = fused(members, gone)
        width = part.targets.ids.shape[1]
        np.testing.assert_array_equal(row.targets.ids[at][:, :width], part.targets.ids)
        np.testing.assert_array_equal(row.targets.p[at][:, :width], part.targets.p)
        assert (row.targets.ids[at][:, width:] == -1).all()
        np.testing.assert_array_equal(row.targets.tail[at], part.targets.tail)
        np.testing.assert_array_equal(row.fusion_weight[at], part.fusion_weight)
        assert [called[c] for c in row.chosen[at]] == [[*part.names, "mixture", "unaligned"][c] for c in part.chosen]


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from(["same_end", "dtw"]))
def test_a_distribution_projected_onto_its_own_tokenizer_is_unchanged(seed: int, alignment: str) -> None:
    stored, n_bytes, _, vocabulary = random_row(seed, 0)
    stored = [{"twin": passage["target"], **passage} for passage in stored]
    switches = Switches(**TOKEN_BY_TOKEN, alignment=alignment, include_target=False)
    twin = Source("twin", vocabulary, np.arange(len(vocabulary.tokens), dtype=np.int32))
    own = [passage["target"] for passage in stored]
    known = np.concatenate([r.byte_ends >= 0 for r in own]) if alignment == "same_end" else slice(None)
    row = fuse_sequence(
        stored, n_bytes, target="target", sources=[twin], target_vocabulary=vocabulary, switches=switches
    )
    assert row.paired[0, known].all()
    np.testing.assert_array_equal(row.targets.ids[known], np.concatenate([r.ids for r in own])[known])
    np.testing.assert_allclose(row.targets.p[known], np.exp(np.concatenate([r.log_p for r in own]))[known], rtol=1e-6)
    np.testing.assert_allclose(row.targets.tail[known], np.concatenate([r.tail for r in own])[known], atol=1e-6)
    itself = fuse_sequence(
        stored,
        n_bytes,
        target="target",
        sources=[],
        target_vocabulary=vocabulary,
        switches=replace(switches, include_target=True),
    )
    assert itself.paired.all()
    np.testing.assert_array_equal(itself.targets.ids[known], row.targets.ids[known])


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.sampled_from(["passage", "token", "sequence"]))
def test_the_units_share_out_all_bytes_and_nats(seed: int, level: str) -> None:
    stored, n_bytes, sources, _ = random_row(seed, 3)
    names = tuple(source.name for source in sources)
    targets = [passage["target"] for passage in stored]
    scores = score_sources(
        [[passage[name] for name in names] for passage in stored], targets, n_bytes, names=names, select_over=level
    )
    assert scores.n_bytes.sum() == sum(n_bytes)
    assert (scores.n_bytes > 0).all()
    assert (scores.tokens > 0).all()
    assert len(scores.unit) == sum(len(target.tokens) for target in targets)
    for name, nll, tokens in zip(names, scores.nll, scores.tokens, strict=True):
        assert nll.sum() == pytest.approx(sum(passage[name].nll.sum() for passage in stored), rel=1e-5)
        assert tokens.sum() == sum(len(passage[name].tokens) - 1 for passage in stored)
