"""Which source is selected, and what the weights of AvgCE are, by numbers worked out by hand."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment.fuse import FusedSequence, Source, fuse_sequence
from fusion.alignment.selection import FUSIONS, avgce, mince, mix, to_bfloat16
from fusion.switches import Switches
from fusion.types import Sparse
from tests.fusion.alignment.fusing import MAP, OTHER, OWN, READ, TARGET, TOKEN_BY_TOKEN, at, fuse, predictions


def test_selection_per_byte_and_per_own_token_disagree() -> None:
    # Two nats in two tokens against two and a half in four: fewer per byte, more per token.
    few = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nll=1.0)
    many = predictions(OTHER, ["a", "b", "c", "d"], [{"a": 0.5}] * 5, nll=0.625)
    assert fuse(("few", few), ("many", many), select_by="nats_per_byte").chosen.tolist() == [0, 0, 0]
    for level in ("passage", "sequence", "token"):
        row = fuse(("few", few), ("many", many), select_by="mean_ce_bfloat16", select_over=level)
        assert row.chosen.tolist() == [1, 1, 1]


def test_ties_go_by_name_or_by_order() -> None:
    one, two = ("zebra", READ), ("ant", READ)
    assert fuse(one, two).chosen.tolist() == [1, 1, 1]
    # 1 and 1.001 nats a token are one reward in bfloat16; per byte the second is the better.
    worse = ("zebra", replace(READ, nll=READ.nll * 1.001))
    assert fuse(worse, two, select_by="mean_ce_bfloat16", select_over="sequence").chosen.tolist() == [0, 0, 0]
    assert fuse(worse, two, select_by="nats_per_byte", select_over="sequence").chosen.tolist() == [1, 1, 1]
    tied = fuse(one, own=replace(OWN, nll=np.float32([1, 1, 0])), include_target=True, select_by="mean_ce_bfloat16")
    assert tied.chosen.tolist() == [0, 0, 0]
    # exp(-3.006) and exp(-3) are two numbers in bfloat16, but 3.006 is 3 before it is raised.
    near = ("zebra", replace(READ, nll=np.float32([3.006] * 3 + [0]))), ("ant", replace(READ, nll=READ.nll * 3))
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


def test_select_over_is_the_stretch_that_one_selection_covers() -> None:
    assert two_passages(select_over="passage").chosen.tolist() == [0, 0, 0, 1, 1]
    assert two_passages(select_over="sequence").chosen.tolist() == [1, 1, 1, 1, 1]
    # In the second half of the first passage `right` needs half a nat against one; its last position goes with it.
    assert two_passages(select_over="token").chosen.tolist() == [0, 1, 1, 1, 1]
    assert two_passages().gold.tolist() == [5, 6, -1, 5, -1]


def test_token_level_compares_over_common_ends_only() -> None:
    # Common ends are 0, 2, 4: "a", "b" of `fine` count together, and position 1 (byte 1) of it begins no segment.
    fine = predictions(OTHER, ["a", "b", "c", "d"], [{"a": 0.5}] * 5, nll=[0.25, 1.0, 0.25, 0.5])
    coarse = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nll=[1.0, 1.0])
    row = fuse(("fine", fine), ("coarse", coarse), select_over="token")
    assert row.chosen.tolist() == [1, 0, 0]
    # The target's ends count although it takes no part: its own token "ab" is judged whole.
    even = predictions(OTHER, ["a", "b", "c", "d"], [{"a": 0.5}] * 5, nll=[0.5, 0.5, 0.5, 0.5])
    assert fuse(("fine", fine), ("even", even), select_over="token").chosen.tolist() == [1, 0, 0]
    cut = predictions(TARGET, ["a", "b", "cd"], [{}] * 4)
    assert fuse(("fine", fine), ("even", even), own=cut, select_over="token").chosen.tolist() == [0, 1, 0, 0]


def test_token_level_judges_the_rest_after_a_mismatch_as_one_segment() -> None:
    steady = predictions(OTHER, ["ab", "c", "d"], [{"ab": 0.5}] * 4, nll=[1.0, 1.0, 1.0])
    # Spells "ab" and nothing after: 0.5 nats in the first segment, 3.5 in the rest though it begins with little.
    lost = predictions(OTHER, ["ab", "c", "d"], [{"ab": 0.5}] * 4, nll=[0.5, 0.25, 3.25], byte_ends=[0, 2, -1, -1])
    row = fuse(
        ("steady", steady), ("lost", lost), own=predictions(TARGET, ["ab", "c", "d"], [{}] * 4), select_over="token"
    )
    assert row.chosen.tolist() == [1, 0, 0, 0]
    # The target itself losing its place counts as well: all its positions from there on are in the rest.
    own = predictions(TARGET, ["ab", "c", "d"], [{}] * 4, byte_ends=[0, -1, -1, -1])
    lost_own = fuse(
        ("steady", steady), ("lost", replace(lost, byte_ends=steady.byte_ends)), own=own, select_over="token"
    )
    assert lost_own.paired.tolist() == [[True, False, False, False]] * 2
    assert lost_own.chosen.tolist() == [0, -1, -1, -1]


def test_summed_nats_count_unaligned_tokens_too() -> None:
    # Over its paired positions alone (ab: .5) `patchy` would win; its nats after the mismatch count.
    patchy = predictions(
        OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nll=[0.5, 9.0], byte_ends=[0, -1, -1]
    )
    assert fuse(("patchy", patchy), ("other", READ)).chosen.tolist() == [1, 1, 1]


def test_avgce_weighs_by_nats_per_byte_and_temperature() -> None:
    one = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], nll=[2.0, 2.0])
    two = predictions(OTHER, ["ab", "cd"], [{"ab": 0.25}, {"c": 0.5}, {"a": 0.5}], nll=[4.0, 4.0])
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
        name: predictions(OTHER, ["ab", "cd"], [{"ab": 0.5 if name == letter else 0.25} for letter in "xyz"], nll=nats)
        for name, nats in (("x", [1.4, 1.4]), ("y", [1.6, 1.6]), ("z", [1.8, 1.8]))  # 0.70, 0.80, 0.90 a byte
    }
    row = fuse(*reads.items(), fusion="avgce", loss_positions="all")
    share = np.exp([-0.0, -2.0, -4.0]) / np.exp([-0.0, -2.0, -4.0]).sum()
    assert share.round(2).tolist() == [0.87, 0.12, 0.02]
    assert at(row, 0)["ab"] == pytest.approx(0.25 + 0.25 * share[0], abs=2e-6)


def test_avgce_averages_one_hots_where_a_source_is_unaligned() -> None:
    lost = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"c": 0.5}, {"a": 0.5}], byte_ends=[0, -1, -1])
    other = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"c": 0.5}, {"a": 0.5}])
    row = fuse(("lost", lost), ("other", other), fusion="avgce", weights="exp_ce", loss_positions="all")
    assert at(row, 1) == {"cd": 0.5, "c": 0.25, "tail": 0.25}
    # The last position has no next token: the source that needs it has no part there.
    assert at(row, 2) == {"a": 0.5, "tail": 0.5}
    assert row.fusion_weight[2] == 1
    assert row.chosen.tolist() == [-2, -2, -2]
    assert fuse(("lost", lost), ("gone", lost), fusion="avgce").chosen.tolist() == [-2, -1, -1]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1))
def test_bfloat16_rounds_to_the_nearest_even(values: list[float]) -> None:
    import torch  # slow to import, and only here

    x = np.array(values, np.float32)
    np.testing.assert_array_equal(to_bfloat16(x), torch.from_numpy(x).to(torch.bfloat16).float().numpy())


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


def test_a_source_that_does_not_spell_the_text_does_not_compete() -> None:
    """It reads the rest as one unknown token, so that its sum of nats is no likelihood of the text."""
    lossy = replace(READ, byte_ends=np.array([0, 2, -1, -1], np.int32), nll=np.float32([0.1, 0.1, 0.1, 0]))
    honest = replace(READ, nll=np.float32([1, 1, 1, 0]))
    both = ("honest", honest), ("lossy", lossy)
    assert fuse(*both).chosen.tolist()[:2] == [0, 0]
    assert fuse(*both, select_over="sequence").chosen.tolist()[:2] == [0, 0]
    by_token = fuse(*both, select_over="token")
    assert by_token.chosen.tolist()[:2] == [1, 0]  # up to the mismatch it spells the text and is better
    averaged = fuse(*both, fusion="avgce")
    assert averaged.targets.p.tolist() == fuse(("honest", honest)).targets.p.tolist()
    # Where nobody spells the text, all compete; and the published rule knows no such thing.
    assert fuse(("worse", replace(lossy, nll=lossy.nll * 9)), ("lossy", lossy)).chosen.tolist()[:1] == [1]
    assert fuse(*both, select_by="mean_ce_bfloat16").chosen.tolist()[:1] == [1]
