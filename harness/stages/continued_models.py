"""The stage of continued models: one model, trained on text of its own by causal language modelling."""

from pathlib import Path
from typing import Any

from fusion.vocabulary.token_bytes import Vocabulary
from harness.config.schema import TrainingConfig
from harness.data.passages import Passages
from harness.data.tokens import Tokens
from harness.models.checkpoints import load_config, load_tokenizer
from harness.models.resolution import ResolvedModel
from harness.stages import training
from harness.stages.training import load_initial, settings_identity, train_on_passages
from harness.store.artifacts import Spec
from harness.store.costs import BYTES_PER_TOKEN
from harness.store.workspace import Workspace

VERSION = 1
SEED = 0
"""Of every continued model, whatever the seeds of the experiment are: they all start from the same models."""


def continued_model_spec(
    name: str, base: ResolvedModel, passages: Spec, settings: TrainingConfig, *, device: str
) -> Spec:
    """The key of `base` continued on the passages, called `name`."""
    identity = {**settings_identity(settings, device), **base.spec.prefix_identity()}
    params = {"seed": SEED, **identity, **base.spec.computing(identity["dtype"]), "trainer": training.VERSION}
    return Spec("continued_model", name, VERSION, {"model": base.fingerprint, "passages": passages.fingerprint}, params)


def make_continued_model(
    workspace: Workspace,
    spec: Spec,
    base: ResolvedModel,
    passages_folder: Path,
    tokens_folder: Path,
    settings: TrainingConfig,
    *,
    parameters: float,
    corpus_bytes: float,
) -> Path:
    """`base` continued on the passages, as an artifact that holds `model`.

    `tokens_folder` holds the passages' tokens. `parameters` of the model and `corpus_bytes` of the text are for the
    estimate. Called by all ranks.
    """
    device = workspace.device

    def build(folder: Path) -> dict[str, Any]:
        tokenizer = load_tokenizer(base)
        return train_on_passages(
            folder,
            Passages(passages_folder),
            Tokens(tokens_folder),
            tokenizer,
            Vocabulary.from_tokenizer(tokenizer, load_config(base).vocab_size),
            settings,
            load=lambda: load_initial(base, settings, device),
            seed=SEED,
            prefix=base.spec.prefix,
            device=device,
            label=spec.label,
            card=f"# {spec.label}\n\n`{base.name}` continued by `fusellm-harness`; artifact `{spec.fingerprint}`.\n",
        )

    estimate = workspace.costs.training(parameters, corpus_bytes / BYTES_PER_TOKEN * settings.epochs)
    return workspace.store.ensure(spec, build, estimate, on_all_ranks=True)
