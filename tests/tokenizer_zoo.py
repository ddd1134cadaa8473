"""A zoo of small tokenizers, one of every kind that a law of tokenizers must hold for (`ZOO`)."""

from collections.abc import Callable, Mapping
from functools import cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from fusion.vocabulary.token_bytes import Vocabulary
from tests.fusion.tokenizers_for_tests import (
    TEXTS,
    byte_level,
    metaspace_unigram,
    sentencepiece_bpe,
    word_piece,
)

CODE = [
    f"def f{n}(x):\n{' ' * n}return x[{n}] * 1984\n{' ' * 2 * n}if x:\n{' ' * 4 * n}pass\n" for n in range(1, 9)
] * 4


def _byte_level_bpe(
    *before: pre_tokenizers.PreTokenizer, normalizer: normalizers.Normalizer | None = None, size: int = 450
) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS + CODE, trainer)
    return backend


def _fast(backend: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(roles or {"eos_token": "<eos>"}))


@cache
def gpt_neox() -> PreTrainedTokenizerFast:
    """Runs of spaces twice: as entries of the vocabulary, and as added tokens, which hide them."""
    backend = _byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert backend.token_to_id("ĠĠĠĠ") is not None
    backend.add_tokens([AddedToken(" " * n, special=False, normalized=True) for n in range(8, 1, -1)])
    return _fast(backend)


@cache
def qwen() -> PreTrainedTokenizerFast:
    """NFC, digits one by one, line ends with what precedes them."""
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    pattern = Regex(words + r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    return _fast(
        _byte_level_bpe(
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            normalizer=normalizers.NFC(),
        )
    )


@cache
def bloom() -> PreTrainedTokenizerFast:
    return _fast(
        _byte_level_bpe(
            pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        )
    )


@cache
def falcon() -> PreTrainedTokenizerFast:
    return _fast(
        _byte_level_bpe(
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        )
    )


@cache
def digits() -> PreTrainedTokenizerFast:
    """SmolLM2's way: digits one by one."""
    return _fast(
        _byte_level_bpe(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False))
    )


@cache
def prefix_space() -> PreTrainedTokenizerFast:
    """RoBERTa's way: byte level with a space before the text."""
    return _fast(_byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)))


@cache
def added_tokens() -> PreTrainedTokenizerFast:
    """Added tokens that are text, one of which swallows the space before it, and control tokens of a chat."""
    backend = _byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    backend.add_tokens([AddedToken("return", special=False), AddedToken("<fill>", special=False, lstrip=True)])
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return _fast(backend)


@cache
def missing_bytes() -> PreTrainedTokenizerFast:
    """Byte level without tokens for all bytes: a character that is not there is dropped."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    kept = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {chr(256 + byte) for byte in (0x13, 0x14, 0x15)})
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=kept, show_progress=False),
    )
    return _fast(backend)


@cache
def clip() -> PreTrainedTokenizerFast:
    """CLIP's way: lower case, spaces collapsed, and a mark at the end of a word."""
    backend = Tokenizer(models.BPE(unk_token="<eos>", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("</w>", " ")])
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<eos>"],
            end_of_word_suffix="</w>",
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return _fast(backend)


@cache
def lower_case() -> PreTrainedTokenizerFast:
    """Byte level after lower-casing: every capital letter is another byte."""
    return _fast(_byte_level_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase()))


@cache
def unk_swallows() -> PreTrainedTokenizerFast:
    """Unigram without byte fallback: one unknown token for whatever it has no pieces for."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Replace("▁", " ")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<bos>", "<eos>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator([TEXTS[0], TEXTS[3]], trainer)
    return _fast(backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@cache
def llama_without_strip() -> PreTrainedTokenizerFast:
    """Llama 2's tokenizer with a decoder that gives its dummy prefix back."""
    backend = Tokenizer.from_str(sentencepiece_bpe(True).backend_tokenizer.to_str())
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _fast(backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@cache
def bos_always() -> PreTrainedTokenizerFast:
    """Gemma's: bos before every text that is encoded with special tokens."""
    backend = Tokenizer.from_str(sentencepiece_bpe(False).backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", backend.token_to_id("<bos>"))]
    )
    return _fast(backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


ZOO: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "gpt2": byte_level,
    "gpt_neox": gpt_neox,
    "qwen": qwen,
    "bloom": bloom,
    "falcon": falcon,
    "digits": digits,
    "prefix_space": prefix_space,
    "added_tokens": added_tokens,
    "missing_bytes": missing_bytes,
    "lower_case": lower_case,
    "clip": clip,
    "word_piece": word_piece,
    "gemma": bos_always,
    "llama": lambda: sentencepiece_bpe(True),
    "llama_without_strip": llama_without_strip,
    "t5": metaspace_unigram,
    "unk_swallows": unk_swallows,
    "ids_beyond": byte_level,
}
LOSSY = ("missing_bytes", "lower_case", "clip", "word_piece", "unk_swallows", "added_tokens", "qwen")
"""Those that cannot write every text: they drop, change or swallow some of it."""


@cache
def vocabulary(name: str) -> Vocabulary:
    """The vocabulary of a tokenizer of the zoo; of `ids_beyond`, for a model without rows for its last ids."""
    tokenizer = ZOO[name]()
    return Vocabulary.from_tokenizer(tokenizer, len(tokenizer) - 20 if name == "ids_beyond" else None)
