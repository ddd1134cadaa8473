"""What a training is given to learn from beside its text: stored readings, vocabularies, maps, models in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import UserError
from fusion.losses.specs import Material, Needs
from fusion.vocabulary.token_bytes import same_ids
from harness.models.checkpoints import compute_dtype

if TYPE_CHECKING:
    from harness.experiment.context import Experiment
    from harness.stages.extraction import Extraction

_TARGET = "target"


def material(experiment: Experiment, needs: Needs) -> Material:
    """Vocabularies and maps, for a lesson. Reads files: not for a plan."""
    names = {_TARGET, *needs.extractions, *needs.models}
    maps = {name: experiment.map(name, needs.map, needs.map_on)[1] / "map.npy" for name in needs.maps}
    return Material(
        _TARGET,
        {name: experiment.tokenizer(name)[1] for name in names},
        {name: np.load(path, allow_pickle=False) for name, path in maps.items()},
    )


def readers(experiment: Experiment, needs: Needs) -> dict[str, Extraction]:
    """The extractions that a lesson needs, by role."""
    return {name: experiment.reader(name, needs.temperature, needs.k) for name in needs.extractions}


def made_of(experiment: Experiment, label: str, needs: Needs) -> dict[str, Any]:
    """Fingerprints of what a lesson is made of. Raises UserError where it cannot be had."""
    extracted = [1.0, *experiment.config.extraction.temperatures]
    if needs.temperature not in extracted:
        raise UserError(
            f"{label} takes stored distributions at temperature {needs.temperature:g}, and those extracted are "
            f"{', '.join(f'{t:g}' for t in extracted)}: add it to extraction.temperatures."
        )
    stored = experiment.config.extraction.k
    if needs.k is not None and needs.k > stored:
        raise UserError(
            f"{label} uses k = {needs.k} entries a position, but only extraction.k = {stored} are stored: raise that, "
            "or lower the row's k."
        )
    for name in needs.models:
        # In a plan a model may not be here yet.
        here = experiment.model(name).folder.exists() and experiment.model(_TARGET).folder.exists()
        if here and not same_ids(experiment.tokenizer(name)[1], experiment.tokenizer(_TARGET)[1]):
            raise UserError(
                f"{label} has {name} read the target's tokens, but its tokenizer is another: choose a teacher with "
                "the target's tokenizer, or set online to false."
            )
    inputs: dict[str, Any] = {}
    if needs.extractions:
        inputs["extractions"] = {name: experiment.extract(name)[0].fingerprint for name in needs.extractions}
    if needs.maps:
        inputs["maps"] = {n: experiment.map(n, needs.map, needs.map_on)[0].fingerprint for n in needs.maps}
    if needs.models:
        inputs["models"] = {
            name: {
                "model": experiment.model(name).fingerprint,
                "dtype": compute_dtype(experiment.role(name).dtype, experiment.device),
            }
            for name in needs.models
        }
    return inputs
