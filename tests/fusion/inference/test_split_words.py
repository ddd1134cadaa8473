"""A member that splits words otherwise than the pivot, as texts tell it: read anew, or token by token."""

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from fusion.inference.ensembles import CrossTokenizerMember, PrefixCachedEnsemble
from fusion.inference.likelihood import document_nats
from fusion.inference.prefix_cache import PrefixCachedModel
from fusion.vocabulary.maps import build_map
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import encode, encode_all, prefix_id
from tests.fusion.inference.members import cross_tokenizer_member
from tests.fusion.inference.random_models import model
from tests.fusion.tokenizers_for_tests import byte_level


class OneToOne(CrossTokenizerMember):
    """PackLLM's way: every token of the context becomes the one most like it, whatever text that spells."""

    to_own: Sequence[int]

    def encode(self, texts: Sequence[Sequence[int]]) -> list[list[int]]:
        return [[self.to_own[i] for i in text] for text in texts]


WORDS = [
    "gardens",
    "bloom",
    "underneath",
    "silver",
    "moonlight",
    "wandering",
    "strangers",
    "whisper",
    "ancient",
    "promises",
    "another",
    "thousand",
    "lanterns",
    "drift",
    "northward",
]


def chain(n: int, seed: int) -> str:
    """Words of which each is followed by one of two others."""
    drawn, now, found = random.Random(seed), 0, []
    for _ in range(n):
        found.append(WORDS[now])
        now = (2 * now + drawn.choice((1, 6))) % len(WORDS)
    return " ".join(found)


def whole_words() -> PreTrainedTokenizerFast:
    """To `byte_level` those words are passages of two or three letters; here most are one token each."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    backend.train_from_iterator(
        [chain(500, 0)],
        BpeTrainer(
            vocab_size=370, special_tokens=["<eos>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def trained(tokenizer: Any, words: int, steps: int) -> Any:
    """A model that has read so many words of the chain."""
    made = model(LlamaConfig, len(tokenizer), 1, hidden_size=32)
    for parameter in made.parameters():
        parameter.data.div_(4 if parameter.ndim > 1 else 1)
    tokens = torch.tensor(encode(tokenizer, chain(words, 0)))
    drawn, optimizer = random.Random(0), torch.optim.AdamW(made.parameters(), lr=1e-2)
    for _ in range(steps):
        rows = torch.stack([tokens[at : at + 32] for at in (drawn.randrange(len(tokens) - 32) for _ in range(16))])
        made(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return made.eval()


def test_text_read_anew_tells_more_than_tokens_for_tokens_where_words_are_split_otherwise() -> None:
    """On held-out text, the pivot spelling most of the member's tokens in passages.

    What the member says within one of its own tokens is worth little either way, and both are worse than the pivot
    alone; with what covers the text's end they are far better.
    """
    pivot, tokenizer = trained(byte_level(), 300, 30), whole_words()
    member = trained(tokenizer, 3000, 100)
    covered, anew = (cross_tokenizer_member(member, tokenizer, overlaps=most) for most in (3, 0))
    mapped = cross_tokenizer_member(member, tokenizer, OneToOne, overlaps=0)
    assert isinstance(mapped, OneToOne)
    own, theirs = Vocabulary.from_tokenizer(byte_level()), Vocabulary.from_tokenizer(tokenizer)
    onto = build_map("mined", own, theirs, encode_target=partial(encode_all, tokenizer))
    mapped.to_own = [int(i) if i >= 0 else prefix_id(tokenizer) for i in onto]
    readers = [PrefixCachedEnsemble([(PrefixCachedModel(pivot), 0.3)], [(one, 0.7)]) for one in (covered, anew, mapped)]
    held_out = chain(60, 1)
    settings: Any = {"prefix": 0, "window": 512, "batch_tokens": 512}
    alone, by_end, by_text, by_token = (
        float(document_nats(m, [encode(byte_level(), held_out)], **settings)[0]) / len(held_out)
        for m in (pivot, *readers)
    )
    print(f"nats a byte: {alone:.3f} alone, {by_end:.3f} covered, {by_text:.3f} read anew, {by_token:.3f} by tokens")
    assert by_text < 0.97 * by_token
    assert by_end < 0.5 * alone < 0.5 * by_text
