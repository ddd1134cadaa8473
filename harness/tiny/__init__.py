"""What the profiles `tiny` and `micro` are made of: text every Python carries, and models trained on it on the spot."""

from harness.tiny.corpus import DOMAINS, TinyDocument, stdlib_corpus
from harness.tiny.recipe import (
    TinyModel,
    TinyRecipe,
    build_model,
    make_tokenizer,
    tiny_recipe,
    training_documents,
)
from harness.tiny.vocabularies import build_tokenizer

__all__ = [
    "DOMAINS",
    "TinyDocument",
    "TinyModel",
    "TinyRecipe",
    "build_model",
    "build_tokenizer",
    "make_tokenizer",
    "stdlib_corpus",
    "tiny_recipe",
    "training_documents",
]
