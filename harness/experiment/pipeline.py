"""The stages of an experiment: the parts that every stage works with, and each stage applied to them.

Everything goes through the store, so that nothing is made twice. With a dry workspace the same functions only plan.
"""

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from baselines.method import Artifact, Candidate, Ensemble
from fusion.errors import UserError
from fusion.losses.loss import Balance, Loss, LossRequirements, LossResources
from fusion.vocabulary.token_bytes import Vocabulary, same_ids
from fusion.vocabulary.tokenization import encode_alike, prefix_id
from harness.config.schema import Config
from harness.data.passages import Passages
from harness.data.predictions import PredictionsReader
from harness.data.shards import position_bytes
from harness.data.tokens import Tokens
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.joint_model import make_joint_model
from harness.evaluation.perplexity import HeldOutText, Perplexity, measure_documents
from harness.evaluation.suite import SUITES, Suite, SuiteResult
from harness.experiment.corpora import Corpora
from harness.experiment.model_pool import ModelPool
from harness.models.checkpoints import load_config, load_tokenizer
from harness.models.resolution import ResolvedModel
from harness.runtime import distributed
from harness.runtime.environment import ignore_overrides
from harness.stages.extraction import extraction_spec, make_extraction
from harness.stages.loss_resources import TARGET, LossInputs, check_stored, load_resources, open_predictions
from harness.stages.training import HeldOutCurve, Training, make_training, model_card
from harness.stages.vocabulary_maps import make_map, map_spec
from harness.store.artifacts import Spec
from harness.store.costs import BYTES_PER_TOKEN
from harness.store.paths import MODEL_FOLDER
from harness.store.workspace import Workspace, open_workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Experiment:
    """The parts of one experiment in one workspace."""

    config: Config
    workspace: Workspace
    models: ModelPool
    corpora: Corpora
    suites: Mapping[str, Suite]
    """By name; their data are prepared once for all candidates."""


def open_experiment(
    config: Config, root: Path, *, dry: bool = False, flops: float | None = None, one_gpu: bool = False
) -> Experiment:
    """The parts of an experiment below `root`. Makes nothing: models and texts are looked at when they are needed.

    `dry` is for a plan; `flops` are the operations a second that it estimates with (default: measured when needed).
    With `one_gpu` a process without a launcher takes the first of several GPUs.
    """
    info = {"configuration": config.model_dump(mode="json")}
    workspace = open_workspace(root, config.device, dry=dry, info=info, flops=flops, one_gpu=one_gpu)
    suites = {name: SUITES.get(name)(given, config.data.folder) for name, given in config.suites.items()}
    corpora = Corpora(workspace.store, config, suites)
    return Experiment(config, workspace, ModelPool(workspace, config, corpora), corpora, suites)


def start(experiment: Experiment) -> None:
    """Connects the ranks and sets what a process computes with: for the entry of every command that computes."""
    if not experiment.workspace.store.dry:
        distributed.initialize(experiment.workspace.device)
        ignore_overrides()
    if experiment.config.threads is not None:
        import torch

        torch.set_num_threads(experiment.config.threads)


def predictions_spec(experiment: Experiment, role: str) -> Spec:
    """What the predictions that a role's model makes about the training corpus are made of."""
    models = experiment.models
    return extraction_spec(
        models.model(role),
        experiment.corpora.passages[0],
        experiment.config.extraction,
        dtype=models.dtype(role),
        batch_tokens=models.role(role).batch_tokens,
    )


def tokenise(experiment: Experiment, role: str) -> Path:
    """The artifact of the training corpus' passages as tokens of a role's model."""
    corpora = experiment.corpora
    return experiment.models.tokens(role, corpora.passages, corpora.n_bytes)


def predict(experiment: Experiment, role: str) -> tuple[Spec, Path]:
    """The artifact of the predictions that a role's model makes about the training corpus."""
    models, corpora, settings = experiment.models, experiment.corpora, experiment.config.extraction
    model, size, workspace = models.model(role), models.size(role), experiment.workspace
    spec, folder = predictions_spec(experiment, role), corpora.passages[1]
    entries = position_bytes(settings.k, size.vocabulary, settings.store_dtype, len(settings.temperatures))
    per_token = entries + np.dtype(settings.store_dtype).itemsize * (BYTES_PER_TOKEN - 1)  # the first bytes of tokens
    estimate = workspace.costs.forward(size.parameters, corpora.n_bytes, disk_per_token=per_token)
    path = make_extraction(
        workspace.store,
        spec,
        model,
        folder,
        tokenise(experiment, role),
        settings,
        device=workspace.device,
        estimate=estimate,
    )
    return spec, path


def read_predictions(experiment: Experiment, role: str, temperature: float = 1.0) -> PredictionsReader:
    """The predictions of a role's model, passage by passage; made where they are not there."""
    passages, tokens = Passages(experiment.corpora.passages[1]), Tokens(tokenise(experiment, role))
    folder, (tokenizer, vocabulary) = predict(experiment, role)[1], experiment.models.tokenizer(role)
    return PredictionsReader(folder, passages, tokens, tokenizer, vocabulary, temperature)


def vocabulary_map(
    experiment: Experiment, source: str, kind: str, on: Literal["bytes", "strings"]
) -> tuple[Spec, Path]:
    """The artifact of the map of a source's vocabulary onto the target's."""
    models = experiment.models
    label = f"{source}-to-{models.model(TARGET).name}"
    spec = map_spec(label, models.vocabulary_key(source), models.vocabulary_key(TARGET), kind, on)
    path = make_map(
        experiment.workspace.store,
        spec,
        lambda: models.tokenizer(source)[1],
        lambda: models.tokenizer(TARGET),
        vocabulary_size=models.size(source).vocabulary,
    )
    return spec, path


def loss_inputs(experiment: Experiment, label: str, requirements: LossRequirements) -> LossInputs:
    """What the loss of the row `label` is computed from, made where it is not there.

    Raises UserError for predictions that are not stored, and for a teacher in memory with another tokenizer or prefix.
    """
    models = experiment.models
    check_stored(label, requirements, experiment.config.extraction)
    for name in requirements.models:
        # In a plan a model may not be here yet.
        here = models.model(name).folder.exists() and models.model(TARGET).folder.exists()
        if here and not same_ids(models.tokenizer(name)[1], models.tokenizer(TARGET)[1]):
            raise UserError(
                f"{label} has {name} read the target's tokens, but its tokenizer is another: choose a teacher with "
                "the target's tokenizer, or set online to false."
            )
        # It would read every passage after a token that it was not trained with.
        if here and len({prefix_id(models.tokenizer(one)[0], models.role(one).prefix) for one in (name, TARGET)}) > 1:
            raise UserError(
                f"{label} has {name} read the target's tokens after the target's prefix, but its own prefix is "
                "another: give both roles the same, or set online to false."
            )
    return LossInputs(
        {name: predict(experiment, name) for name in requirements.predictions},
        {name: tokenise(experiment, name) for name in requirements.predictions},
        {name: vocabulary_map(experiment, name, requirements.map, requirements.map_on) for name in requirements.maps},
        {name: (models.model(name), models.dtype(name)) for name in requirements.models},
    )


def loss_resources(
    experiment: Experiment, label: str, requirements: LossRequirements
) -> tuple[LossResources, dict[str, PredictionsReader]]:
    """What a loss is bound to (vocabularies and maps), and the predictions that its features are computed from."""
    inputs, tokenizer_of = loss_inputs(experiment, label, requirements), experiment.models.tokenizer
    passages = Passages(experiment.corpora.passages[1])
    readers = open_predictions(requirements, inputs, passages, tokenizer_of)
    return load_resources(requirements, inputs, tokenizer_of), readers


def train(
    experiment: Experiment,
    label: str,
    seed: int,
    *,
    lam: float,
    loss: Loss | None = None,
    start: Candidate | None = None,
    own: Mapping[str, Any] = {},
    balance: Balance = "none",
    share: float = 1.0,
) -> Candidate:
    """The target trained with lam * CLM + (1 - lam) * loss on the training corpus, as the row `label`.

    The training starts from the candidate `start` (default: from the target), with the settings `own` in place of the
    experiment's and the terms in `balance`, on a `share` of the passages; on less than all it may
    diverge, and leaves no curve. Raises UserError where `start` has another tokenizer than the target, and where the
    loss cannot be computed.
    """
    config, models, corpora = experiment.config, experiment.models, experiment.corpora
    settings = config.training.with_own(own)
    if lam == 1:
        loss = None  # it would have no weight, and plain continued training may be there already
    requirements = LossRequirements() if loss is None else loss.requirements(TARGET)
    training = Training(
        label,
        seed,
        models.model(TARGET) if start is None else _checkpoint(experiment, label, start),
        corpora.passages,
        tokenise(experiment, TARGET),
        settings,
        _curve(experiment) if share == 1 else HeldOutCurve(config.curve.points, {}, 0.0, None),
        lam,
        loss,
        LossInputs() if loss is None else loss_inputs(experiment, label, requirements),
        "none" if loss is None else balance,
        _validation(experiment) if settings.select == "best" else None,
        share,
    )
    (spec, path), curve = make_training(
        experiment.workspace,
        training,
        models.tokenizer,
        card=partial(model_card, label, config=config, base=models.base(TARGET)),
        parameters=models.size(TARGET).parameters,
        teacher_parameters={name: models.size(name).parameters for name in requirements.models},
        corpus_bytes=corpora.n_bytes,
    )
    return Candidate(
        path / MODEL_FOLDER,
        spec.fingerprint,
        seeded=True,
        training=path,
        curve=None if curve is None else Artifact(curve[1], curve[0].fingerprint),
        shape=models.shape(TARGET),
    )


def _checkpoint(experiment: Experiment, label: str, candidate: Candidate) -> ResolvedModel:
    """A candidate as a training starts from it. Raises UserError where its tokenizer is not the target's."""
    models = experiment.models
    spec = models.spec(TARGET, str(candidate.folder))
    model = ResolvedModel(candidate.folder, candidate.folder.name, candidate.fingerprint, spec)
    if candidate.folder.exists():  # else in a plan
        tokenizer = load_tokenizer(model)
        vocabulary = Vocabulary.from_tokenizer(tokenizer, load_config(model).vocab_size)
        target_tokenizer, target_vocabulary = models.tokenizer(TARGET)
        if not (same_ids(vocabulary, target_vocabulary) and encode_alike(tokenizer, target_tokenizer)):
            raise UserError(
                f"{label} starts from a candidate with another tokenizer than the target's: start from one that has "
                "the target's tokenizer."
            )
    return model


def _curve(experiment: Experiment) -> HeldOutCurve:
    """The held-out text that is measured during every training of the experiment."""
    perplexity, text = experiment.corpora.perplexity, experiment.corpora.curve
    if perplexity is None or not text.documents:
        return HeldOutCurve(experiment.config.curve.points, {}, text.n_bytes, None)
    return _measured_along(experiment, perplexity, text)


def _validation(experiment: Experiment) -> HeldOutCurve:
    """The validation text, by which the checkpoint of a training is chosen. Raises UserError where there is none."""
    validation = experiment.corpora.validation
    return _measured_along(experiment, validation, validation.text(dry=experiment.workspace.store.dry))


def _measured_along(experiment: Experiment, perplexity: Perplexity, text: HeldOutText) -> HeldOutCurve:
    """A text that is measured during a training in the way of `perplexity`."""
    target, config, device = experiment.models.role(TARGET), perplexity.config, experiment.workspace.device

    def measure(model: "PreTrainedModel", tokenizer: Any) -> list[dict[str, Any]]:
        import torch

        # As the finished checkpoint is measured, whatever the precision of training; ZeRO's weights stay in bfloat16.
        with torch.autocast(torch.device(device).type, enabled=False) if config.dtype == "float32" else nullcontext():
            return measure_documents(
                model, tokenizer, text.documents, config, batch_tokens=target.batch_tokens, prefix=target.prefix
            )

    return HeldOutCurve(experiment.config.curve.points, perplexity.key(text), text.n_bytes, measure)


def evaluated_model(experiment: Experiment, label: str, candidate: Candidate | Ensemble) -> EvaluatedModel:
    """The candidate as suites see it, run with the settings of its role and loaded when it is first needed."""
    if isinstance(candidate, Ensemble):
        members = [
            (evaluated_model(experiment, member.name, member.candidate), member.weight) for member in candidate.members
        ]
        return make_joint_model(label, candidate, members)
    models, workspace, role = experiment.models, experiment.workspace, candidate.role
    return EvaluatedModel(
        label=label,
        fingerprint=candidate.fingerprint,
        spec=models.spec(role, str(candidate.folder)),
        dtype=models.dtype(role),
        device=workspace.device,
        batch_tokens=models.role(role).batch_tokens,
        parameters=models.size(role).parameters,
        models_dir=workspace.models,
    )


def measure(experiment: Experiment, evaluated: EvaluatedModel) -> dict[str, SuiteResult]:
    """What every suite of the experiment measures of a candidate, by suite; what is there is not measured again."""
    workspace = experiment.workspace
    return {
        name: suite.measure(evaluated, workspace.store, workspace.costs) for name, suite in experiment.suites.items()
    }


def share(experiment: Experiment, evaluated: EvaluatedModel) -> None:
    """Makes parts of what suites measure of a candidate that no other rank makes, and waits for none.

    What cannot be measured is left to `measure` on the main process, which says why.
    """
    workspace = experiment.workspace
    for suite in experiment.suites.values():
        if getattr(suite, "in_parts", False):
            with suppress(UserError):
                suite.measure(evaluated, workspace.store.sharing(), workspace.costs)
