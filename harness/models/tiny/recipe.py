"""The tiny models: a target that is trained on all domains, and two sources that are each trained on one side of them.

The three differ in architecture and tokenizer. The teacher is a larger model with the target's tokenizer, trained on
more of the same text. They show that every stage does its work on real text in minutes; they are no result.

Those of the profile `rehearsal` stand for the models of the profile `paper`: the same architectures, kinds of tokenizer
and context, so that what the paper's run would meet is met in minutes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fusion.errors import UserError
from harness.data.standard_library import CORPORA, LibraryDocument, StandardLibrary
from harness.models.tiny.tokenizers import TokenizerKind, build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

Architecture = Literal["llama", "qwen2", "gemma3_text", "mpt", "gpt_neox"]


@dataclass(frozen=True)
class TinyModel:
    """How one model is made, in sizes that suit two cores.

    `mix` is the fraction of each domain in its `train_bytes` (bytes of UTF-8) of text, which is read `epochs` times in
    sequences of `sequence_length` tokens, `global_batch_size` of them an optimiser step, with a cosine schedule from
    `learning_rate`.
    """

    name: str
    architecture: Architecture
    tokenizer: TokenizerKind
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    mix: Mapping[str, float]
    train_bytes: int
    context: int = 512
    epochs: int = 1
    sequence_length: int = 512
    global_batch_size: int = 1
    learning_rate: float = 5e-3
    warmup_ratio: float = 0.05
    seed: int = 0
    family: "TinyModel | None" = None
    """The model whose tokenizer it has. Default: a tokenizer of its own."""
    spare_ids: int | None = None
    """Ids that the model has beyond its tokenizer's, as models have whose vocabulary is rounded up. Default: none."""

    def shape(self) -> dict[str, Any]:
        """What config.json will say of the architecture, and whose tokenizer it is, before the model is made."""
        return {
            "model_type": self.architecture,
            "vocab_size": self.embedded,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "tokenizer": f"that of tiny:{(self.family or self).name}",
        }

    @property
    def embedded(self) -> int:
        """The size of the model's own vocabulary, which its tokenizer need not fill."""
        return self.vocabulary + (self.spare_ids or 0)

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layers, which of MPT is no setting."""
        return self.hidden * 4 if self.architecture == "mpt" else self.hidden * 5 // 2


@dataclass(frozen=True)
class TinyRecipe:
    """The models of a profile and the corpus that they are trained on."""

    name: str
    models: tuple[TinyModel, ...]
    corpus: StandardLibrary

    def model(self, name: str) -> TinyModel:
        """The model of that name. Raises UserError for a name that is not in the recipe."""
        for model in self.models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in self.models)
        raise UserError(f"the profile '{self.name}' has no tiny model '{name}': choose one of {known}")


_EVERYTHING = {"code": 0.4, "docstrings": 0.4, "manual": 0.2}
_CODE = {"code": 0.95, "docstrings": 0.05}
_PROSE = {"docstrings": 0.7, "manual": 0.3}

_TARGET = TinyModel("target", "llama", "gpt2", 1_280, 96, 2, 4, _EVERYTHING, train_bytes=300_000, seed=1)
_TINY = TinyRecipe(
    name="tiny",
    models=(
        _TARGET,
        TinyModel("coder", "qwen2", "qwen2", 1_024, 96, 2, 4, _CODE, train_bytes=600_000, seed=2),
        TinyModel("reader", "gemma3_text", "gemma", 1_536, 96, 2, 4, _PROSE, train_bytes=600_000, seed=3),
        replace(_TARGET, name="teacher", hidden=192, layers=3, train_bytes=600_000, seed=4, family=_TARGET),
    ),
    corpus=CORPORA["tiny"],
)


_AWKWARD_CODE = {"code": 0.6, "awkward": 0.4}
_AWKWARD_PROSE = {"docstrings": 0.4, "manual": 0.3, "awkward": 0.3}
_LLAMA = TinyModel(
    "llama", "llama", "llama", 2_000, 32, 2, 2, {"code": 0.3, "docstrings": 0.2, "manual": 0.2, "awkward": 0.3},
    train_bytes=150_000, context=2_048, global_batch_size=2, seed=11,
)  # fmt: skip
_REHEARSAL = TinyRecipe(
    name="rehearsal",
    models=(
        _LLAMA,
        replace(_LLAMA, name="open-llama", tokenizer="open_llama", vocabulary=1_800, mix=_AWKWARD_PROSE, seed=12),
        replace(_LLAMA, name="mpt", architecture="mpt", tokenizer="gpt_neox", mix=_AWKWARD_CODE, spare_ids=48, seed=13),
        replace(_LLAMA, name="llama-large", hidden=64, layers=3, seed=14, family=_LLAMA),
        replace(_LLAMA, name="pythia", architecture="gpt_neox", tokenizer="gpt_neox", spare_ids=48, seed=15),
    ),
    corpus=CORPORA["rehearsal"],
)


def _micro(model: TinyModel) -> TinyModel:
    """The same model in a size that is trained in a fraction of a second."""
    return replace(
        model,
        vocabulary={"gpt2": 320, "qwen2": 300, "gemma": 384}[model.tokenizer],
        hidden=model.hidden // 3,
        layers=2,
        heads=2,
        train_bytes=8_000,
        context=256,
        sequence_length=256,
        global_batch_size=2,
        learning_rate=1e-2,
        family=model.family and _micro(model.family),
    )


_MICRO = TinyRecipe(
    name="micro",
    models=tuple(_micro(model) for model in _TINY.models),
    corpus=CORPORA["micro"],
)


def tiny_recipe(name: str = "tiny") -> TinyRecipe:
    """The recipe of the profile `tiny` (minutes), `micro` (seconds, for tests) or `rehearsal` (the paper's kinds).

    Raises UserError on another name.
    """
    recipes = {recipe.name: recipe for recipe in (_TINY, _MICRO, _REHEARSAL)}
    if name not in recipes:
        raise UserError(f"there are no tiny models for the profile '{name}': choose one of {', '.join(recipes)}")
    return recipes[name]


def training_documents(model: TinyModel, documents: Sequence[LibraryDocument]) -> list[LibraryDocument]:
    """The training documents that the model reads, in the order in which it reads them.

    Each domain contributes its fraction of `train_bytes`, exceeded by less than a document, or all its text. The
    choice and the order follow from the names of the model and of the documents, so that every beginning has about the
    same mix.
    """

    def rank(document: LibraryDocument) -> bytes:
        return hashlib.sha256(f"{model.name}: {document.name}".encode()).digest()

    chosen: list[LibraryDocument] = []
    for domain, fraction in model.mix.items():
        left = fraction * model.train_bytes
        for document in sorted((d for d in documents if d.domain == domain and d.split == "train"), key=rank):
            if left <= 0:
                break
            chosen.append(document)
            left -= len(document.text.encode())
    return sorted(chosen, key=rank)


def make_tokenizer(model: TinyModel, documents: Sequence[LibraryDocument]) -> "PreTrainedTokenizerFast":
    """The model's tokenizer, trained on the text that the model (or the model of its family) is trained on.

    Raises UserError for too little text.
    """
    model = model.family or model
    return build_tokenizer(model.tokenizer, [d.text for d in training_documents(model, documents)], model.vocabulary)


def build_model(model: TinyModel, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedModel":
    """The untrained model in float32. Its weights follow from `model.seed`; torch's random state is not changed."""
    import torch
    from transformers import AutoModelForCausalLM

    config = _config(model, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _config(model: TinyModel, tokenizer: "PreTrainedTokenizerFast") -> "PreTrainedConfig":
    from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, MptConfig, Qwen2Config

    common = {
        # Wider than the usual 0.02, with which so small a model spends most of its few steps on leaving the start.
        "initializer_range": 0.1,
        "vocab_size": model.embedded,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": model.architecture != "gpt_neox",
        "use_cache": True,
    }
    if model.architecture == "mpt":
        return MptConfig(
            **common,
            d_model=model.hidden,
            n_layers=model.layers,
            n_heads=model.heads,
            max_seq_len=model.context,
            no_bias=True,
        )
    common |= {
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "max_position_embeddings": model.context,
    }
    if model.architecture == "gpt_neox":
        return GPTNeoXConfig(**common)
    if model.architecture == "llama":
        return LlamaConfig(**common)
    if model.architecture == "qwen2":
        return Qwen2Config(**common, num_key_value_heads=model.heads // 2)
    return Gemma3TextConfig(
        **common,
        num_key_value_heads=model.heads // 2,
        head_dim=model.hidden // model.heads,
        query_pre_attn_scalar=model.hidden // model.heads,
        sliding_window=model.context // 4,
    )
