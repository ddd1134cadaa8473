"""Models that a run makes for its roles: one model, continued on text of its own."""

from pathlib import Path
from typing import Any

from harness.config.loading import TrainingConfig
from harness.data.passages import Passages
from harness.models.checkpoints import ResolvedModel, compute_dtype, load_config, load_model, load_tokenizer
from harness.stages.sharding import zero_config
from harness.store.artifacts import Estimate, Spec, Store

VERSION = 1
SEED = 0  # whatever the seeds of the experiment: its models are the same for all of them
NO_EFFECT = {"workers", "micro_batch_size", "save_every", "dtype"}
"""Settings of a training that do not change its result, and the precision, which is made definite."""


def continued_model_spec(
    name: str, base: ResolvedModel, passages: Spec, settings: TrainingConfig, *, device: str, version: int
) -> Spec:
    """What makes the continued model; `version` is the trainer's."""
    zero = zero_config(settings.deepspeed) if settings.deepspeed else None
    params: dict[str, Any] = {
        "seed": SEED,
        "dtype": compute_dtype(settings.dtype, device),
        **settings.model_dump(mode="json", exclude=NO_EFFECT),
        "deepspeed": zero,
        "trainer": version,
    }
    return Spec("continued_model", name, VERSION, {"model": base.fingerprint, "passages": passages.fingerprint}, params)


def make_continued_model(
    store: Store,
    spec: Spec,
    base: ResolvedModel,
    passages_folder: Path,
    settings: TrainingConfig,
    *,
    device: str,
    estimate: Estimate,
) -> Path:
    """`base` continued on the passages by plain language modelling, as an artifact that holds `model`.

    Called by all ranks.
    """
    zero = zero_config(settings.deepspeed) if settings.deepspeed else None

    def build(folder: Path) -> None:
        from transformers import set_seed

        from fusion.vocabulary.token_bytes import Vocabulary
        from harness.data.sequences import PackedSequences
        from harness.stages.trainer import train

        tokenizer = load_tokenizer(base)
        vocabulary = Vocabulary.from_tokenizer(tokenizer, load_config(base).vocab_size)
        set_seed(SEED)
        train(
            load_model(base, "float32", "cpu" if zero and zero["zero_optimization"]["stage"] == 3 else device),
            tokenizer,
            PackedSequences(Passages(passages_folder), tokenizer, vocabulary, settings.sequence_length),
            settings,
            lam=1.0,
            seed=SEED,
            device=device,
            folder=folder,
            label=spec.label,
            card=f"# {spec.label}\n\n`{base.name}` continued by `fusellm-harness`; artifact `{spec.fingerprint}`.\n",
        )

    return store.ensure(spec, build, estimate, on_all_ranks=True)
