"""Everything computed with models and distributions: functions over arrays and tensors, no files, no configuration.

The steps of FuseLLM in their order: `Vocabulary` (what token ids mean in bytes), `build_map` and `build_piece_map`
(source ids to target ids), `same_end` (which positions are about the same text), `project_entries` and
`fill_unaligned` (a source's distribution over the target's tokens), `mince` and `avgce` (one distribution out of
several), `fuse_sequence` (all of these), `mixed_loss` (the training objective). Names are imported when they are
first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusion.alignment.fuse import FusedSequence, Source, fuse_sequence
    from fusion.alignment.pairing import ALIGNMENTS, same_end
    from fusion.alignment.projection import fill_unaligned, project_entries
    from fusion.alignment.selection import FUSIONS, avgce, mince
    from fusion.errors import UserError
    from fusion.inference.top_k import predict_top_k
    from fusion.losses.divergences import DIVERGENCES
    from fusion.losses.objective import Head, mixed_loss, mixed_loss_from_logits
    from fusion.switches import PRESETS, Switches
    from fusion.types import Predictions, Sparse
    from fusion.vocabulary.maps import MAPS, build_map
    from fusion.vocabulary.pieces import PieceMap, build_piece_map
    from fusion.vocabulary.token_bytes import Vocabulary, byte_ends
    from fusion.vocabulary.tokenization import encode, prefix_id

_MODULES = {
    "alignment.fuse": ("FusedSequence", "Source", "fuse_sequence"),
    "alignment.pairing": ("ALIGNMENTS", "same_end"),
    "alignment.projection": ("fill_unaligned", "project_entries"),
    "alignment.selection": ("FUSIONS", "avgce", "mince"),
    "errors": ("UserError",),
    "inference.top_k": ("predict_top_k",),
    "losses.divergences": ("DIVERGENCES",),
    "losses.objective": ("Head", "mixed_loss", "mixed_loss_from_logits"),
    "switches": ("PRESETS", "Switches"),
    "types": ("Predictions", "Sparse"),
    "vocabulary.maps": ("MAPS", "build_map"),
    "vocabulary.pieces": ("PieceMap", "build_piece_map"),
    "vocabulary.token_bytes": ("Vocabulary", "byte_ends"),
    "vocabulary.tokenization": ("encode", "prefix_id"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "ALIGNMENTS",
    "DIVERGENCES",
    "FUSIONS",
    "MAPS",
    "PRESETS",
    "FusedSequence",
    "Head",
    "PieceMap",
    "Predictions",
    "Source",
    "Sparse",
    "Switches",
    "UserError",
    "Vocabulary",
    "avgce",
    "build_map",
    "build_piece_map",
    "byte_ends",
    "encode",
    "fill_unaligned",
    "fuse_sequence",
    "mince",
    "mixed_loss",
    "mixed_loss_from_logits",
    "predict_top_k",
    "prefix_id",
    "project_entries",
    "same_end",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
