"""The tiny models of the profiles `tiny` and `micro`: tokenizers and models that are trained on the spot."""

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
