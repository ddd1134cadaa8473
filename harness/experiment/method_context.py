"""What one method with one seed is given of an experiment at work."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from baselines.method import Artifact, Candidate
from fusion.errors import UserError
from fusion.losses.specs import Learning
from harness.config.loading import PerplexityConfig
from harness.evaluation import bits_per_byte
from harness.experiment.context import TARGET, Experiment, plain_json
from harness.models.checkpoints import ModelSpec, compute_dtype, find_entry, is_hub_id
from harness.runtime.progress import track
from harness.store.artifacts import Estimate, Spec
from harness.store.fingerprint import fingerprint


class MethodContext:
    """The context of a method (`baselines.method.Context`)."""

    def __init__(self, experiment: Experiment, label: str, seed: int) -> None:
        self._experiment = experiment
        self.label = label
        self.seed = seed

    @property
    def sources(self) -> Sequence[str]:
        return list(self._experiment.config.roles.sources)

    def model(self, role: str) -> Candidate:
        named = self._experiment.config.roles.named()
        if role not in named and (find_entry(role) or is_hub_id(role) or Path(role).expanduser().exists()):
            model = self._experiment.resolve(ModelSpec(name=role))
        else:
            model = self._experiment.model(role)
        return Candidate(model.folder, model.fingerprint, seeded=False)

    def extract(self, role: str) -> Path:
        return self._experiment.extract(role)[1]

    def train(self, *, lam: float, learn: Learning | None = None) -> Candidate:
        return self._experiment.train(self.label, self.seed, lam=lam, learn=learn)

    @property
    def _section(self) -> PerplexityConfig:
        config = self._experiment.config
        assert config.validation is not None
        return config.suites.perplexity.model_copy(update={"documents": config.validation})

    @property
    def held_out(self) -> str:
        experiment = self._experiment
        documents, _ = experiment.validation
        dtype = compute_dtype(experiment.role(TARGET).dtype, experiment.device)
        return fingerprint(
            {
                "documents": bits_per_byte.documents_fingerprint(documents),
                "dtype": dtype,
                **self._section.model_dump(exclude={"documents"}),
            }
        )

    def score(self, candidate: Candidate, label: str = "") -> float:
        from harness.evaluation.perplexity import evaluate

        experiment = self._experiment
        documents, n_bytes = experiment.validation
        evaluated = experiment.evaluated(label or self.label, candidate, experiment.role(TARGET))
        _, path = evaluate(self._section, documents, evaluated, experiment.store, experiment.costs, n_bytes)
        evaluated.release()
        if not path.exists():  # in a plan
            return math.nan
        rows = bits_per_byte.read_evaluation(path)
        found = sum(row["nats"] for row in rows) / sum(row["bytes"] for row in rows)
        if not math.isfinite(found):
            raise UserError(f"{label or self.label} has no finite likelihood of the validation text: leave it out.")
        return float(found)

    def make(
        self,
        kind: str,
        build: Callable[[Path], Mapping[str, Any] | None],
        *,
        version: int,
        inputs: Mapping[str, str],
        params: Mapping[str, Any],
        scores: int = 0,
    ) -> Artifact:
        experiment = self._experiment
        known = _nameable(params) if experiment.store.dry else params
        spec = Spec(kind, self.label, version, dict(inputs), plain_json(known))
        parameters = experiment.model_size(TARGET).parameters
        seconds = experiment.costs.forward(parameters, scores * experiment.validation[1]).seconds if scores else 0.0
        # About a checkpoint of the target is what most methods make.
        estimate = Estimate(disk=4 * parameters, memory=8 * parameters, seconds=seconds)
        return Artifact(experiment.store.ensure(spec, build, estimate), spec.fingerprint)

    def progress(self, description: str, total: float, unit: str) -> AbstractContextManager[Callable[[float], None]]:
        return track(description, total, unit)


def _nameable(value: Any) -> Any:
    """Parameters that a plan can give a fingerprint to: scores that are not known yet are null instead of NaN."""
    if isinstance(value, Mapping):
        return {key: _nameable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_nameable(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
