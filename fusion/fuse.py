"""Fusion (being written)."""

from fusion.targets import PRESETS, Reading, Sparse, Switches

__all__ = ["PRESETS", "Reading", "Sparse", "Switches"]
