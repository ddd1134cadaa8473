"""What names a run: everything that its numbers come from, except the seeds."""

from typing import Any

from baselines.registry import get_method
from harness.data import corpus, passages
from harness.evaluation.suite import SUITES
from harness.experiment.pipeline import Experiment
from harness.models.manifest import read_model_manifest
from harness.stages import extraction, tokenization, training, vocabulary_maps
from harness.store.fingerprint import fingerprint

VERSIONS = {
    "passages": passages.VERSION,
    "tokens": tokenization.VERSION,
    "predictions": extraction.VERSION,
    "map": vocabulary_maps.VERSION,
    "train": training.VERSION,
    "curve": training.CURVE_VERSION,
}
"""The version of each stage, by the kind of artifact that it makes."""
_OF_ROLE = {"batch_tokens"}
_NO_EFFECT: Any = {
    "seeds": True,  # runs with other seeds belong together, in one table
    "device": True,
    "threads": True,
    "data": True,  # what lies there is hashed
    "extraction": {"compression", "max_skipped_fraction"},
    "training": training.NO_EFFECT,
    "roles": {"target": _OF_ROLE, "teacher": _OF_ROLE, "sources": {"__all__": _OF_ROLE}},
    "suites": {"__all__": {"batch_size"}},
}
"""Settings that change no number."""


def run_fingerprint(experiment: Experiment) -> str:
    """The fingerprint that names a run's folder: that of the configuration and of what it only names."""
    config = experiment.config.model_dump(mode="json", exclude=_NO_EFFECT)
    return fingerprint({"config": config, **named(experiment)})


def model_sources(experiment: Experiment) -> dict[str, Any]:
    """Where the model of each role is from, as its folder's manifest has it: hub and commit, or wheels and SHA-256."""
    models = experiment.models
    return {name: read_model_manifest(models.base(name).folder).get("source") for name in models.names}


def named(experiment: Experiment) -> dict[str, Any]:
    """What the configuration only names: hashes of texts and models, precision, versions of stages and of methods."""
    config, models, corpora = experiment.config, experiment.models, experiment.corpora
    identity: dict[str, Any] = {
        "versions": VERSIONS,
        "methods": {entry["method"]: get_method(entry["method"]).version for entry in config.methods.values()},
        "passages": corpora.passages[0].fingerprint,
        "suites": {
            name: {"registered": SUITES.part(name).version, **suite.identity()}
            for name, suite in experiment.suites.items()
        },
        "models": {name: models.fingerprint(name) for name in models.names},
        "dtypes": {name: models.dtype(name) for name in models.names},
    }
    if any(entry.get("balance") == "rescale" for entry in config.methods.values()):
        identity["micro_batch_size"] = config.training.micro_batch_size  # over which the ratio is taken
    if config.validation is not None:
        identity["validation"] = corpus.content_fingerprint(config.validation, corpora.data_root, corpora.store.hashes)
    return identity
