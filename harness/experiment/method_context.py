"""What one method with one seed is given of an experiment at work."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from baselines.method import Artifact, Candidate
from baselines.training import RowTraining
from fusion.errors import UserError
from fusion.losses.loss import Balance, Loss
from harness.config.named_rows import unknown_reference
from harness.config.validation import method_parameters
from harness.evaluation.perplexity import read_evaluation
from harness.experiment.pipeline import TARGET, Experiment, evaluated_model, predict, train
from harness.models.catalogue import find_entry, is_hub_id
from harness.models.resolution import ModelSpec
from harness.runtime.progress import notify, track
from harness.stages.training_log import LOST_BYTE, nats_per_byte
from harness.store.artifacts import Estimate, Spec
from harness.store.fingerprint import fingerprint, plain_json


class MethodContext:
    """The context of a method (`baselines.method.Context`)."""

    def __init__(
        self,
        experiment: Experiment,
        label: str,
        seed: int,
        build_row: Callable[[str, int], Candidate] | None = None,
        share: float = 1.0,
    ) -> None:
        """build_row: makes the candidate of another row, by its label and seed. Default: no row can be named.

        share: the part of the training passages that it trains on; less than all in a pilot.
        """
        self._experiment = experiment
        self._build_row = build_row
        self._share = share
        self.label = label
        self.seed = seed

    def pilot(self, share: float, label: str) -> "MethodContext":
        return MethodContext(self._experiment, label, self._experiment.config.seeds[0], self._build_row, share)

    def relabelled(self, label: str) -> "MethodContext":
        return MethodContext(self._experiment, label, self.seed, self._build_row, self._share)

    @property
    def sources(self) -> Sequence[str]:
        return list(self._experiment.config.roles.sources)

    def model(self, role: str) -> Candidate:
        models = self._experiment.models
        if role not in models.names and _is_model(role):
            model = models.resolve(ModelSpec(name=role))
            return Candidate(model.folder, model.fingerprint, seeded=False)
        model = models.model(role)
        return Candidate(model.folder, model.fingerprint, seeded=False, role=role, shape=models.shape(role))

    def candidate(self, name: str) -> Candidate:
        roles, rows = self._experiment.models.names, self._experiment.config.methods
        if name in roles or (name not in rows and _is_model(name)):
            return self.model(name)
        if name in rows and self._build_row is not None:
            return self._build_row(name, self.seed)
        raise UserError(unknown_reference(self.label, name, ("role", "row"), roles, rows))

    def extract(self, role: str) -> Path:
        return predict(self._experiment, role)[1]

    def train(
        self,
        *,
        lam: float,
        loss: Loss | None = None,
        start: Candidate | None = None,
        training: Mapping[str, Any] = {},
        balance: Balance = "none",
    ) -> Candidate:
        own = method_parameters(f"{self.label}.training", training, RowTraining)
        if tunes := own.tunes():
            raise UserError(f"{self.label} trains with several values of {', '.join(tunes)}: give it one.")
        return train(
            self._experiment,
            self.label,
            self.seed,
            lam=lam,
            loss=loss,
            start=start,
            own=own.given(),
            balance=balance,
            share=self._share,
        )

    @property
    def validation_fingerprint(self) -> str:
        experiment = self._experiment
        models, validation = experiment.models, experiment.corpora.validation
        return fingerprint(
            {
                "computing": {name: models.spec(name).computing(models.dtype(name)) for name in models.names},
                "prefixes": {name: prefix for name in models.names if (prefix := models.role(name).prefix)},
                **validation.key(validation.text(dry=experiment.workspace.store.dry)),
            }
        )

    def validation_nll(self, candidate: Candidate, label: str = "") -> float:
        experiment, label = self._experiment, label or self.label
        training, is_pilot = candidate.training, self._share < 1
        if is_pilot and training is not None and training.exists() and not candidate.folder.exists():
            return math.inf  # it has diverged
        workspace, validation = experiment.workspace, experiment.corpora.validation
        evaluated = evaluated_model(experiment, label, candidate)
        result = validation.measure(evaluated, workspace.store, workspace.costs)
        evaluated.release()
        measured = result.artifacts[validation.name]
        if not measured.exists():  # in a plan
            return math.nan
        records = read_evaluation(measured)
        if lost := sum(record["lost"] for record in records):
            notify(
                f"{label}: its tokens do not spell {lost:,.0f} bytes of the validation text; each counts as "
                f"{LOST_BYTE:.2f} nats, as without any model."
            )
        nll = nats_per_byte(records)
        if not math.isfinite(nll):
            if is_pilot:
                return math.inf
            raise UserError(f"{label} has no finite likelihood of the validation text: leave it out.")
        return nll

    def make(
        self,
        kind: str,
        build: Callable[[Path], Mapping[str, Any] | None],
        *,
        version: int,
        inputs: Mapping[str, str],
        params: Mapping[str, Any],
        validations: int = 0,
    ) -> Artifact:
        experiment = self._experiment
        workspace = experiment.workspace
        known = _nameable(params) if workspace.store.dry else params
        spec = Spec(kind, self.label, version, dict(inputs), plain_json(known))
        parameters = experiment.models.size(TARGET).parameters
        seconds = 0.0
        if validations:
            n_bytes = experiment.corpora.validation.text(dry=workspace.store.dry).n_bytes
            seconds = workspace.costs.forward(parameters, validations * n_bytes).seconds
        # About a checkpoint of the target is what most methods make.
        estimate = Estimate(disk=4 * parameters, memory=8 * parameters, seconds=seconds)
        return Artifact(workspace.store.ensure(spec, build, estimate), spec.fingerprint)

    def progress(self, description: str, total: float, unit: str) -> AbstractContextManager[Callable[[float], None]]:
        return track(description, total, unit)


def _is_model(name: str) -> bool:
    """Whether a name that is no role is that of a model: in the catalogue, on the hub or a path."""
    return bool(find_entry(name) or is_hub_id(name) or Path(name).expanduser().exists())


def _nameable(value: Any) -> Any:
    """Parameters that a plan can give a fingerprint to: scores that are not known yet are null instead of NaN."""
    if isinstance(value, Mapping):
        return {key: _nameable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_nameable(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
