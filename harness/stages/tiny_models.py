"""The stage of tiny models: text, tokenizer and weights made on the spot, with the trainer of everything else."""

import sys
from dataclasses import asdict
from pathlib import Path

from fusion.errors import UserError
from fusion.vocabulary.token_bytes import Vocabulary
from harness.config.schema import TrainingConfig
from harness.data.corpus import Document
from harness.data.passages import Passages, write_passages
from harness.models.tiny.recipe import TinyModel, build_model, make_tokenizer, tiny_recipe, training_documents
from harness.runtime import distributed
from harness.stages import training
from harness.stages.training import train_on_passages
from harness.store.artifacts import Estimate, Spec
from harness.store.workspace import Workspace

VERSION = 1


def make_tiny(workspace: Workspace, name: str, profile: str) -> tuple[Spec, Path]:
    """The tiny model `name` of a profile's recipe, as an artifact that holds `model`.

    Raises UserError for a name that the recipe does not have, and under several ranks.
    """
    recipe = tiny_recipe(profile)
    model = recipe.model(name)
    # The text is the running Python's own, so its release stands for it.
    python = ".".join(str(part) for part in sys.version_info[:3])
    corpus = {"max_bytes": recipe.corpus.max_bytes, "max_document_bytes": recipe.corpus.max_document_bytes}
    settings = {key: value for key, value in asdict(model).items() if value is not None}
    params = {**settings, "corpus": corpus, "trainer": training.VERSION}
    spec = Spec("tiny", name, VERSION, {"python": python}, params)

    def build(folder: Path) -> None:
        if distributed.world_size() > 1:
            raise UserError(
                "Tiny models are made by one process: run the experiment once without torchrun or deepspeed."
            )
        documents = recipe.corpus.documents()
        tokenizer = make_tokenizer(model, documents)
        texts = [Document(d.name, d.domain, d.text, "") for d in training_documents(model, documents)]
        passages = folder / "text"
        passages.mkdir(exist_ok=True)
        # A byte is a token at most, and each passage has a prefix.
        write_passages(passages, texts, model.sequence_length - 1)
        train_on_passages(
            folder,
            Passages(passages),
            tokenizer,
            Vocabulary.from_tokenizer(tokenizer, model.vocabulary),
            _training(model),
            load=lambda: build_model(model, tokenizer),
            seed=model.seed,
            device=workspace.device,
            label=name,
            card=f"# {name}\n\nA model of a few hundred thousand parameters made on the spot: plumbing.\n",
        )

    tokens = model.train_bytes / 3 * model.epochs
    estimate = Estimate(disk=1e7, memory=1e9, seconds=tokens / 10_000)
    return spec, workspace.store.ensure(spec, build, estimate)


def _training(model: TinyModel) -> TrainingConfig:
    """How a tiny model is trained, by its recipe."""
    return TrainingConfig(
        sequence_length=model.sequence_length,
        global_batch_size=model.global_batch_size,
        micro_batch_size=model.global_batch_size,
        learning_rate=model.learning_rate,
        warmup_ratio=model.warmup_ratio,
        epochs=model.epochs,
        dtype="float32",
        save_every=100,
    )
