"""What the profiles `tiny` and `micro` are made of: text every Python carries, and models trained on it on the spot."""

from harness.models.tiny.recipe import (
    TinyModel,
    TinyRecipe,
    build_model,
    make_tokenizer,
    tiny_recipe,
    training_documents,
)
from harness.models.tiny.tokenizers import build_tokenizer

__all__ = [
    "TinyModel",
    "TinyRecipe",
    "build_model",
    "build_tokenizer",
    "make_tokenizer",
    "tiny_recipe",
    "training_documents",
]
