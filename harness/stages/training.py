"""The train stage: a model continued on packed passages, as an artifact that holds a Hugging Face checkpoint.

The trained rows of an experiment, its continued models and the tiny models are all trained by `train_on_passages`.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.losses.loss import Balance, Loss, LossRequirements
from fusion.modeling.context import context_length
from fusion.vocabulary.token_bytes import Vocabulary
from harness.config.schema import Config, TrainingConfig
from harness.data.passages import Passages
from harness.data.predictions import PredictionsReader
from harness.data.tokens import Tokens
from harness.models.card import card_metadata
from harness.models.checkpoints import load_model, load_without_weights
from harness.models.resolution import ResolvedModel
from harness.runtime import distributed
from harness.runtime.device import compute_dtype
from harness.runtime.heartbeat import Heartbeat
from harness.runtime.progress import notify
from harness.stages.loss_resources import TARGET, LossInputs, TokenizerOf, load_resources, open_predictions
from harness.stages.trainer.sharding import zero_stage
from harness.stages.training_log import CURVE_FILE, curve_files
from harness.store.artifacts import Estimate, Spec
from harness.store.costs import BYTES_PER_TOKEN
from harness.store.fingerprint import canonical, plain_json
from harness.store.workspace import Workspace

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from harness.data.sequences import Features
    from harness.stages.trainer.held_out import Curve

VERSION = 6
CURVE_VERSION = 1
NO_EFFECT = {
    "workers",
    "micro_batch_size",
    "save_every",
    "gradient_checkpointing",
    "timeout_minutes",
    "deepspeed",
    "fsdp2",
}
"""Settings that do not change the weights but for rounding: how the work is divided and where it is kept."""
VALIDATION = "validation"
"""The name of the curve of validation text, which is no artifact."""


def settings_identity(settings: TrainingConfig, device: str) -> dict[str, Any]:
    """The settings that change the weights of a training on `device`, its precision made definite.

    All but which checkpoint is taken, which depends on a text, too.
    """
    params = settings.model_dump(mode="json", exclude={*NO_EFFECT, "select"})
    return {**params, "dtype": compute_dtype(settings.dtype, device)}


def load_initial(model: ResolvedModel, settings: TrainingConfig, device: str) -> "PreTrainedModel":
    """The model in float32 as a training with these settings takes it, on all ranks.

    What ZeRO-3 and FSDP2 divide may be more than one GPU holds and is loaded on the CPU; FSDP2 deals it out from the
    main process, so that the others have its shapes only.
    """
    if settings.fsdp2 and not distributed.is_main_process():
        return load_without_weights(model)
    return load_model(model, "float32", "cpu" if settings.fsdp2 or zero_stage(settings.deepspeed) == 3 else device)


def train_on_passages(
    folder: Path,
    passages: Passages,
    tokens: Tokens,
    tokenizer: Any,
    vocabulary: Vocabulary,
    settings: TrainingConfig,
    *,
    load: Callable[[], "PreTrainedModel"],
    seed: int,
    device: str,
    label: str,
    card: str,
    lam: float = 1.0,
    loss: Loss | None = None,
    balance: Balance = "none",
    features: "Features | None" = None,
    predictions: Mapping[str, PredictionsReader] = {},
    prefix: str | None = None,
    load_teachers: Callable[[], "Mapping[str, PreTrainedModel]"] = dict,
    constants: Mapping[str, np.ndarray] = {},
    curve: "Curve | None" = None,
    validation: "Curve | None" = None,
    share: float = 1.0,
) -> dict[str, Any]:
    """Packs the passages into sequences and trains what `load` gives on them (see `harness.stages.trainer.loop.train`).

    `share` is the part of the passages that is trained on, drawn by the seed. The random state is set to `seed` before
    `load` is called, so that a model may be initialised there. Called by all ranks. Returns, for the manifest, the
    names of the passages that are skipped because they are too long, with a note for tables, and under `selected`
    which checkpoint was taken; nothing where none are, or there was no choice.
    """
    from transformers import set_seed

    from harness.data.sequences import PackedSequences, draw
    from harness.stages.trainer.loop import train

    set_seed(seed)
    model = load()
    sequences = PackedSequences(
        passages,
        tokens,
        tokenizer,
        vocabulary,
        settings.sequence_length,
        features,
        predictions,
        context=context_length(model.config),
        prefix=prefix,
        sample=draw(len(passages), share, seed),
    )
    note = sequences.skipped_sentence()
    if note is not None:
        notify(f"{label}: {note}")
    watch = Heartbeat(folder.with_suffix(".ranks"), what=label, patience=60 * settings.timeout_minutes)
    # DeepSpeed prints, and standard output is for tables.
    with redirect_stdout(sys.stderr), watch as heartbeat:
        selected = train(
            model,
            tokenizer,
            sequences,
            settings,
            lam=lam,
            loss=loss,
            balance=balance,
            teachers=load_teachers(),
            constants=constants,
            seed=seed,
            device=device,
            folder=folder,
            label=label,
            card=card,
            beat=heartbeat.beat,
            curve=curve,
            validation=validation,
        )
    skipped = {} if note is None else {"skipped": [passages.name(p) for p in sequences.skipped], "note": note}
    return skipped | ({"selected": selected} if selected else {})


@dataclass(frozen=True)
class HeldOutCurve:
    """Held-out text that is measured during a training.

    Of test documents it is an artifact of its own, so that it is no part of the training's key. Validation text by
    which the checkpoint is chosen is a part of it.
    """

    points: int
    identity: Mapping[str, Any]
    """What the measurements depend on: the documents and how they are measured."""
    n_bytes: float
    """Bytes of the documents, for the estimate of the time."""
    measure: "Callable[[PreTrainedModel, Any], list[dict[str, Any]]] | None"
    """One record a document, of a model and its tokenizer; None where there are no documents."""

    def spec(self, training: Spec) -> Spec:
        """The key of the curve of a training."""
        inputs = {"training": training.fingerprint}
        params = {"points": self.points, **self.identity}
        return Spec("curve", training.label, CURVE_VERSION, inputs, plain_json(params))

    def along(self, name: str, tokenizer: Any) -> "Curve | None":
        """It as the trainer measures it, under `name`; None where there are no documents."""
        from harness.stages.trainer.held_out import Curve

        measure = self.measure
        return None if measure is None else Curve(self.points, name, lambda model: measure(model, tokenizer))


@dataclass(frozen=True)
class Training:
    """One training of the target: everything that its weights and its curve come from."""

    label: str
    seed: int
    base: ResolvedModel
    """The model that it starts from: the target, or the candidate of another row."""
    passages: tuple[Spec, Path]
    tokens: Path
    """The passages' tokens for the target."""
    settings: TrainingConfig
    curve: HeldOutCurve
    lam: float = 1.0
    """The weight of the CLM term; the loss has the rest."""
    loss: Loss | None = None
    inputs: LossInputs = field(default_factory=LossInputs)
    """What the loss is computed from."""
    balance: Balance = "none"
    """Whether the loss is brought to the size of the CLM term in every micro batch."""
    validation: HeldOutCurve | None = None
    """The text that chooses the checkpoint; None where the last one is taken."""
    share: float = 1.0
    """The part of the passages that is trained on. A training on less than all is a pilot, which may diverge."""

    @property
    def requirements(self) -> LossRequirements:
        return LossRequirements() if self.loss is None else self.loss.requirements(TARGET)

    def spec(self, device: str) -> Spec:
        """The key of the training on `device`."""
        params: dict[str, Any] = {
            "lambda": self.lam,
            "seed": self.seed,
            **settings_identity(self.settings, device),
            **self.base.spec.computing(compute_dtype(self.settings.dtype, device)),
            **self.base.spec.prefix_identity(),
        }
        inputs: dict[str, Any] = {"model": self.base.fingerprint, "passages": self.passages[0].fingerprint}
        if self.loss is not None:
            params["loss"] = self.loss.identity()
            if self.balance != "none":
                # The ratio is that of a micro batch, whose sequences are the same on any number of ranks.
                params["balance"] = {"kind": self.balance, "micro_batch_size": self.settings.micro_batch_size}
            inputs |= self.inputs.fingerprints()
        if self.share < 1:
            params["share"] = self.share
        if self.validation is not None:
            params["select"] = {"points": self.validation.points, **self.validation.identity}
        # Neither is the number of ranks part of the key: like the size of a micro batch it only changes rounding.
        info = {"ranks": distributed.world_size(), "settings": self.settings.model_dump(mode="json")}
        return Spec("train", f"{self.label}-seed{self.seed}", VERSION, plain_json(inputs), plain_json(params), info)


def make_training(
    workspace: Workspace,
    training: Training,
    tokenizer_of: TokenizerOf,
    *,
    card: Callable[[Spec], str],
    parameters: float,
    teacher_parameters: Mapping[str, float],
    corpus_bytes: float,
) -> tuple[tuple[Spec, Path], tuple[Spec, Path] | None]:
    """The artifact of a training, with the checkpoint in `model` and the log, and that of its curve.

    The curve's is None where no text is held out for it, and does not exist where the training was finished before,
    under another curve: the checkpoints along the way are gone by then. A pilot that diverges has no `model`. `card`
    gives the text of the model card. The numbers of parameters and the bytes of the corpus are for the estimate. Called
    by all ranks. Raises UserError where the training cannot be done (see `harness.stages.trainer.loop.train`).
    """
    settings, curve, validation = training.settings, training.curve, training.validation
    device, store = workspace.device, workspace.store
    spec = training.spec(device)
    curve_spec = None if curve.measure is None else curve.spec(spec)
    trained_before = store.path(spec).exists()

    def build(folder: Path) -> dict[str, Any]:
        tokenizer, vocabulary = tokenizer_of(TARGET)
        passages, loss, requirements = Passages(training.passages[1]), training.loss, training.requirements
        features, constants = None, dict[str, np.ndarray]()
        if loss is not None:
            resources = load_resources(requirements, training.inputs, tokenizer_of)
            features, constants = partial(loss.features, resources=resources), loss.constants(resources)
        along = None if curve_spec is None else curve.along(curve_spec.fingerprint[:16], tokenizer)
        train = partial(
            train_on_passages,
            folder,
            passages,
            Tokens(training.tokens),
            tokenizer,
            vocabulary,
            settings,
            load=lambda: load_initial(training.base, settings, device),
            seed=training.seed,
            device=device,
            label=f"{training.label} (seed {training.seed})",
            card=card(spec),
            lam=training.lam,
            loss=loss,
            balance=training.balance,
            features=features,
            constants=constants,
            predictions=open_predictions(requirements, training.inputs, passages, tokenizer_of),
            prefix=training.base.spec.prefix,
            load_teachers=lambda: {
                name: load_model(model, dtype, device)  # type: ignore[arg-type]
                for name, (model, dtype) in training.inputs.teachers.items()
            },
            curve=along,
            validation=None if validation is None else validation.along(VALIDATION, tokenizer),
            share=training.share,
        )
        info = train() if training.share == 1 else _try(train, folder)
        if distributed.is_main_process():
            if along is not None and curve_spec is not None and along.file(folder).exists():
                store.ensure(curve_spec, partial(_keep_curve, along.file(folder)))
            for measured in curve_files(folder):
                measured.unlink()
        return info

    costs = workspace.costs
    corpus_bytes *= training.share
    whole = costs.training(parameters, corpus_bytes / BYTES_PER_TOKEN * settings.epochs)
    held_out = curve.n_bytes + (validation.n_bytes if validation else 0)
    measured = costs.forward(parameters, held_out * (curve.points + 1))
    teachers = [costs.forward(size, corpus_bytes * settings.epochs) for size in teacher_parameters.values()]
    estimate = Estimate(
        whole.disk,
        whole.memory + sum(teacher.memory for teacher in teachers),
        whole.seconds + measured.seconds + sum(teacher.seconds for teacher in teachers),
    )
    path = store.ensure(spec, build, estimate, on_all_ranks=True)
    if curve_spec is None:
        return (spec, path), None
    curve_path = store.path(curve_spec)
    if curve_path.exists() or (store.dry and not trained_before):
        store.ensure(curve_spec, _made_while_training)
    return (spec, path), (curve_spec, curve_path)


def _try(train: Callable[[], dict[str, Any]], folder: Path) -> dict[str, Any]:
    """What `train` returns; where it diverges, why, and nothing else is left of it."""
    from harness.stages.trainer.held_out import Diverged

    try:
        return train()
    except Diverged as error:
        if distributed.is_main_process():
            for left in [folder / "checkpoints", *folder.glob("best-*")]:
                shutil.rmtree(left, ignore_errors=True)
        return {"diverged": str(error)}


def _keep_curve(measured: Path, folder: Path) -> None:
    shutil.copyfile(measured, folder / CURVE_FILE)


def _made_while_training(folder: Path) -> None:
    raise AssertionError("a curve is measured while the model is trained")


def model_card(label: str, spec: Spec, config: Config, base: ResolvedModel) -> str:
    """The model card (README.md) of a row trained from `base`: metadata, what it was made from, the configuration."""
    import yaml

    configuration = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return (
        card_metadata(base, corpus=config.corpus.path, tags=["knowledge-fusion"])
        + f"\n# {label}\n\n`{config.roles.target.model}` trained by `fusellm-harness`, experiment "
        f"`{config.experiment}`, profile `{config.profile}`; artifact `{spec.fingerprint}`.\n"
        + (f"\n**{config.banner}**\n" if config.banner else "")
        + f"\n## Made from\n\n```json\n{canonical(spec.identity())}\n```\n"
        f"\n## Resolved configuration\n\n```yaml\n{configuration}```\n"
    )
