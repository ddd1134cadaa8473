"""Small random models with tokenizers of their own, made by the tests that need them."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "seven",
    "wizards",
    "brew",
    "potent",
    "ale",
    "and",
    "über-cool",
    "naïve",
    "猫",
    "sleeps",
]


def sentences(n: int, seed: int = 0) -> list[str]:
    """Lines of random words, the same for one seed."""
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[int(i)] for i in torch.randint(len(WORDS), (12,), generator=generator)) + ".\n" for _ in range(n)
    ]


def tokenizer(vocabulary: int, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose one control token is bos and eos."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    made.train_from_iterator(sentences(200), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>")


_SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def save_model(
    folder: Path, config: type[PreTrainedConfig], vocabulary: int, seed: int, spread: float = 1, **settings: Any
) -> Path:
    """A random model of two layers and its tokenizer; with a `spread` of weights above 1 it has opinions."""
    torch.manual_seed(seed)
    tokens = tokenizer(vocabulary)
    model = AutoModelForCausalLM.from_config(config(vocab_size=len(tokens), **{**_SMALL, **settings}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(spread)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


def save_corpus(folder: Path, n: int, seed: int) -> Path:
    """A folder of n text documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i:03d}.txt").write_text("".join(sentences(6, seed * 1000 + i)), encoding="utf-8")
    return folder
