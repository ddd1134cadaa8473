"""The stage of tiny models: text, tokenizer and weights made on the spot, with the trainer of everything else."""

import sys
from dataclasses import asdict
from pathlib import Path

from fusion.errors import UserError
from fusion.vocabulary.token_bytes import Vocabulary
from harness.config.schema import TrainingConfig
from harness.data.corpus import Document
from harness.data.passages import Passages, write_passages
from harness.data.tokens import Tokens, write_tokens
from harness.models.tiny.recipe import TinyModel, build_model, make_tokenizer, tiny_recipe, training_documents
from harness.runtime import distributed
from harness.stages import training
from harness.stages.training import train_on_passages
from harness.store.artifacts import Estimate, Spec
from harness.store.workspace import Workspace

VERSION = 1


def make_tiny(workspace: Workspace, name: str, profile: str) -> tuple[Spec, Path]:
    """The tiny model `name` of a profile's recipe, as an artifact that holds `model`.

    Called by all ranks. Raises UserError for a name that the recipe does not have, and for a number of ranks that does
    not divide the model's batch.
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
        ranks, batch = distributed.world_size(), model.global_batch_size
        if batch % ranks:
            raise UserError(
                f"tiny:{name} is trained on {batch} sequences a step, which {ranks} ranks cannot share: start another "
                "number of ranks, or run the experiment once without torchrun or deepspeed."
            )
        documents = recipe.corpus.documents()
        tokenizer = make_tokenizer(model, documents)
        texts = [Document(d.name, d.domain, d.text, "") for d in training_documents(model, documents)]
        text = folder / "text"
        if distributed.is_main_process():
            text.mkdir(exist_ok=True)
            # A byte is a token at most, and each passage has a prefix, before which a space may be put.
            write_passages(text, texts, model.sequence_length - 2)
            write_tokens(text, Passages(text), tokenizer)
        distributed.broadcast(0)  # the others wait for the passages
        train_on_passages(
            folder,
            Passages(text),
            Tokens(text),
            tokenizer,
            Vocabulary.from_tokenizer(tokenizer, model.embedded),
            _training(model, ranks),
            load=lambda: build_model(model, tokenizer),
            seed=model.seed,
            device=workspace.device,
            label=name,
            card=f"# {name}\n\nA model of a few hundred thousand parameters made on the spot: plumbing.\n",
        )

    tokens = model.train_bytes / 3 * model.epochs
    estimate = Estimate(disk=1e7, memory=1e9, seconds=tokens / 10_000)
    return spec, workspace.store.ensure(spec, build, estimate, on_all_ranks=True)


def _training(model: TinyModel, ranks: int) -> TrainingConfig:
    """How a tiny model is trained by so many ranks, by its recipe."""
    return TrainingConfig(
        sequence_length=model.sequence_length,
        global_batch_size=model.global_batch_size,
        micro_batch_size=model.global_batch_size // ranks,
        learning_rate=model.learning_rate,
        warmup_ratio=model.warmup_ratio,
        epochs=model.epochs,
        dtype="float32",
        save_every=100,
    )
