"""Carrying over and fusing: every switch by numbers worked out by hand, and what must hold for any input."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment.fuse import FusedSequence, Source, fuse_sequence
from fusion.alignment.projection import project_entries
from fusion.alignment.selection import FUSIONS, avgce, mince, mix, score_sources, to_bfloat16
from fusion.errors import UserError
from fusion.switches import PRESETS, Switches
from fusion.types import Predictions, Sparse
from fusion.vocabulary.token_bytes import Vocabulary

# The target spells "abcd" in two tokens, the source in one, three or four; id 0 is the prefix of both.
TARGET = Vocabulary.from_tokens(["<s>", "a", "b", "c", "d", "ab", "cd"], space=" ", control={0})
OTHER = Vocabulary.from_tokens(["<s>", "cd", "d", "c", "b", "a", "ab", "x", "y"], space=" ", control={0})
MAP = np.array([0, 6, 4, 3, 2, 1, 5, -1, 3], np.int32)  # x maps to nothing, y to c as well as c itself

TOKEN_BY_TOKEN: Any = {"projection": "token", "inside": "none", "true_token": "top_k"}


def predictions(
    vocabulary: Vocabulary,
    tokens: Sequence[str],
    entries: Sequence[Mapping[str, float]],
    nats: Sequence[float] | float = 1.0,
    ends: Sequence[int] | None = None,
) -> Predictions:
    """A reading of the text that `tokens` spell; `entries[j]` token -> probability at position j (equally many)."""
    ids = np.array([[vocabulary.tokens.index(t) for t in e] for e in entries], np.int32).reshape(len(entries), -1)
    p = np.array([list(e.values()) for e in entries], np.float64).reshape(ids.shape)
    m = len(tokens) + 1
    loss = np.array([*([nats] * (m - 1) if isinstance(nats, float) else nats), 0.0], np.float32)
    with np.errstate(divide="ignore"):
        return Predictions(
            tokens=np.array([0, *(vocabulary.tokens.index(t) for t in tokens)], np.int32),
            ends=np.cumsum([0, *map(len, tokens)], dtype=np.int32) if ends is None else np.array(ends, np.int32),
            ids=ids,
            log_p=np.log(p).astype(np.float32),
            tail=(1 - p.sum(axis=1)).astype(np.float32),
            nats=loss,
        )


OWN = predictions(TARGET, ["ab", "cd"], [{"ab": 0.5, "a": 0.25}, {"cd": 0.5, "c": 0.25}, {"a": 0.5, "b": 0.25}])
# Position 2 (after "abc") serves none of the target's; position 0 loses .25 to x, position 1 lands twice on c.
READ = predictions(
    OTHER,
    ["ab", "c", "d"],
    [
        {"ab": 0.5, "x": 0.25, "a": 0.125},
        {"c": 0.25, "cd": 0.25, "y": 0.25},
        {"d": 0.5, "x": 0.25, "y": 0.125},
        {"x": 0.5, "a": 0.25, "b": 0.125},
    ],
)


def fuse(
    *others: tuple[str, Predictions],
    own: Predictions = OWN,
    size: int = 4,
    max_entries: int | None = None,
    **switches: Any,
) -> FusedSequence:
    return fuse_sequence(
        [{"target": own, **dict(others)}],
        [size],
        target="target",
        sources=[Source(name, OTHER, MAP) for name, _ in others],
        target_vocabulary=TARGET,
        switches=Switches(**{**TOKEN_BY_TOKEN, "include_target": False, **switches}),
        max_entries=max_entries,
    )


def at(row: FusedSequence, i: int) -> dict[str, float]:
    """Token -> probability at a position, the tail under "tail" where there is one."""
    entries = zip(row.targets.ids[i].tolist(), row.targets.p[i].tolist(), strict=True)
    found = {TARGET.tokens[t]: round(p, 6) for t, p in entries if t >= 0}
    return found | ({"tail": round(float(row.targets.tail[i]), 6)} if row.targets.tail[i] > 0 else {})


# --- one switch at a time


def test_the_mended_defaults_carry_over_by_bytes() -> None:
    row = fuse(("other", READ))
    assert at(row, 0) == {"ab": 0.5, "a": 0.125, "tail": 0.375}
    assert at(row, 1) == {"c": 0.5, "cd": 0.25, "tail": 0.25}
    assert row.gold.tolist() == [5, 6, -1]
    assert row.fusion_weight.tolist() == [1, 1, 0]
    assert row.chosen.tolist() == [0, 0, 0]
    assert row.names == ("other",)
    assert row.paired.tolist() == [[True, True, True]]


def test_alignment_dtw_asks_for_equal_tokens_where_same_end_asks_for_equal_ends() -> None:
    same_end, dtw = (fuse(("other", READ), alignment=name) for name in ("same_end", "dtw"))
    # "cd" against "c", "d": one end, but no one-to-one pair.
    assert same_end.paired.tolist() == [[True, True, True]]
    assert dtw.paired.tolist() == [[True, True, False]]


def test_unpaired_positions_take_the_next_or_the_current_token() -> None:
    whole = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], ends=[0, -1, -1])
    row = fuse(("other", whole))
    assert at(row, 1) == {"cd": 1.0}
    assert row.chosen.tolist() == [0, -1, -1]
    assert at(fuse(("other", whole), unaligned="current"), 1) == {"ab": 1.0}


def test_an_empty_list_keeps_its_mass_in_the_tail_or_takes_the_targets_distribution() -> None:
    lost = predictions(OTHER, ["ab", "cd"], [{"x": 0.75}, {"cd": 0.5}, {"a": 0.5}])
    assert at(fuse(("other", lost)), 0) == {"tail": 1.0}
    assert at(fuse(("other", lost), unmapped="target"), 0) == {"ab": 0.5, "a": 0.25, "tail": 0.25}
    published = fuse(("other", lost), unmapped="target", tail="renormalise")
    assert at(published, 0) == {"ab": pytest.approx(2 / 3, abs=1e-6), "a": pytest.approx(1 / 3, abs=1e-6)}
    assert published.chosen[0] == 0
    # Without a tail to take the mass there is nothing to learn from the partner.
    unaligned = fuse(("other", lost), unmapped="tail", tail="renormalise")
    assert at(unaligned, 0) == {"ab": 1.0}
    assert unaligned.chosen[0] == -1
    assert not unaligned.paired[0, 0]
    assert at(fuse(("other", lost), unmapped="tail", tail="gold"), 0) == {"ab": 1.0}


def test_an_empty_list_needs_the_targets_own_entries() -> None:
    lost = predictions(OTHER, ["ab", "cd"], [{"x": 0.75}, {"cd": 0.5}, {"a": 0.5}])
    tokens_only = predictions(TARGET, ["ab", "cd"], [{}, {}, {}])
    assert at(fuse(("other", lost), own=tokens_only), 0) == {"tail": 1.0}
    with pytest.raises(UserError, match="'target' are needed"):
        fuse(("other", lost), own=tokens_only, unmapped="target")


def test_duplicates_are_summed_or_the_first_is_kept() -> None:
    assert at(fuse(("other", READ), duplicates="sum"), 1) == {"c": 0.5, "cd": 0.25, "tail": 0.25}
    assert at(fuse(("other", READ), duplicates="first"), 1) == {"c": 0.25, "cd": 0.25, "tail": 0.5}
    assert at(fuse(("other", READ), duplicates="first", tail="renormalise"), 1) == {"c": 0.5, "cd": 0.5}


def test_the_tail_rides_along_is_scaled_away_or_goes_to_the_gold_token() -> None:
    assert at(fuse(("other", READ), tail="renormalise"), 0) == {"ab": 0.8, "a": 0.2}
    assert at(fuse(("other", READ), tail="gold"), 0) == {"ab": 0.875, "a": 0.125}
    without_gold = predictions(OTHER, ["ab", "cd"], [{"b": 0.25}, {"cd": 0.5}, {"a": 0.5}])
    assert at(fuse(("other", without_gold), tail="gold"), 0) == {"b": 0.25, "ab": 0.75}


def test_positions_without_a_next_token() -> None:
    assert fuse(("other", READ), loss_positions="with_next").fusion_weight.tolist() == [1, 1, 0]
    every = fuse(("other", READ), loss_positions="all")
    assert every.fusion_weight.tolist() == [1, 1, 1]
    assert at(every, 2) == {"a": 0.25, "b": 0.125, "tail": 0.625}
    # Nothing is taught where a one-hot on the next token is called for and there is none.
    whole = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], ends=[0, -1, -1])
    assert fuse(("other", whole), loss_positions="all").fusion_weight.tolist() == [1, 1, 0]
    assert fuse(("other", whole), loss_positions="all", unaligned="current").fusion_weight.tolist() == [1, 1, 1]
    # Nor can the tail go to it: it is scaled away.
    assert at(fuse(("other", READ), loss_positions="all", tail="gold"), 2) == pytest.approx(
        {"a": 2 / 3, "b": 1 / 3}, abs=1e-5
    )


def test_the_target_takes_part_or_not() -> None:
    row = fuse(("other", READ), own=replace(OWN, nats=OWN.nats / 4), include_target=True)
    assert row.names == ("target", "other")
    assert row.chosen.tolist() == [0, 0, 0]
    assert at(row, 0) == {"ab": 0.5, "a": 0.25, "tail": 0.25}
    assert fuse(("other", READ), own=replace(OWN, nats=OWN.nats / 4)).names == ("other",)


def test_choice_per_byte_and_per_own_token_disagree() -> None:
    # Two nats in two tokens against two and a half in four: fewer per byte, more per token.
    few = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nats=1.0)
    many = predictions(OTHER, ["a", "b", "c", "d"], [{"a": 0.5}] * 5, nats=0.625)
    assert fuse(("few", few), ("many", many), select_by="nats_per_byte").chosen.tolist() == [0, 0, 0]
    for level in ("passage", "sequence", "token"):
        row = fuse(("few", few), ("many", many), select_by="mean_ce_bfloat16", select_over=level)
        assert row.chosen.tolist() == [1, 1, 1]


def test_ties_go_by_name_or_by_order() -> None:
    one, two = ("zebra", READ), ("ant", READ)
    assert fuse(one, two).chosen.tolist() == [1, 1, 1]
    # 1 and 1.001 nats a token are one reward in bfloat16; per byte the second is the better.
    worse = ("zebra", replace(READ, nats=READ.nats * 1.001))
    assert fuse(worse, two, select_by="mean_ce_bfloat16", select_over="sequence").chosen.tolist() == [0, 0, 0]
    assert fuse(worse, two, select_by="nats_per_byte", select_over="sequence").chosen.tolist() == [1, 1, 1]
    tied = fuse(one, own=replace(OWN, nats=np.float32([1, 1, 0])), include_target=True, select_by="mean_ce_bfloat16")
    assert tied.chosen.tolist() == [0, 0, 0]
    # exp(-3.006) and exp(-3) are two numbers in bfloat16, but 3.006 is 3 before it is raised.
    near = ("zebra", replace(READ, nats=np.float32([3.006] * 3 + [0]))), ("ant", replace(READ, nats=READ.nats * 3))
    assert (to_bfloat16(np.exp([-3.006, -3.0])) == to_bfloat16(np.exp(np.float32([-3, -3])))).tolist() == [False, True]
    assert fuse(*near, select_by="mean_ce_bfloat16", select_over="sequence").chosen.tolist() == [0, 0, 0]


def two_passages(**switches: Any) -> FusedSequence:
    """Passages of 4 and 2 bytes: `left` is better in the first (2 nats against 3), `right` in the rest and over all."""
    long = [
        predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nats)
        for nats in ([1.0, 1.0], [2.5, 0.5])
    ]
    short = [predictions(OTHER, ["ab"], [{"ab": 0.5}, {"a": 0.5}], nats) for nats in ([3.0], [0.5])]
    return fuse_sequence(
        [
            {"target": OWN, "left": long[0], "right": long[1]},
            {"target": predictions(TARGET, ["ab"], [{}, {}]), "left": short[0], "right": short[1]},
        ],
        [4, 2],
        target="target",
        sources=[Source("left", OTHER, MAP), Source("right", OTHER, MAP)],
        target_vocabulary=TARGET,
        switches=Switches(**{**TOKEN_BY_TOKEN, "include_target": False, **switches}),
    )


def test_level_is_the_stretch_that_one_choice_covers() -> None:
    assert two_passages(select_over="passage").chosen.tolist() == [0, 0, 0, 1, 1]
    assert two_passages(select_over="sequence").chosen.tolist() == [1, 1, 1, 1, 1]
    # In the second half of the first passage `right` needs half a nat against one; its last position goes with it.
    assert two_passages(select_over="token").chosen.tolist() == [0, 1, 1, 1, 1]
    assert two_passages().gold.tolist() == [5, 6, -1, 5, -1]


def test_token_level_compares_over_common_ends_only() -> None:
    # Common ends are 0, 2, 4: "a", "b" of `fine` count together, and position 1 (byte 1) of it begins no segment.
    fine = predictions(OTHER, ["a", "b", "c", "d"], [{"a": 0.5}] * 5, nats=[0.25, 1.0, 0.25, 0.5])
    coarse = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nats=[1.0, 1.0])
    row = fuse(("fine", fine), ("coarse", coarse), select_over="token")
    assert row.chosen.tolist() == [1, 0, 0]
    # The target's ends count although it takes no part: its own token "ab" is judged whole.
    even = predictions(OTHER, ["a", "b", "c", "d"], [{"a": 0.5}] * 5, nats=[0.5, 0.5, 0.5, 0.5])
    assert fuse(("fine", fine), ("even", even), select_over="token").chosen.tolist() == [1, 0, 0]
    cut = predictions(TARGET, ["a", "b", "cd"], [{}] * 4)
    assert fuse(("fine", fine), ("even", even), own=cut, select_over="token").chosen.tolist() == [0, 1, 0, 0]


def test_token_level_judges_the_rest_after_a_mismatch_as_one_segment() -> None:
    steady = predictions(OTHER, ["ab", "c", "d"], [{"ab": 0.5}] * 4, nats=[1.0, 1.0, 1.0])
    # Spells "ab" and nothing after: 0.5 nats in the first segment, 3.5 in the rest though it begins with little.
    lost = predictions(OTHER, ["ab", "c", "d"], [{"ab": 0.5}] * 4, nats=[0.5, 0.25, 3.25], ends=[0, 2, -1, -1])
    row = fuse(
        ("steady", steady), ("lost", lost), own=predictions(TARGET, ["ab", "c", "d"], [{}] * 4), select_over="token"
    )
    assert row.chosen.tolist() == [1, 0, 0, 0]
    # The target itself losing its place counts as well: all its positions from there on are in the rest.
    own = predictions(TARGET, ["ab", "c", "d"], [{}] * 4, ends=[0, -1, -1, -1])
    lost_own = fuse(("steady", steady), ("lost", replace(lost, ends=steady.ends)), own=own, select_over="token")
    assert lost_own.paired.tolist() == [[True, False, False, False]] * 2
    assert lost_own.chosen.tolist() == [0, -1, -1, -1]


def test_summed_nats_count_unpaired_tokens_too() -> None:
    # Over its paired positions alone (ab: .5) `patchy` would win; its nats after the mismatch count.
    patchy = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nats=[0.5, 9.0], ends=[0, -1, -1])
    assert fuse(("patchy", patchy), ("other", READ)).chosen.tolist() == [1, 1, 1]


def test_avgce_weighs_by_nats_per_byte_and_temperature() -> None:
    one = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nats=[2.0, 2.0])
    two = predictions(OTHER, ["ab", "cd"], [{"ab": 0.25}, {"c": 0.5}, {"a": 0.5}], nats=[4.0, 4.0])
    for temperature in (1.0, 0.25):  # 1 against 2 nats a byte
        row = fuse(("one", one), ("two", two), fusion="avgce", weight_temperature=temperature)
        first = 1 / (1 + np.exp(-1 / temperature))
        assert at(row, 0) == pytest.approx({"ab": 0.25 + 0.25 * first, "tail": 0.75 - 0.25 * first}, abs=2e-6)
        assert at(row, 1) == pytest.approx({"cd": 0.5 * first, "c": 0.5 * (1 - first), "tail": 0.5}, abs=2e-6)
        assert row.chosen.tolist() == [-2, -2, -2]
    row = fuse(("one", one), ("two", two), fusion="avgce", weights="exp_ce")
    rewards = to_bfloat16(np.exp([-2.0, -4.0]))  # 2 and 4 are numbers of bfloat16
    first = 1 / (1 + np.exp(float(rewards[1] - rewards[0])))
    assert at(row, 1)["cd"] == pytest.approx(0.5 * first, abs=2e-6)


def test_the_default_temperature_tells_sources_apart() -> None:
    reads = {
        name: predictions(OTHER, ["ab", "cd"], [{"ab": 0.5 if name == letter else 0.25} for letter in "xyz"], nats=nats)
        for name, nats in (("x", [1.4, 1.4]), ("y", [1.6, 1.6]), ("z", [1.8, 1.8]))  # 0.70, 0.80, 0.90 a byte
    }
    row = fuse(*reads.items(), fusion="avgce", loss_positions="all")
    share = np.exp([-0.0, -2.0, -4.0]) / np.exp([-0.0, -2.0, -4.0]).sum()
    assert share.round(2).tolist() == [0.87, 0.12, 0.02]
    assert at(row, 0)["ab"] == pytest.approx(0.25 + 0.25 * share[0], abs=2e-6)


def test_avgce_averages_one_hots_where_a_source_is_unpaired() -> None:
    lost = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"c": 0.5}, {"a": 0.5}], ends=[0, -1, -1])
    other = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"c": 0.5}, {"a": 0.5}])
    row = fuse(("lost", lost), ("other", other), fusion="avgce", weights="exp_ce", loss_positions="all")
    assert at(row, 1) == {"cd": 0.5, "c": 0.25, "tail": 0.25}
    # The last position has no next token: the source that needs it has no part there.
    assert at(row, 2) == {"a": 0.5, "tail": 0.5}
    assert row.fusion_weight[2] == 1
    assert row.chosen.tolist() == [-2, -2, -2]
    assert fuse(("lost", lost), ("gone", lost), fusion="avgce").chosen.tolist() == [-2, -1, -1]


def test_max_entries_keeps_the_most_probable_and_moves_the_rest_to_the_tail() -> None:
    row = fuse(("other", READ), max_entries=1)
    assert row.targets.ids.shape == (3, 1)
    assert at(row, 0) == {"ab": 0.5, "tail": 0.5}
    assert at(fuse(("other", READ), max_entries=1, tail="gold"), 1) == {"c": 0.5, "tail": 0.5}
    assert fuse(("other", READ), max_entries=9).targets.ids.shape == (3, 2)
    with pytest.raises(UserError, match="max_entries is 0"):
        fuse(("other", READ), max_entries=0)


# --- refusals


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"alignment": "same_ends"}, "same_end"),
        ({"fusion": "minse"}, "mince"),
        ({"tail": "buckets"}, "bucket, renormalise, gold"),
        ({"select_over": "document"}, "passage, token, sequence"),
        ({"weight_temperature": 0.0}, "greater than 0"),
    ],
)
def test_unknown_switch_values_are_refused_with_what_there_is(switches: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fuse(("other", READ), **switches)


def test_presets_only_name_switches_and_mended_is_the_default() -> None:
    assert Switches(**PRESETS["corrected"]) == Switches()
    published = Switches(**PRESETS["published"])
    assert set(PRESETS["published"]) == set(PRESETS["corrected"])
    assert all(getattr(published, name) != getattr(Switches(), name) for name in PRESETS["corrected"])


def test_readings_and_maps_that_do_not_fit_are_refused() -> None:
    def refuse(match: str, other: Predictions = READ, mapped: np.ndarray = MAP, **row: Any) -> None:
        with pytest.raises(UserError, match=match):
            fuse_sequence(
                row.get("passages", [{"target": OWN, "other": other}]),
                row.get("n_bytes", [4]),
                target="target",
                sources=row.get("sources", [Source("other", OTHER, mapped)]),
                target_vocabulary=TARGET,
                switches=Switches(**TOKEN_BY_TOKEN, include_target=row.get("include_target", False)),
            )

    refuse("outside its vocabulary map", mapped=MAP[:4])
    refuse("lazy map", mapped=np.where(MAP == 5, -2, MAP))
    refuse("made for another target", mapped=np.where(MAP == 5, 70, MAP))
    refuse("sum to 1.625", replace(READ, log_p=np.log(np.full_like(READ.log_p, 0.5))))
    refuse("sum to 0.875", replace(READ, tail=np.zeros_like(READ.tail)))
    refuse("sum to nan", replace(READ, log_p=np.full_like(READ.log_p, np.nan)))
    refuse("different lengths", replace(READ, nats=READ.nats[:-1]))
    refuse("byte 0", replace(READ, ends=READ.ends + 1))
    refuse("not finite", replace(READ, nats=READ.nats * np.nan))
    refuse("no predictions by 'other'", passages=[{"target": OWN}])
    refuse("no predictions by 'target'", passages=[{"other": READ}])
    refuse("1 passages, 2 byte counts", n_bytes=[4, 4])
    refuse("two sources are called", sources=[Source("other", OTHER, MAP)] * 2)
    refuse("include_target is off", sources=[Source("target", TARGET, MAP)])
    refuse("nothing to fuse", sources=[])


def test_a_stored_tail_is_not_lost_in_the_rounding_of_the_entries() -> None:
    """As extraction stores them: log-probabilities and the tail rounded to float16, each for itself."""
    exact = predictions(OTHER, ["ab", "cd"], [{"ab": 0.65, "a": 0.3499}] * 3)
    stored = replace(
        exact,
        log_p=exact.log_p.astype(np.float16).astype(np.float32),
        tail=exact.tail.astype(np.float16).astype(np.float32),
    )
    assert np.exp(stored.log_p[0]).sum() > 1  # so that 1 minus the entries would be no tail
    row = fuse(("other", stored))
    assert row.targets.tail[0] == pytest.approx(1e-4, rel=1e-3)
    assert row.targets.p[0].sum() + row.targets.tail[0] == pytest.approx(1, abs=1e-6)


# --- for any input


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
    readings = []
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
            read = predictions(vocabulary, tokens, [{}] * m, nats=rng.exponential(2, m - 1).round(1).tolist())
            ids = np.array([rng.permutation(len(vocabulary.tokens))[:k] for _ in range(m)], np.int32)
            if rng.random() < 0.2:
                read.ends[rng.integers(1, m + 1) :] = -1
            passage[name] = replace(read, ids=ids, log_p=np.log(p).astype(np.float32), tail=np.float32(1 - p.sum(1)))
        readings.append(passage)
    sources = []
    for name in names[1:]:
        exact = np.array([vocabularies["target"].tokens.index(t) for t in vocabularies[name].tokens], np.int32)
        change = rng.integers(-1, 9, len(exact)).astype(np.int32)
        sources.append(Source(name, vocabularies[name], np.where(rng.random(len(exact)) < 0.4, change, exact)))
    return readings, [len(t) for t in texts], sources, vocabularies["target"]


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
    readings, n_bytes, sources, vocabulary = random_row(seed, n_sources)
    return fuse_sequence(
        readings,
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
    readings, n_bytes, sources, vocabulary = random_row(seed, 3)
    names = ["target", *(source.name for source in sources)]
    absent = [frozenset(names[s] for s in skipped[number]) for number in range(len(readings))]
    readings = [
        {n: Predictions.empty(r.tokens, r.ends, r.ids.shape[1]) if n in gone else r for n, r in passage.items()}
        for passage, gone in zip(readings, absent, strict=True)
    ]
    passage_of = np.repeat(np.arange(len(readings)), [len(passage["target"].tokens) for passage in readings])

    def fused(members: Sequence[int], gone: frozenset[str]) -> FusedSequence:
        return fuse_sequence(
            [readings[m] for m in members],
            [n_bytes[m] for m in members],
            target="target",
            sources=[source for source in sources if source.name not in gone],
            target_vocabulary=vocabulary,
            switches=replace(switches, include_target=switches.include_target and "target" not in gone),
        )

    row = fused(range(len(readings)), frozenset())
    absent = [gone & set(row.names) for gone in absent]  # a target that is no source is not asked anywhere
    called = [*row.names, "mixture", "unaligned"]
    for gone in set(absent):
        members = [m for m, others in enumerate(absent) if others == gone]
        at = np.flatnonzero(np.isin(passage_of, members))
        if not set(row.names) - gone:
            one_hot = (
                row.gold if switches.unaligned == "next" else np.concatenate([p["target"].tokens for p in readings])
            )
            assert (row.chosen[at] == -1).all()
            taught = at[row.fusion_weight[at] > 0]
            everywhere = switches.loss_positions == "all" and switches.unaligned == "current"
            assert taught.tolist() == at[(row.gold[at] >= 0) | everywhere].tolist()
            assert (row.targets.ids[taught, 0] == one_hot[taught]).all() and (row.targets.p[taught, 0] == 1).all()
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
def test_a_distribution_carried_onto_its_own_tokenizer_is_unchanged(seed: int, alignment: str) -> None:
    readings, n_bytes, _, vocabulary = random_row(seed, 0)
    readings = [{"twin": passage["target"], **passage} for passage in readings]
    switches = Switches(**TOKEN_BY_TOKEN, alignment=alignment, include_target=False)
    twin = Source("twin", vocabulary, np.arange(len(vocabulary.tokens), dtype=np.int32))
    own = [passage["target"] for passage in readings]
    known = np.concatenate([r.ends >= 0 for r in own]) if alignment == "same_end" else slice(None)
    row = fuse_sequence(
        readings, n_bytes, target="target", sources=[twin], target_vocabulary=vocabulary, switches=switches
    )
    assert row.paired[0, known].all()
    np.testing.assert_array_equal(row.targets.ids[known], np.concatenate([r.ids for r in own])[known])
    np.testing.assert_allclose(row.targets.p[known], np.exp(np.concatenate([r.log_p for r in own]))[known], rtol=1e-6)
    np.testing.assert_allclose(row.targets.tail[known], np.concatenate([r.tail for r in own])[known], atol=1e-6)
    itself = fuse_sequence(
        readings,
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
    readings, n_bytes, sources, _ = random_row(seed, 3)
    names = tuple(source.name for source in sources)
    targets = [passage["target"] for passage in readings]
    scores = score_sources(
        [[passage[name] for name in names] for passage in readings], targets, n_bytes, names=names, select_over=level
    )
    assert scores.n_bytes.sum() == sum(n_bytes)
    assert (scores.n_bytes > 0).all()
    assert (scores.tokens > 0).all()
    assert len(scores.unit) == sum(len(target.tokens) for target in targets)
    for name, nats, tokens in zip(names, scores.nats, scores.tokens, strict=True):
        assert nats.sum() == pytest.approx(sum(passage[name].nats.sum() for passage in readings), rel=1e-5)
        assert tokens.sum() == sum(len(passage[name].tokens) - 1 for passage in readings)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1))
def test_bfloat16_rounds_to_the_nearest_even(values: list[float]) -> None:
    import torch  # slow to import, and only here

    x = np.array(values, np.float32)
    np.testing.assert_array_equal(to_bfloat16(x), torch.from_numpy(x).to(torch.bfloat16).float().numpy())


def test_carrying_logits_keeps_their_order_and_the_first_of_duplicates() -> None:
    ids, logits = project_entries(
        np.array([[1, 2, 3, 0]], np.int32),
        np.array([[5.0, 4.0, -1.0, -2.0]]),
        np.array([0, -1], np.int32),
        np.array([2, 7, -1, 7], np.int32),
        vocabulary_size=8,
        duplicates="first",
    )
    assert ids.tolist() == [[7, 2, -1, -1], [-1, -1, -1, -1]]
    assert logits.tolist() == [[5.0, -2.0, 0, 0], [0, 0, 0, 0]]


def test_a_mixture_is_over_those_that_have_a_distribution() -> None:
    one = Sparse(np.array([[3], [-1]], np.int32), np.float32([[1], [0]]), np.float32([0, 0]))
    two = Sparse(np.array([[4, 3], [4, -1]], np.int32), np.float32([[0.5, 0.25], [0.5, 0]]), np.float32([0.25, 0.5]))
    mixed = mix([one, two], np.array([[3.0, 3.0], [1.0, 1.0]]))
    assert mixed.ids.tolist() == [[3, 4], [4, -1]]
    assert mixed.p.tolist() == [[0.8125, 0.125], [0.5, 0]]
    assert mixed.tail.tolist() == [0.0625, 0.5]


def test_fusion_functions_are_registered_with_a_reference() -> None:
    assert FUSIONS.get("mince") is mince
    assert FUSIONS.get("avgce") is avgce
    assert "2401.10491" in FUSIONS.reference("avgce")


# --- lossy tokenizers


def test_a_source_that_does_not_spell_the_text_does_not_compete() -> None:
    """It reads the rest as one unknown token, so that its sum of nats is no likelihood of the text."""
    lossy = replace(READ, ends=np.array([0, 2, -1, -1], np.int32), nats=np.float32([0.1, 0.1, 0.1, 0]))
    honest = replace(READ, nats=np.float32([1, 1, 1, 0]))
    both = ("honest", honest), ("lossy", lossy)
    assert fuse(*both).chosen.tolist()[:2] == [0, 0]
    assert fuse(*both, select_over="sequence").chosen.tolist()[:2] == [0, 0]
    by_token = fuse(*both, select_over="token")
    assert by_token.chosen.tolist()[:2] == [1, 0]  # up to the mismatch it spells the text and is better
    averaged = fuse(*both, fusion="avgce")
    assert averaged.targets.p.tolist() == fuse(("honest", honest)).targets.p.tolist()
    # Where nobody spells the text, all compete; and the published rule knows no such thing.
    assert fuse(("worse", replace(lossy, nats=lossy.nats * 9)), ("lossy", lossy)).chosen.tolist()[:1] == [1]
    assert fuse(*both, select_by="mean_ce_bfloat16").chosen.tolist()[:1] == [1]
