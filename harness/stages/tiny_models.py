"""Making a tiny model: its text, its tokenizer and its weights, with the trainer that trains everything else."""

import sys
from dataclasses import asdict
from pathlib import Path

from fusion.errors import UserError
from harness.config.loading import TrainingConfig
from harness.data.corpus import Document
from harness.data.passages import Passages, write_passages
from harness.models.tiny.recipe import build_model, make_tokenizer, tiny_recipe, training_documents
from harness.runtime import distributed
from harness.store.artifacts import Estimate, Spec, Store

VERSION = 1


def make_tiny(store: Store, name: str, profile: str, device: str) -> tuple[Spec, Path]:
    """The tiny model `name` of a profile's recipe, as an artifact that holds `model`."""
    recipe = tiny_recipe(profile)
    model = recipe.model(name)
    # The text is the running Python's own, so its release stands for it.
    python = ".".join(str(part) for part in sys.version_info[:3])
    corpus = {"max_bytes": recipe.corpus.max_bytes, "max_document_bytes": recipe.corpus.max_document_bytes}
    made = {key: value for key, value in asdict(model).items() if value is not None}
    spec = Spec("tiny", name, VERSION, {"python": python}, {**made, "corpus": corpus})

    def build(folder: Path) -> None:
        if distributed.world_size() > 1:
            raise UserError(
                "Tiny models are made by one process: run the experiment once without torchrun or deepspeed."
            )
        from transformers import set_seed

        from fusion.vocabulary.token_bytes import Vocabulary
        from harness.data.sequences import PackedSequences
        from harness.stages.trainer import train

        documents = recipe.corpus.documents()
        tokenizer = make_tokenizer(model, documents)
        texts = [Document(d.name, d.domain, d.text, "") for d in training_documents(model, documents)]
        passages = folder / "text"
        passages.mkdir(exist_ok=True)
        # A byte is a token at most, and each passage has a prefix.
        write_passages(passages, texts, model.sequence_length - 1)
        rows = PackedSequences(
            Passages(passages), tokenizer, Vocabulary.from_tokenizer(tokenizer, model.vocabulary), model.sequence_length
        )
        settings = TrainingConfig(
            sequence_length=model.sequence_length,
            global_batch_size=model.global_batch_size,
            micro_batch_size=model.global_batch_size,
            learning_rate=model.learning_rate,
            warmup_ratio=model.warmup_ratio,
            epochs=model.epochs,
            dtype="float32",
            save_every=100,
        )
        set_seed(model.seed)
        train(
            build_model(model, tokenizer),
            tokenizer,
            rows,
            settings,
            lam=1.0,
            seed=model.seed,
            device=device,
            folder=folder,
            label=name,
            card=f"# {name}\n\nA model of a few hundred thousand parameters made on the spot: plumbing.\n",
        )

    tokens = model.train_bytes / 3 * model.epochs
    return spec, store.ensure(spec, build, Estimate(disk=1e7, memory=1e9, seconds=tokens / 10_000))
