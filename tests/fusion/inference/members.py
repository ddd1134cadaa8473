"""Members of an ensemble with another tokenizer than its pivot."""

from functools import partial
from typing import Any

import torch

from fusion.inference.ensembles import CrossTokenizerMember
from fusion.inference.prefix_cache import PrefixCachedModel
from fusion.vocabulary.maps import build_map
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import encode_all, prefix_id
from tests.fusion.tokenizers_for_tests import byte_level


def cross_tokenizer_member(
    member: Any,
    tokenizer: Any,
    kind: type[CrossTokenizerMember] = CrossTokenizerMember,
    label: str = "",
    overlaps: int = 3,
) -> CrossTokenizerMember:
    """A model that is asked in the tokens of `byte_level`."""
    tokens = byte_level()
    own = Vocabulary.from_tokenizer(tokens)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, member.config.vocab_size)
    onto = build_map("first_piece", vocabulary, own, encode_target=partial(encode_all, tokens))
    return kind(
        PrefixCachedModel(member),
        tokenizer,
        vocabulary,
        own,
        torch.from_numpy(onto).long(),
        encode_pivot=partial(encode_all, tokens),
        prefix=prefix_id(tokenizer),
        label=label,
        overlaps=overlaps,
    )
