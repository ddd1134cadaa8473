"""Projecting and fusing: every switch by numbers worked out by hand, and what is refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fusion.alignment.fuse import Source, fuse_sequence
from fusion.alignment.projection import project_entries
from fusion.errors import UserError
from fusion.switches import PRESETS, Switches
from fusion.types import Predictions
from tests.fusion.alignment.fusing import MAP, OTHER, OWN, READ, TARGET, TOKEN_BY_TOKEN, at, fuse, predictions


def test_the_corrected_defaults_project_by_bytes() -> None:
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


def test_unaligned_positions_take_the_next_or_the_current_token() -> None:
    whole = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], byte_ends=[0, -1, -1])
    row = fuse(("other", whole))
    assert at(row, 1) == {"cd": 1.0}
    assert row.chosen.tolist() == [0, -1, -1]
    assert at(fuse(("other", whole), unaligned="current"), 1) == {"ab": 1.0}


def test_unmapped_entries_keep_their_mass_in_the_tail_or_take_the_targets_distribution() -> None:
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


def test_unmapped_entries_need_the_targets_own_entries() -> None:
    lost = predictions(OTHER, ["ab", "cd"], [{"x": 0.75}, {"cd": 0.5}, {"a": 0.5}])
    tokens_only = predictions(TARGET, ["ab", "cd"], [{}, {}, {}])
    assert at(fuse(("other", lost), own=tokens_only), 0) == {"tail": 1.0}
    with pytest.raises(UserError, match="'target' are needed"):
        fuse(("other", lost), own=tokens_only, unmapped="target")


def test_duplicates_are_summed_or_the_first_is_kept() -> None:
    assert at(fuse(("other", READ), duplicates="sum"), 1) == {"c": 0.5, "cd": 0.25, "tail": 0.25}
    assert at(fuse(("other", READ), duplicates="first"), 1) == {"c": 0.25, "cd": 0.25, "tail": 0.5}
    assert at(fuse(("other", READ), duplicates="first", tail="renormalise"), 1) == {"c": 0.5, "cd": 0.5}


def test_the_tail_is_kept_scaled_away_or_goes_to_the_gold_token() -> None:
    assert at(fuse(("other", READ), tail="renormalise"), 0) == {"ab": 0.8, "a": 0.2}
    assert at(fuse(("other", READ), tail="gold"), 0) == {"ab": 0.875, "a": 0.125}
    without_gold = predictions(OTHER, ["ab", "cd"], [{"b": 0.25}, {"cd": 0.5}, {"a": 0.5}])
    assert at(fuse(("other", without_gold), tail="gold"), 0) == {"b": 0.25, "ab": 0.75}


def test_positions_without_a_next_token() -> None:
    assert fuse(("other", READ), loss_positions="with_next").fusion_weight.tolist() == [1, 1, 0]
    every = fuse(("other", READ), loss_positions="all")
    assert every.fusion_weight.tolist() == [1, 1, 1]
    assert at(every, 2) == {"a": 0.25, "b": 0.125, "tail": 0.625}
    # Nothing is trained on where a one-hot on the next token is called for and there is none.
    whole = predictions(OTHER, ["ab", "cd"], [{"ab": 0.5}, {"cd": 0.5}, {"a": 0.5}], byte_ends=[0, -1, -1])
    assert fuse(("other", whole), loss_positions="all").fusion_weight.tolist() == [1, 1, 0]
    assert fuse(("other", whole), loss_positions="all", unaligned="current").fusion_weight.tolist() == [1, 1, 1]
    # Nor can the tail go to it: it is scaled away.
    assert at(fuse(("other", READ), loss_positions="all", tail="gold"), 2) == pytest.approx(
        {"a": 2 / 3, "b": 1 / 3}, abs=1e-5
    )


def test_the_target_takes_part_or_not() -> None:
    row = fuse(("other", READ), own=replace(OWN, nll=OWN.nll / 4), include_target=True)
    assert row.names == ("target", "other")
    assert row.chosen.tolist() == [0, 0, 0]
    assert at(row, 0) == {"ab": 0.5, "a": 0.25, "tail": 0.25}
    assert fuse(("other", READ), own=replace(OWN, nll=OWN.nll / 4)).names == ("other",)


def test_max_entries_keeps_the_most_probable_and_moves_the_rest_to_the_tail() -> None:
    row = fuse(("other", READ), max_entries=1)
    assert row.targets.ids.shape == (3, 1)
    assert at(row, 0) == {"ab": 0.5, "tail": 0.5}
    assert at(fuse(("other", READ), max_entries=1, tail="gold"), 1) == {"c": 0.5, "tail": 0.5}
    assert fuse(("other", READ), max_entries=9).targets.ids.shape == (3, 2)
    with pytest.raises(UserError, match="max_entries is 0"):
        fuse(("other", READ), max_entries=0)


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


def test_presets_only_name_switches_and_corrected_is_the_default() -> None:
    assert Switches(**PRESETS["corrected"]) == Switches()
    published = Switches(**PRESETS["published"])
    assert set(PRESETS["published"]) == set(PRESETS["corrected"])
    assert all(getattr(published, name) != getattr(Switches(), name) for name in PRESETS["corrected"])


def test_predictions_and_maps_that_do_not_fit_are_refused() -> None:
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
    refuse("made for another target", mapped=np.where(MAP == 5, -2, MAP))
    refuse("made for another target", mapped=np.where(MAP == 5, 70, MAP))
    refuse("sum to 1.625", replace(READ, log_p=np.log(np.full_like(READ.log_p, 0.5))))
    refuse("sum to 0.875", replace(READ, tail=np.zeros_like(READ.tail)))
    refuse("sum to nan", replace(READ, log_p=np.full_like(READ.log_p, np.nan)))
    refuse("different lengths", replace(READ, nll=READ.nll[:-1]))
    refuse("byte 0", replace(READ, byte_ends=READ.byte_ends + 1))
    refuse("not finite", replace(READ, nll=READ.nll * np.nan))
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


def test_projecting_logits_keeps_their_order_and_the_first_of_duplicates() -> None:
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
