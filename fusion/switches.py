"""The switches of fusion: how distributions are aligned, projected and fused, and the presets that set them.

Every defect of the published code is one switch with the published and the corrected behaviour as its values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fusion.errors import UserError, did_you_mean
from fusion.registry import PartName


@dataclass(frozen=True)
class Switches:
    """How the sources' distributions become one target distribution; the defaults are those of the preset `corrected`.

    Names of registered parts (`alignment`, `fusion`) are looked up where they are used: by
    `fusion.losses.fusion_loss.FusionLoss` when it is made, and by `fusion.alignment.fuse.fuse_sequence`.
    Raises UserError for a value that a switch does not have.
    """

    alignment: PartName = "same_end"
    """Which source position is paired with a target position: a name in the registry of alignments (`same_end`, `dtw`),
    or `{name: NAME, PARAMETER: VALUE}`."""
    projection: Literal["path", "token"] = "path"
    """How a source's entries become the target's: along the text, so that the true next token has the probability that
    the source gave its bytes, or each token by itself. `path` needs the alignment `same_end`, `duplicates: sum`, and a
    map of the kinds `first_piece` and `byte_prefix`."""
    inside: Literal["prefix", "none"] = "prefix"
    """At a position inside a source token: the entries that begin with what is read already, as far as they go on, or
    nothing, so that the position is unaligned. `prefix` needs what `path` needs, and predictions at temperature 1."""
    true_token: Literal["always", "top_k"] = "always"
    """The token that really follows in the source's tokenization is an entry always, with the probability that is
    stored for it, or only where it is one of the k most probable."""
    unaligned: Literal["next", "current"] = "next"
    """At a position without a partner the target distribution is a one-hot on the next or on the current token of the
    target's own tokenization."""
    unmapped: Literal["tail", "target"] = "tail"
    """Where none of a source's entries has a target token: all mass goes to the tail, or the target's own distribution
    takes its place."""
    duplicates: Literal["sum", "first"] = "sum"
    """Probabilities of entries that map to the same target token: their sum, or the first one's while the others' mass
    is lost."""
    tail: Literal["bucket", "renormalise", "gold"] = "bucket"
    """Mass outside the kept entries: it is kept as one more outcome, removed by scaling the entries to 1, or added to
    the gold next token."""
    fusion: PartName = "mince"
    """How the sources' distributions become one: a name in the registry of fusion functions (`mince`, `avgce`), or
    `{name: NAME, PARAMETER: VALUE}`."""
    select_over: Literal["passage", "token", "sequence"] = "passage"
    """The span of text over which cross-entropy is summed and one source is selected: a passage, a segment between byte
    ends that all models share, or the whole packed sequence. At `token` the selection depends on the gold text that is
    to be predicted, which moves the targets towards it and the loss towards plain language modelling."""
    select_by: Literal["nats_per_byte", "mean_ce_bfloat16"] = "nats_per_byte"
    """What MinCE compares: cross-entropy in nats per byte of text (float32, ties by the source's name), or exp(-CE) in
    bfloat16 with CE in nats per token of the source's own tokenizer (ties by the order of the sources)."""
    weights: Literal["nats_per_byte", "exp_ce"] = "nats_per_byte"
    """Weights of AvgCE: softmax(-CE / weight_temperature) with CE in nats per byte, or the softmax of the exp(-CE) of
    `mean_ce_bfloat16`, which is nearly uniform."""
    weight_temperature: float = 0.05
    """Temperature of AvgCE's weights in nats per byte; used with `weights: nats_per_byte`. Small enough to tell sources
    apart: at 0.05, sources of 0.70, 0.80 and 0.90 nats per byte weigh 0.87, 0.12 and 0.02."""
    loss_positions: Literal["with_next", "all"] = "with_next"
    """Positions at which the fusion loss is taken: those with a next token in their passage, or all."""
    include_target: bool = True
    """True if the target's own predictions take part as one of the sources."""
    control: Literal["none", "shuffled"] = "none"
    """`shuffled` is a negative control: all predictions, the target's own too, stand in another order within each
    passage, so that nothing of the text can be learnt of them."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            allowed = get_args(hint) if get_origin(hint) is Literal else ()
            if allowed and value not in allowed:
                raise UserError(
                    f"switch {field.name} is {value!r}{did_you_mean(value, allowed)}; it takes one of "
                    f"{', '.join(allowed)}."
                )
        if not self.weight_temperature > 0:
            raise UserError(f"switch weight_temperature is {self.weight_temperature}; it must be greater than 0.")

    @property
    def along_text(self) -> bool:
        """True if the projection uses the bytes of the text."""
        return self.projection == "path" or self.inside == "prefix"

    def check_projection(self) -> None:
        """Raises UserError where the other switches do not go with a projection along the text."""
        alignment = self.alignment if isinstance(self.alignment, str) else self.alignment.get("name")
        if self.along_text and (alignment != "same_end" or self.duplicates != "sum"):
            raise UserError(
                "projection: path and inside: prefix align positions by the bytes of the text and add up duplicates: "
                "set alignment to same_end and duplicates to sum, or projection to token and inside to none."
            )


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "corrected": {
        "alignment": "same_end",
        "projection": "path",
        "inside": "prefix",
        "true_token": "always",
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
        "projection": "token",
        "inside": "none",
        "true_token": "top_k",
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
"""Values of the switches by preset: `published` reproduces the published code, `corrected` repairs its defects."""
