"""Features of losses from the predictions of a sequence's passages, by numbers worked out by hand."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest

from fusion.errors import UserError
from fusion.losses.alm import ALMLoss
from fusion.losses.fusion_loss import FusionLoss
from fusion.losses.loss import Loss, LossResources
from fusion.losses.online_distillation import OnlineDistillationLoss
from fusion.losses.top_k_distillation import LEAST_TAIL, TopKDistillationLoss
from fusion.losses.uld import ULDLoss
from fusion.switches import Switches
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary, same_ids
from tests.fusion.alignment.fusing import MAP, OTHER, OWN, READ, TARGET, predictions

BARE = Predictions.empty(OWN.tokens, OWN.byte_ends, 0)  # the target where nothing of it was extracted
SKIPPED = Predictions.empty(READ.tokens, READ.byte_ends, 3)
TWIN = predictions(TARGET, ["ab", "cd"], [{"ab": 0.5, "b": 0.5}, {"cd": 0.25, "d": 0.25}, {"a": 1.0, "b": 0.0}])

token_by_token = partial(TopKDistillationLoss, projection="token", inside="none", true_token="top_k")


def features(loss: Loss, *passages: Mapping[str, Predictions], size: int = 4) -> dict[str, np.ndarray]:
    resources = LossResources("target", {"target": TARGET, "other": OTHER, "twin": TARGET}, {"other": MAP})
    predictions = [{"target": BARE, **passage} for passage in passages]
    return loss.features(predictions, [size] * len(passages), resources)


def test_a_teacher_is_carried_over_where_it_has_a_partner() -> None:
    found = features(token_by_token(["other"]), {"other": READ}, {"other": SKIPPED})
    entries = [
        dict(zip(i.tolist(), p.tolist(), strict=True))
        for i, p in zip(found["ids"][:, 0], found["p"][:, 0], strict=True)
    ]
    assert {TARGET.tokens[i]: p for i, p in entries[0].items() if i >= 0} == {"ab": 0.5, "a": 0.125}
    assert found["tail"][0, 0] == 0.375
    # Nothing after the last position, and nothing is known of the second passage.
    assert found["weight"][:, 0].tolist() == [1, 1, 0, 0, 0, 0]


def test_teachers_share_the_positions_they_have() -> None:
    found = features(token_by_token(["other", "twin"]), {"other": READ, "twin": TWIN}, {"other": SKIPPED, "twin": TWIN})
    assert found["weight"].tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 1], [0, 1], [0, 0]]
    assert found["ids"].shape == found["p"].shape == (6, 2, 2)


@pytest.mark.parametrize("kind", [ULDLoss, token_by_token, ALMLoss])
def test_teachers_are_weighted_or_chosen(kind: Any) -> None:
    """The first passage is likelier under `other`; the second was not read by it, the third not spelt."""
    entries = [{"ab": 0.5, "a": 0.25, "b": 0.125}] * 3
    likely, lost = (predictions(OTHER, ["ab", "cd"], entries, [0.1, 0.1], ends) for ends in (None, [0, 2, -1]))
    passages = [{"other": likely, "twin": TWIN}, {"other": SKIPPED, "twin": TWIN}, {"other": lost, "twin": TWIN}]
    weighted = features(kind(["other", "twin"], teacher_weights=[3, 1]), *passages)["weight"]
    np.testing.assert_allclose(weighted[[0, 3]], [[0.75, 0.25], [0, 1]])
    chosen = features(kind(["other", "twin"], teacher_weights="mince"), *passages)["weight"]
    assert chosen[[0, 3, 6]].tolist() == [[1, 0], [0, 1], [0, 1]]
    only = features(kind(["other", "twin"], teacher_weights=[1, 0]), *passages)["weight"]
    assert only[[0, 3]].tolist() == [[1, 0], [0, 0]]


def test_one_vocabulary_needs_no_map() -> None:
    """The resources hold none for the twin: its ids are the target's."""
    found = features(token_by_token(["twin"]), {"twin": TWIN})
    assert found["ids"][0, 0].tolist() == TWIN.ids[0].tolist()
    assert found["tail"][0, 0] == np.float32(LEAST_TAIL)  # of a tail that is rounded to 0


def test_the_target_can_teach_itself() -> None:
    found = features(token_by_token(["target"]), {"target": OWN})
    np.testing.assert_array_equal(found["ids"][:, 0], OWN.ids)
    np.testing.assert_allclose(found["p"][:2, 0], [[0.5, 0.25]] * 2, rtol=1e-6)


@pytest.mark.parametrize(("tail", "mass"), [("renormalise", 1.0), ("gold", 1.0), ("bucket", 0.625)])
def test_the_mass_beyond_the_top_k(tail: Any, mass: float) -> None:
    found = features(token_by_token(["other"], tail=tail), {"other": READ})
    assert found["p"][0, 0].sum() == mass
    assert found["tail"][0, 0] == 1 - mass


def test_who_reads_along_does_so_where_a_token_follows() -> None:
    found = features(OnlineDistillationLoss(["twin"]), {}, {})
    assert found["weight"].tolist() == [1, 1, 0, 1, 1, 0]


def test_sorted_probabilities_stand_at_the_partner() -> None:
    found = features(ULDLoss(["other", "twin"]), {"other": READ, "twin": TWIN}, {"other": SKIPPED, "twin": TWIN})
    np.testing.assert_allclose(found["p"][0], [[0.5, 0.25, 0.125], [0.5, 0.5, 0]], rtol=1e-6)
    np.testing.assert_allclose(found["tail"][0], [0.125, 0], atol=1e-7)
    assert found["weight"].tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [0, 1], [0, 1], [0, 0]]


def test_chunks_lie_between_common_ends() -> None:
    # The source reads ab|c|d where the target reads ab|cd.
    read = predictions(OTHER, ["ab", "c", "d"], [{"a": 0.5}] * 4, [1.0, 0.25, 0.5])
    found = features(ALMLoss(["other"]), {"other": read}, {"other": SKIPPED}, {"other": read})
    assert found["chunk"][:, 0].tolist() == [0, 1, -1, -1, -1, -1, 4, 5, -1]
    assert found["teacher_nll"][:, 0].tolist() == [1.0, 0.75, 0, 0, 0, 0, 1.0, 0.75, 0]
    # A target token that ends within the source's belongs to the same chunk as the next.
    short = predictions(TARGET, ["ab", "c", "d"], [{"a": 0.5}] * 4)
    whole = predictions(OTHER, ["ab", "cd"], [{"a": 0.5}] * 3, [1.0, 0.5])
    found = features(ALMLoss(["other"]), {"other": whole, "target": short})
    assert found["chunk"][:, 0].tolist() == [0, 1, 1, -1]
    assert found["teacher_nll"][:, 0].tolist() == [1.0, 0.5, 0.5, 0]


def test_text_that_tokens_do_not_spell_is_in_no_chunk() -> None:
    lost = predictions(OTHER, ["ab", "c", "d"], [{"a": 0.5}] * 4, [1.0, 0.25, 0.5], byte_ends=[0, 2, -1, -1])
    found = features(ALMLoss(["other"]), {"other": lost})
    assert found["chunk"][:, 0].tolist() == [0, -1, -1]


def test_rows_beyond_the_tokens_do_not_make_another_vocabulary() -> None:
    padded = Vocabulary.from_tokens([*TARGET.tokens, "", ""], space=" ", control={0})
    assert same_ids(TARGET, padded) and same_ids(padded, TARGET)
    assert not same_ids(TARGET, Vocabulary.from_tokens([*TARGET.tokens, "x"], space=" ", control={0}))
    assert not same_ids(TARGET, Vocabulary.from_tokens(list(TARGET.tokens), space=" "))
    source = LossResources("target", {"target": TARGET, "twin": padded}).source("twin")
    assert source.map.tolist() == [*range(len(TARGET)), -1, -1]


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (
            TopKDistillationLoss,
            {"divergence": "jensen_shannon", "tail": "renormalise"},
            "set tail to bucket, or online to true",
        ),
        (TopKDistillationLoss, {"divergence": "reverse_kl", "tail": "gold"}, "set tail to bucket"),
        (TopKDistillationLoss, {"divergence": "forwardkl"}, "did you mean 'forward_kl'"),
        (TopKDistillationLoss, {"tail": "buckets"}, "did you mean 'bucket'"),
        (TopKDistillationLoss, {"map": "mind"}, "did you mean 'mined'"),
        (TopKDistillationLoss, {"alignment": "same"}, "no alignment 'same'"),
        (OnlineDistillationLoss, {"temperature": 0.0}, "temperature is 0.0"),
        (ULDLoss, {"teachers": []}, "name at least one"),
        (ALMLoss, {"teachers": ["a", "a"]}, "each once"),
        (ULDLoss, {"teacher_weights": [1.0, 2.0]}, r"2 numbers for 1 teachers \(a\): give one each"),
        (ULDLoss, {"teacher_weights": [0.0]}, "one must be positive"),
        (ULDLoss, {"teacher_weights": "mean"}, "uniform, mince, or one number a teacher"),
        (OnlineDistillationLoss, {"teacher_weights": "mince"}, "set online to false"),
    ],
)
def test_what_does_not_hold_is_refused(kind: Any, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        kind(**{"teachers": ["a"], **settings})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"map": "mind"}, "did you mean 'mined'"),
        ({"switches": Switches(alignment="same_ends")}, "same_end"),
        ({"switches": Switches(fusion="minse")}, "mince"),
    ],
)
def test_the_fusion_loss_refuses_unknown_names_before_anything_runs(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        FusionLoss(["a"], **settings)
