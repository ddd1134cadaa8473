"""Laws of tokenizers, each over a zoo of them."""

from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment.fuse import Source, fuse_sequence
from fusion.errors import UserError
from fusion.switches import Switches
from fusion.types import Predictions
from fusion.vocabulary.maps import build_map
from fusion.vocabulary.token_bytes import byte_ends
from fusion.vocabulary.tokenization import (
    decode_continuation,
    encode,
    encode_all,
    lost_bytes,
    prefix_id,
    written_ids,
)
from tests.tokenizer_zoo import LOSSY, ZOO, vocabulary

CODE = 'def half(x):\n    """Half of x."""\n    if x > 1984:\n        return x / 2\n\n\n        pass'
TEXTS = [
    CODE,
    "The quick brown fox jumps over the lazy dog.",
    " one before, two after  ",
    "\nThe end, 1 2 34.",
    "Überall Käse, crème brûlée und 猫. 🙂",
    "e\u0301 <fill> or \x13\x14 Page 7 \u0590",
]
TEXT = st.text(
    st.sampled_from(list("ab Te.\n\t7")) | st.sampled_from(list("猫🙂ß▁Ġ\u0301\x13")) | st.characters(codec="utf-8"),
    max_size=30,
)


@pytest.mark.parametrize("name", ZOO)
@settings(deadline=None, max_examples=40)
@given(text=TEXT | st.sampled_from(TEXTS))
def test_tokens_spell_their_text_or_the_loss_is_counted(name: str, text: str) -> None:
    ids, data = encode(ZOO[name](), text), text.encode()
    ends, lost = byte_ends(ids, vocabulary(name), data), lost_bytes(ids, vocabulary(name), data)
    assert (lost == 0) == ((int(ends[-1]) if len(ends) else 0) == len(data))
    assert 0 <= lost <= max(len(data), 1)


@pytest.mark.parametrize("name", [name for name in ZOO if name not in (*LOSSY, "ids_beyond")])
def test_what_loses_nothing_counts_nothing(name: str) -> None:
    assert [lost_bytes(encode(ZOO[name](), text), vocabulary(name), text.encode()) for text in TEXTS] == [0] * len(
        TEXTS
    )


def test_losses_are_counted_in_bytes_of_the_text() -> None:
    def lost(name: str, text: str) -> int:
        return lost_bytes(encode(ZOO[name](), text), vocabulary(name), text.encode())

    dropped = "The fox." + "\x13\x14" * 200
    assert lost("missing_bytes", dropped) == 400 and lost("missing_bytes", dropped + " The dog.") == 400
    assert lost("missing_bytes", "The \x13fox and the\x14 dog") == 2
    assert lost("lower_case", "The fox and The Dog") == 3
    assert lost("qwen", "e\u0301") == 3 and lost("qwen", "é") == 0  # NFC: none of the three bytes stays
    assert lost("unk_swallows", "The fox 猫猫猫 sleeps") == 9
    assert lost("added_tokens", "a <fill> b") == 1
    assert lost("word_piece", "The fox") == 1
    assert lost("llama", "a▁b") == 3 and lost("ids_beyond", "<ünit>") == 7
    assert lost_bytes([], vocabulary("gpt2"), b"") == 0 and lost_bytes([], vocabulary("gpt2"), b"ab") == 2


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("text", TEXTS)
def test_a_continuation_is_the_text_of_the_whole_without_that_of_the_prompt(name: str, text: str) -> None:
    tokenizer = ZOO[name]()
    ids = encode(tokenizer, text)
    for prefix in ([], tokenizer.all_special_ids[:1]):
        for n in range(len(ids) + 1):
            prompt, new = [*prefix, *ids[:n]], ids[n:]
            whole = tokenizer.decode([*prompt, *new], skip_special_tokens=True)
            before = tokenizer.decode(prompt, skip_special_tokens=True)
            if not before.endswith("\ufffd"):  # it ends inside a character
                assert before + decode_continuation(tokenizer, prompt, new) == whole


@pytest.mark.parametrize("name", [name for name in ZOO if name not in ("clip", "word_piece", "lower_case")])
def test_an_indented_continuation_keeps_its_indentation(name: str) -> None:
    tokenizer = ZOO[name]()
    if name == "unk_swallows":
        prompt, answer = "The dog", "  sleeps"
    else:
        prompt, answer = CODE[: CODE.index("    if")], CODE[CODE.index("    if") :]
    ids, before = encode(tokenizer, prompt + answer), encode(tokenizer, prompt)
    n = next(n for n in range(len(before), -1, -1) if ids[:n] == before[:n])
    assert decode_continuation(tokenizer, ids[:n], ids[n:]).endswith(answer)


@cache
def _written(name: str) -> np.ndarray:
    return written_ids(vocabulary(name), partial(encode_all, ZOO[name]()))


@pytest.mark.parametrize("name", ZOO)
def test_ids_that_occur_in_text_count_as_written(name: str) -> None:
    for text in TEXTS:
        ids = np.array(encode(ZOO[name](), text))[1:]  # the first may have a space that is not in the text
        ids = ids[ids < len(vocabulary(name))]
        spelled = [i for i in ids.tolist() if vocabulary(name).token_bytes[i]]
        if name not in ("clip", "word_piece", "added_tokens"):  # whose strings are not what they stand for
            assert _written(name)[spelled].all(), [vocabulary(name).tokens[i] for i in spelled if not _written(name)[i]]


def test_of_runs_of_spaces_only_the_added_tokens_are_written() -> None:
    v = vocabulary("gpt_neox")
    for n in range(2, 9):
        alike = [i for i, spelling in enumerate(v.token_bytes) if spelling == b" " * n]
        assert [i for i in alike if _written("gpt_neox")[i]] == [max(alike)]
    assert len([i for i, spelling in enumerate(v.token_bytes) if spelling == b"    "]) == 2


@pytest.mark.parametrize("target", ZOO)
@pytest.mark.parametrize("kind", ["mined", "em", "first_piece"])
def test_a_map_never_names_an_id_that_the_tokenizer_does_not_write(kind: str, target: str) -> None:
    for source in ("gpt_neox", "llama", "added_tokens"):
        encode_target = partial(encode_all, ZOO[target]())
        image = build_map(kind, vocabulary(source), vocabulary(target), encode_target=encode_target)
        for i, spelling in enumerate(vocabulary(source).token_bytes):
            if spelling is not None and image[i] >= 0 and not _written(target)[image[i]]:
                # CLIP writes a piece by itself with the mark of a word's end, before others without.
                assert kind == "first_piece" and image[i] == encode(ZOO[target](), spelling.decode())[0]


@pytest.mark.parametrize("target", ["llama", "t5", "prefix_space", "gpt2", "gemma"])
@pytest.mark.parametrize("source", ["llama", "t5", "prefix_space", "gpt2", "gemma", "gpt_neox"])
@pytest.mark.parametrize("text", ["The fox jumps", " The fox", "The", "\nThe fox", "  two"])
def test_a_source_that_knows_the_first_token_teaches_it(source: str, target: str, text: str) -> None:
    """Whatever space a tokenizer puts before a text: a source without one says "The", where its target says "▁The"."""
    encode_target = partial(encode_all, ZOO[target]())
    vocabulary_map = build_map("mined", vocabulary(source), vocabulary(target), encode_target=encode_target)
    read = {"s": _sure_of_the_text(source, text), "t": _sure_of_the_text(target, text)}
    fused = fuse_sequence(
        [read],
        [len(text)],
        target="t",
        sources=[Source("s", vocabulary(source), vocabulary_map)],
        target_vocabulary=vocabulary(target),
        switches=Switches(include_target=False, projection="token", inside="none"),
    )
    for i in np.flatnonzero(fused.paired[0][:-1]).tolist():
        j = int(fused.partner[0][i])
        if read["s"].byte_ends[j + 1] == read["t"].byte_ends[i + 1]:  # both next tokens are the same text
            fused_entries = dict(zip(fused.targets.ids[i].tolist(), fused.targets.p[i].tolist(), strict=True))
            in_target = vocabulary(target).token_bytes[int(read["t"].tokens[i + 1])]
            known = vocabulary(source).token_bytes
            assert fused_entries.get(int(read["t"].tokens[i + 1]), 0) > 0.8 or (i == 0 and in_target not in known)


def _sure_of_the_text(name: str, text: str) -> Predictions:
    """Each next token with probability 0.9."""
    ids = encode(ZOO[name](), text)
    m = len(ids) + 1
    return Predictions(
        tokens=np.array([0, *ids], np.int32),
        byte_ends=np.array([0, *byte_ends(ids, vocabulary(name), text.encode())], np.int32),
        ids=np.array([*ids, 0], np.int32)[:, None],
        log_p=np.full((m, 1), np.log(0.9), np.float32),
        tail=np.full(m, 0.1, np.float32),
        nll=np.array([*[-np.log(0.9)] * len(ids), 0], np.float32),
    )


def test_a_text_begins_with_a_token_with_its_space_or_without() -> None:
    llama = vocabulary("llama")
    marked, plain = llama.ids["▁dog"], llama.ids.get("dog", -1)
    assert llama.without_space[marked] == plain and llama.with_space[llama.roles["eos"]] == llama.roles["eos"]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma", "t5", "digits", "qwen"])
def test_the_prefix_is_a_role_or_any_token(name: str) -> None:
    tokenizer = ZOO[name]()
    default = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    assert prefix_id(tokenizer) == default and prefix_id(tokenizer, "eos") == tokenizer.eos_token_id
    assert prefix_id(tokenizer, tokenizer.eos_token) == tokenizer.eos_token_id
    if name != "t5":  # whose text has no line ends
        assert vocabulary(name).token_bytes[prefix_id(tokenizer, "\n")] == b"\n"
    for wrong, sentence in (("<nothing>", "has no token '<nothing>'"), ("none", "needs a prefix")):
        with pytest.raises(UserError, match=sentence):
            prefix_id(tokenizer, wrong)
    if tokenizer.bos_token_id is None:
        with pytest.raises(UserError, match="has no token 'bos'"):
            prefix_id(tokenizer, "bos")
