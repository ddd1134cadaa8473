"""What a loss is computed from beside the text: stored predictions, vocabularies, maps, and teachers in memory.

A plan knows the fingerprints of all of them and opens none; a training then opens what its loss requires.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from fusion.losses.loss import Encodings, LossRequirements, LossResources
from fusion.vocabulary.pieces import encode_tokens
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import encode_all
from harness.config.schema import ExtractionConfig
from harness.data.passages import Passages
from harness.data.predictions import PredictionsReader
from harness.data.tokens import Tokens
from harness.models.resolution import ResolvedModel
from harness.stages.vocabulary_maps import read_map, read_pieces
from harness.store.artifacts import Spec

TARGET = "target"

TokenizerOf = Callable[[str], tuple[Any, Vocabulary]]
"""Loads the tokenizer and the vocabulary of a role's model."""


@dataclass(frozen=True)
class LossInputs:
    """The artifacts and models that a loss is computed from, by role. In a plan they need not exist yet."""

    predictions: Mapping[str, tuple[Spec, Path]] = field(default_factory=dict)
    tokens: Mapping[str, Path] = field(default_factory=dict)
    """Of the predictions' models; no part of a key, since they follow from the models and the passages."""
    maps: Mapping[str, tuple[Spec, Path]] = field(default_factory=dict)
    teachers: Mapping[str, tuple[ResolvedModel, str]] = field(default_factory=dict)
    """Models in memory that predict every batch, and their computing precision."""

    def fingerprints(self) -> dict[str, Any]:
        """What the key of a training holds of them; empty where the loss requires nothing."""
        fingerprints: dict[str, Any] = {}
        if self.predictions:
            fingerprints["extractions"] = {name: spec.fingerprint for name, (spec, _) in self.predictions.items()}
        if self.maps:
            fingerprints["maps"] = {name: spec.fingerprint for name, (spec, _) in self.maps.items()}
        if self.teachers:
            fingerprints["models"] = {
                name: {"model": model.fingerprint, **model.spec.computing(dtype)}
                for name, (model, dtype) in self.teachers.items()
            }
        return fingerprints


def check_stored(label: str, requirements: LossRequirements, settings: ExtractionConfig) -> None:
    """Raises UserError where the row `label` needs a temperature or a k that the predictions are not stored at."""
    temperatures = [1.0, *settings.temperatures]
    if requirements.temperature not in temperatures:
        raise UserError(
            f"{label} takes stored distributions at temperature {requirements.temperature:g}, and those extracted are "
            f"{', '.join(f'{t:g}' for t in temperatures)}: add it to extraction.temperatures."
        )
    if requirements.k is not None and requirements.k > settings.k:
        raise UserError(
            f"{label} uses k = {requirements.k} entries a position, but only extraction.k = {settings.k} are stored: "
            "raise that, or lower the row's k."
        )


def load_resources(requirements: LossRequirements, inputs: LossInputs, tokenizer_of: TokenizerOf) -> LossResources:
    """The vocabularies and maps of the inputs. Reads files, so it is not for a plan."""
    names = {TARGET, *requirements.predictions, *requirements.models}
    vocabularies = {name: tokenizer_of(name)[1] for name in names}
    pieces = {name: read_pieces(folder, vocabularies[name]) for name, (_, folder) in inputs.maps.items()}
    return LossResources(
        TARGET,
        vocabularies,
        {name: read_map(folder) for name, (_, folder) in inputs.maps.items()},
        {name: piece_map for name, piece_map in pieces.items() if piece_map is not None},
        {name: _encodings(tokenizer_of(TARGET), tokenizer_of(name)) for name in requirements.encodings},
    )


def _encodings(target: tuple[Any, Vocabulary], role: tuple[Any, Vocabulary]) -> Encodings:
    """The tokens of the target and of a role in one another's, from their tokenizers and vocabularies."""
    of_target, of_role = (
        encode_tokens(one, other, partial(encode_all, tokenizer))
        for (_, one), (tokenizer, other) in ((target, role), (role, target))
    )
    return Encodings(of_target, of_role)


def open_predictions(
    requirements: LossRequirements, inputs: LossInputs, passages: Passages, tokenizer_of: TokenizerOf
) -> dict[str, PredictionsReader]:
    """Readers of the stored predictions that a loss requires, by role, at its temperature and k."""
    temperature, k = requirements.temperature, requirements.k
    return {
        name: PredictionsReader(folder, passages, Tokens(inputs.tokens[name]), *tokenizer_of(name), temperature, k)
        for name, (_, folder) in inputs.predictions.items()
    }
