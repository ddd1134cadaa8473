"""The data that fusion works on, and the switches that say how.

A *passage* is a UTF-8 text. A model reads `[prefix] + its tokens`, M positions; position 0 is the prefix and the
distribution at a position is about the text that follows it, so position M-1 has no next token in the passage.

Source: "Knowledge Fusion of Large Language Models", ICLR 2024, arXiv 2401.10491, sections 3.2 and 3.3.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import numpy as np

from fusion.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Predictions:
    """What one model says about one passage; M positions, its k most probable tokens each."""

    tokens: np.ndarray
    """int32[M], the prefix first."""
    ends: np.ndarray
    """int32[M], byte where each token ends; ends[0] = 0, -1 from the first token that no longer spells the text."""
    ids: np.ndarray
    """int32[M, k], ids of the reading model's own vocabulary, best first."""
    log_p: np.ndarray
    """float32[M, k], log-probabilities in nats."""
    tail: np.ndarray
    """float32[M], probability outside the k entries."""
    nats: np.ndarray
    """float32[M], -log p(next token of the passage); 0 at M-1."""
    skipped: bool = False
    """Nothing is known of what the model says (its logits were not finite): only tokens and ends are meant."""

    def top(self, k: int) -> "Predictions":
        """The same with the k most probable entries alone; what the others had joins the tail."""
        lost = np.exp(self.log_p[:, k:]).sum(1)
        return replace(self, ids=self.ids[:, :k], log_p=self.log_p[:, :k], tail=self.tail + lost)

    @classmethod
    def without(cls, tokens: np.ndarray, ends: np.ndarray, k: int) -> "Predictions":
        """The reading of a passage that is left out."""
        zeros, zero = np.zeros((len(tokens), k), np.float32), np.zeros(len(tokens), np.float32)
        return cls(tokens, ends, zeros.astype(np.int32), zeros, zero, zero, skipped=True)


@dataclass(frozen=True)
class Sparse:
    """N distributions over one vocabulary: K entries each and the mass outside them."""

    ids: np.ndarray
    """int32[N, K], -1 where a row has fewer than K entries (pads last)."""
    p: np.ndarray
    """float32[N, K], 0 at pads."""
    tail: np.ndarray
    """float32[N], mass outside `ids`."""


@dataclass(frozen=True)
class Switches:
    """How distributions are aligned, carried over and fused; the defaults are the method with its defects corrected.

    Raises `UserError` for a value that a switch does not have or a name that is not registered.
    """

    alignment: str = "same_end"
    """Which source position serves a target position; a name in the registry of alignments (`same_end`, `dtw`)."""
    unaligned: Literal["next", "current"] = "next"
    """A position without a partner becomes a one-hot on this token of the target's own reading."""
    unmapped: Literal["tail", "target"] = "tail"
    """Where no entry survives the map: all mass in the tail, or the target's own distribution."""
    duplicates: Literal["sum", "first"] = "sum"
    """Entries that map to one target id: their sum, or the first with the rest's mass lost."""
    tail: Literal["bucket", "renormalise", "gold"] = "bucket"
    """The mass that is lost: rides along as one more outcome, is scaled away, or goes to the gold next token."""
    fusion: str = "mince"
    """How the sources become one distribution; a name in the registry of fusion functions (`mince`, `avgce`)."""
    select_over: Literal["passage", "token", "sequence"] = "passage"
    """The stretch of text over which cross-entropy is taken and one choice is made: a document's passage, a segment
    between byte ends that all models share, or the row. (By token the choice sees the gold text it is to predict, which
    draws the targets towards it and the loss towards plain language modelling.)"""
    select_by: Literal["nats_per_byte", "mean_ce_bfloat16"] = "nats_per_byte"
    """What MinCE compares: cross-entropy per byte of text (float32, ties by source name), or exp(-CE) in bfloat16 with
    CE per token of the source's own tokenizer (ties by the order of the sources)."""
    weights: Literal["nats_per_byte", "exp_ce"] = "nats_per_byte"
    """AvgCE: softmax(-CE / weight_temperature) of CE in nats per byte, or softmax of `mean_ce_bfloat16`'s exp(-CE),
    which is nearly uniform."""
    weight_temperature: float = 1.0
    """AvgCE with `weights: nats_per_byte`, in nats per byte."""
    loss_positions: Literal["with_next", "all"] = "with_next"
    """Where the fusion loss is taken: positions with a next token in their passage, or every one."""
    include_target: bool = True
    """Whether the target's own reading takes part as a source."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, allowed = getattr(self, field.name), get_args(hints[field.name])
            if allowed and value not in allowed:
                raise UserError(
                    f"switch {field.name} is {value!r}{did_you_mean(value, allowed)}; it takes one of "
                    f"{', '.join(allowed)}."
                )
        # Imported here, for the fusion functions are functions of switches.
        from fusion.alignment.pairing import ALIGNMENTS
        from fusion.alignment.selection import FUSIONS

        ALIGNMENTS.get(self.alignment)
        FUSIONS.get(self.fusion)
        if not self.weight_temperature > 0:
            raise UserError(f"switch weight_temperature is {self.weight_temperature}; it must be greater than 0.")


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "corrected": {
        "alignment": "same_end",
        "unaligned": "next",
        "unmapped": "tail",
        "duplicates": "sum",
        "tail": "bucket",
        "select_over": "passage",
        "select_by": "nats_per_byte",
        "weights": "nats_per_byte",
        "loss_positions": "with_next",
    },
    "published": {
        "alignment": "dtw",
        "unaligned": "current",
        "unmapped": "target",
        "duplicates": "first",
        "tail": "renormalise",
        "select_over": "sequence",
        "select_by": "mean_ce_bfloat16",
        "weights": "exp_ce",
        "loss_positions": "all",
    },
}
"""Settings of the switches by name: the method as the published code computes it, and with its defects corrected."""
