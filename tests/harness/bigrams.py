"""Models whose every probability is written down: what follows depends on the last token alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harness.config.loading import load
from harness.experiment.pipeline import Experiment, open_experiment

Table = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Bigrams:
    """Probabilities of the next token after each; what a row leaves is spread evenly, a row that lacks is even."""

    table: Table = field(default_factory=dict)
    tokens: Sequence[str] = ("<s>", "</s>", "a", "b", "c", "d", "ab", "cd")
    merges: Sequence[str] = ("ab", "cd")
    bos: str | None = "<s>"
    eos: str = "</s>"

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Joins the `merges` (two characters each) and nothing else."""
        backend = Tokenizer(
            models.BPE(vocab={t: i for i, t in enumerate(self.tokens)}, merges=[(m[0], m[1]) for m in self.merges])
        )
        control = {"bos_token": self.bos, "eos_token": self.eos}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **{r: t for r, t in control.items() if t is not None})

    def save(self, folder: Path) -> str:
        """A Llama without layers: one-hot embeddings, normed to length sqrt(V), and a projection that undoes that."""
        size = len(self.tokens)
        probability = torch.full((size, size), 1 / size, dtype=torch.float64)
        for token, row in self.table.items():
            left = (1 - sum(row.values())) / (size - len(row))
            probability[self.tokens.index(token)] = torch.tensor(
                [row.get(t, left) for t in self.tokens], dtype=torch.float64
            )
        config = LlamaConfig(
            vocab_size=size,
            hidden_size=size,
            intermediate_size=1,
            num_hidden_layers=0,
            num_attention_heads=1,
            head_dim=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-12,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.model.embed_tokens.weight.copy_(torch.eye(size))
            model.lm_head.weight.copy_(probability.clamp(min=1e-9).log().T / math.sqrt(size))
        model.save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)
        return str(folder)


# Spells what the target spells with tokens and ids of its own, and has three that the target lacks.
OTHER = ("<s>", "<end>", "cd", "d", "c", "b", "a", "ab", "bcd", "cc", "x")


def other(table: Table | None = None, merges: Sequence[str] = ("ab",)) -> Bigrams:
    return Bigrams(table or {}, OTHER, merges, eos="<end>")


def experiment(
    folder: Path,
    texts: Sequence[str],
    sources: Mapping[str, Bigrams],
    *settings: str,
    target: Bigrams | None = None,
) -> Experiment:
    """FuseLLM on a document each of `texts`, all in one row; `settings` as they come after --set."""
    target = target or Bigrams()
    for number, text in enumerate(texts):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{number}.txt").write_text(text)
    (folder / "held-out.txt").write_text("abc")

    def role(model: Bigrams, name: str) -> dict[str, Any]:
        return {"model": model.save(folder / name), "dtype": "float32"}

    raw = {
        "title": "bigrams",
        "reference": "X",
        "roles": {
            "target": role(target, "target"),
            "sources": {name: role(model, f"source-{name}") for name, model in sources.items()},
        },
        "methods": {"X": {"method": "fusellm"}},
        "corpus": {"path": str(folder / "text")},
        "training": {"sequence_length": 64, "global_batch_size": 1, "dtype": "float32"},
        "extraction": {"k": 2},
        "suites": {"perplexity": {"documents": {"path": str(folder / "held-out.txt"), "split": "test"}, "window": 64}},
        "curve": {"per_domain": 0},
    }
    path = folder / "bigrams.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return open_experiment(load(str(path), overrides=settings), folder / "root")
