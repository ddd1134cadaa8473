"""Tokenizers of several families, trained on the spot, which split the same text differently.

The same texts give the same tokenizer: the alphabet is fixed before training (the trainer's own choice among equally
rare characters is random), and merges of equal count are ordered by token id.
"""

import json
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from fusion.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TokenizerKind = Literal["gpt2", "qwen2", "gpt_neox", "gemma", "llama", "open_llama"]

# Qwen2's: digits one by one, runs of line ends, punctuation with the line end after it.
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE_RUNS = range(24, 1, -1)  # GPT-NeoX's: the lengths of runs of spaces that are tokens, in order of their ids
# SentencePiece has no rule for words but its training keeps letters, digits, line ends and the rest apart.
_SENTENCEPIECE_WORDS = r"\n+|\d|▁?\p{L}+|▁?[^\p{L}▁\n\d]+|▁+"
_SPACE = "▁"


def build_tokenizer(kind: TokenizerKind, texts: Sequence[str], size: int) -> "PreTrainedTokenizerFast":
    """A tokenizer of `size` ids, including the control tokens, trained on `texts`.

    `gpt2`        byte-level BPE with `<|bos|>`, `<|eos|>` and `<|pad|>`
    `qwen2`       byte-level BPE of NFC-normalised text, digits one by one, with `<|endoftext|>` at its end and no bos
    `gpt_neox`    byte-level BPE of NFC-normalised text with `<|endoftext|>` for bos and eos; runs of spaces are tokens
    `gemma`       BPE over characters with "▁" for a space, `<0xNN>` for the bytes of rare characters, digits one by
                  one, and a bos that the tokenizer puts before the text itself
    `llama`       the same with a space before the text (the dummy prefix), which decoding takes away, and no pad
    `open_llama`  the same as `llama`, but several spaces are read as one, so that it does not spell every text

    Raises UserError where the texts are too few for so many ids.
    """
    make = _byte_level if kind in ("gpt2", "qwen2", "gpt_neox") else _sentencepiece
    tokenizer, roles = make(kind, texts, size)
    if tokenizer.get_vocab_size() != size:
        raise UserError(
            f"a vocabulary of {size} tokens cannot be made from so little text (it gave {tokenizer.get_vocab_size()}): "
            f"make the vocabulary smaller or the corpus larger"
        )
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="right", **roles
    )


def _byte_level(kind: TokenizerKind, texts: Sequence[str], size: int) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    added = []
    if kind == "gpt2":
        roles = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif kind == "gpt_neox":
        roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>") | {"pad_token": "<|padding|>"}
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        added = [AddedToken(" " * n, special=False, normalized=True) for n in _SPACE_RUNS]
    else:
        # Exactly Qwen2's: beside a model of that type, transformers puts the vocabulary and merges of any tokenizer
        # into its own Qwen2Tokenizer, whatever else tokenizer.json says.
        roles = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
        bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(added),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(dict.fromkeys(roles.values())),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(added)
    return tokenizer, roles


def _sentencepiece(kind: TokenizerKind, texts: Sequence[str], size: int) -> tuple[Any, dict[str, str]]:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    dummy_prefix = kind != "gemma"
    roles = (
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        if dummy_prefix
        else {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    )
    merged = [normalizers.Replace(Regex(" {2,}"), " ")] if kind == "open_llama" else []
    prefix = [normalizers.Prepend(_SPACE)] if dummy_prefix else []
    fixed = [*roles.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
    counts = Counter(character for text in texts for character in text.replace(" ", _SPACE))
    # A character that is rarer than this is spelled in bytes; what stays takes at most a third of the ids left.
    common = [character for character, count in counts.items() if count >= 10]
    alphabet = sorted(common, key=lambda character: (-counts[character], character))[: max(1, (size - len(fixed)) // 3)]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([*merged, *prefix, normalizers.Replace(" ", _SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SENTENCEPIECE_WORDS), behavior="isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(fixed),
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer knows no byte tokens, and as special tokens they would be found in the text "<0x41>".
    learned = json.loads(tokenizer.to_str())["model"]
    by_id = sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokenizer.model = models.BPE(
        vocab={token: i for i, token in enumerate([*fixed, *by_id])},
        merges=[tuple(merge) for merge in learned["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    strip = [decoders.Strip(" ", 1, 0)] if dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(list(roles.values()))
    bos = roles["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, fixed.index(bos))]
    )
    return tokenizer, roles
