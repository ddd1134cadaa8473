"""Small tokenizers of every family, trained on the spot."""

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not.",
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))",
    "Überall gibt es Käse, crème brûlée und 猫. 猫は好きです。 Привет, мир! 🙂🙃",
    "  two spaces before, two after  ",
] * 3
SPECIALS = ["<bos>", "<eos>", "<unk>"]


def _wrap(backend: Tokenizer, **roles: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@cache
def byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([AddedToken("<ünit>", special=False, normalized=False)])
    return _wrap(backend, eos_token="<eos>")


def _byte_fallback_vocabulary(backend: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(backend.to_str())["model"]
    vocabulary = dict(model["vocab"])
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return vocabulary, [tuple(pair) for pair in model["merges"]]


@cache
def sentencepiece_bpe(dummy_prefix: bool) -> PreTrainedTokenizerFast:
    """Gemma's way without a dummy prefix, Llama 2's with one."""
    normalizer = normalizers.Replace(" ", "▁")
    if dummy_prefix:
        normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizer])
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizer
    trained.train_from_iterator(
        [part for text in TEXTS[:3] for part in text.split(" ")],
        trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False),
    )
    vocabulary, merges = _byte_fallback_vocabulary(trained)
    vocabulary.setdefault("▁▁", len(vocabulary))
    vocabulary.setdefault("▁", len(vocabulary))
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps)
    backend.add_special_tokens(SPECIALS)
    backend.add_tokens([AddedToken("▁▁", special=False, normalized=False)])
    return _wrap(backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@cache
def metaspace_unigram() -> PreTrainedTokenizerFast:
    """T5's way: Unigram passages after a Metaspace that prepends, with byte fallback."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    )
    passages = [tuple(passage) for passage in json.loads(backend.to_str())["model"]["vocab"]]
    backend.model = models.Unigram(
        [*passages, *((passage, -20.0) for passage in fallback)], unk_id=SPECIALS.index("<unk>"), byte_fallback=True
    )
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return _wrap(backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@cache
def word_piece() -> PreTrainedTokenizerFast:
    """BERT's way, which loses spaces: nothing here spells its text to the end."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"], show_progress=False)
    )
    return _wrap(backend, unk_token="[UNK]")


FAMILIES = {
    "byte_level": byte_level,
    "sentencepiece": lambda: sentencepiece_bpe(False),
    "dummy_prefix": lambda: sentencepiece_bpe(True),
    "unigram": metaspace_unigram,
}
