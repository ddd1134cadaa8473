"""What is refused before anything is paid for: a mistake that shows after a week of training costs the week."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from baselines.ensemble import EnsembleParameters
from fusion.errors import UserError
from fusion.vocabulary.tokenization import prefix_id
from harness.config.validation import method_parameters
from harness.data.passages import Passages
from harness.data.tokens import Tokens
from harness.experiment.pipeline import TARGET, Experiment, tokenise
from harness.models.checkpoints import load_tokenizer
from harness.runtime import distributed
from harness.runtime.progress import notify
from harness.stages.trainer.fsdp import check_launched
from harness.stages.trainer.sharding import check_usable
from harness.store.artifacts import Planned

_MOST = 0.1  # of the text may be left out because it is too long; above, shorter passages are the better remedy


def check_inputs(experiment: Experiment) -> None:
    """Refuses models and text that are not here or not whole, held-out text that is trained on, and ranks that do not
    fit the training.
    """
    training = experiment.config.training
    if training.deepspeed:
        check_usable(training.deepspeed)
    if training.fsdp2:
        check_launched()
    for row, size in experiment.config.global_batch_sizes():
        section = "training" if row is None else f"methods.{row}.training"
        distributed.micro_batches(size, training.micro_batch_size, section)
    for name in experiment.models.names:
        if not experiment.models.is_tiny(name):
            experiment.models.base(name)
    check_sizes(experiment)
    check_memory(experiment)
    experiment.corpora.check_test_documents()


def check_validation(dry: Experiment, experiment: Experiment) -> None:
    """Refuses validation text that is trained or tested on, where a method has asked for it in the plan `dry`."""
    if "validation" in dry.corpora.requested:
        _ = experiment.corpora.validation


def check_sizes(experiment: Experiment) -> None:
    """Refuses a k above a vocabulary and contexts that suites cannot use, as far as the models are here."""
    config, k = experiment.config, experiment.config.extraction.k
    evaluated = {entry.get("role", TARGET) for entry in config.methods.values()}
    for name in experiment.models.names:
        vocabulary, context = experiment.models.limits(name)
        if vocabulary and k > vocabulary:
            raise UserError(f"extraction.k = {k} exceeds the vocabulary of {name}, {vocabulary}: lower it.")
        if context and name in evaluated:
            for suite in experiment.suites.values():
                suite.check_context(name, context)


def check_memory(experiment: Experiment) -> None:
    """Refuses rows whose model, or ensemble of models, does not fit the device in the precision of a suite."""
    models, methods = experiment.models, experiment.config.methods
    single = {entry.get("role", TARGET) for entry in methods.values() if entry["method"] != "ensemble"}
    together = [(name, [name]) for name in sorted(single)]
    for label, entry in methods.items():
        if entry["method"] == "ensemble":
            ensemble = method_parameters(label, entry, EnsembleParameters)
            if ensemble.combine != "vote":  # its members are asked one by one, never together
                members = ensemble.models or list(experiment.config.roles.sources)
                weights = ensemble.weights if isinstance(ensemble.weights, list) else [1.0] * len(members)
                names = [name for name, weight in zip(members, weights, strict=False) if weight > 0]
                # The model of a row that is trained is as large as the one that it starts from.
                together.append((label, [methods[n].get("role", TARGET) if n in methods else n for n in names]))
    for label, names in together:
        known = [name for name in names if name in models.names]
        sizes = [(models.size(name).parameters, models.dtype(name)) for name in known]
        for suite in experiment.suites.values():
            suite.check_memory(label, sizes, experiment.workspace.device)


def check_lengths(experiment: Experiment, planned: Sequence[Planned]) -> None:
    """Refuses text of which most exceeds a context or a sequence, and says how much of it will be skipped.

    Looks at the tokens that are planned, and makes them where they are not there.
    """
    passages, models = Passages(experiment.corpora.passages[1]), experiment.models
    keys = {stage.spec.fingerprint for stage in planned}
    for name in models.names:
        if models.is_tiny(name):  # not made yet, and its recipe fits its text
            continue
        prefix_id(load_tokenizer(models.base(name)), models.role(name).prefix)
        if models.tokens_spec(name, experiment.corpora.passages[0]).fingerprint not in keys:
            continue  # the model reads no passage
        lengths = 1 + Tokens(tokenise(experiment, name)).counts
        limits = {f"the context of {name}": models.limits(name)[1]}
        if name == TARGET:
            limits["training.sequence_length"] = experiment.config.training.sequence_length
        for what, limit in limits.items():
            if not limit or lengths.max() <= limit:
                continue
            share = passages.n_bytes[lengths > limit].sum() / passages.n_bytes.sum()
            sentence = (
                f"{passages.name(int(np.argmax(lengths)))} is {lengths.max()} tokens for {name} and exceeds "
                f"{what}, {limit}"
            )
            if share > _MOST:
                raise UserError(f"{sentence}, as {share:.0%} of the text does: lower passages.max_bytes.")
            notify(f"{sentence}. {share:.1%} of the text is too long and is skipped: lower passages.max_bytes.")


def check_space(planned: Sequence[Planned], root: Path) -> None:
    """Refuses what does not fit on the disk."""
    needed = sum(p.estimate.disk for p in planned if p.state != "ready")
    free = shutil.disk_usage(next(p for p in [root, *root.resolve().parents] if p.exists())).free
    if needed > free:
        raise UserError(
            f"The run needs about {needed / 1e6:,.1f} MB on the disk of {root}, and {free / 1e6:,.1f} MB are free: "
            "make room (see `fusellm artifact gc`) or choose another --root."
        )
