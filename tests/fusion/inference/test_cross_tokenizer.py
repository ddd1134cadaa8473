"""Members of an ensemble with a tokenizer of their own: what they say of the pivot's tokens, by the definition."""

import copy
import json
import math
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from fusion.errors import UserError
from fusion.inference.decoding import decode
from fusion.inference.ensembles import CrossTokenizerMember, PrefixCachedEnsemble
from fusion.inference.likelihood import document_nats
from fusion.inference.prefix_cache import PrefixCachedModel
from fusion.inference.prefix_tree import Branching
from fusion.vocabulary.maps import build_map
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import encode, encode_all, prefix_id
from tests.fusion.inference.members import cross_tokenizer_member
from tests.fusion.inference.random_models import GEMMA, joint, model, pick
from tests.fusion.tokenizers_for_tests import FAMILIES, TEXTS, byte_level, sentencepiece_bpe
from tests.tokenizer_zoo import ZOO
from tests.tokenizer_zoo import vocabulary as zoo_vocabulary

TEXT = "The dog sleeps; crème brûlée 猫 fox\n  two 🙂"


def translated(pivot: Any, members: dict[str, Any], share: float = 0.4) -> PrefixCachedEnsemble:
    """A model in the pivot's tokens with others, each with the tokenizer of a family."""
    others = [cross_tokenizer_member(member, FAMILIES[family](), label=family) for family, member in members.items()]
    return PrefixCachedEnsemble(
        [(PrefixCachedModel(pivot), share)], [(one, (1 - share) / len(others)) for one in others]
    )


@pytest.fixture(scope="module")
def pivot() -> Any:
    return model(LlamaConfig, len(byte_level()), 1)


@pytest.fixture(scope="module")
def members() -> dict[str, Any]:
    return {
        "sentencepiece": model(Gemma3TextConfig, len(sentencepiece_bpe(False)), 2, **GEMMA),
        "dummy_prefix": model(LlamaConfig, len(sentencepiece_bpe(True)), 3),
    }


def goes_on(known: bytes, tail: Sequence[int], rest: bytes) -> int | None:
    """The token that `byte_level` writes after its tokens `tail`, which spell `known`, where these stay; else None."""
    spelled = Vocabulary.from_tokenizer(byte_level()).token_bytes
    if known + rest in spelled:
        return None
    try:
        whole, without = encode(byte_level(), (known + rest).decode()), encode(byte_level(), known.decode())
    except UnicodeDecodeError:
        whole, without = [], []
    if without == [*tail]:
        return whole[len(tail)] if whole[: len(tail)] == [*tail] else None
    starts = {len(b"".join(spelled[i] or b"" for i in tail[:n])) for n in range(len(tail))}
    longer = {known[n:] + rest[:m] for n in starts for m in range(1, len(rest) + 1)}
    if longer & set(spelled):
        return None
    return spelled.index(max((passage for passage in spelled if passage and rest.startswith(passage)), key=len))


def by_definition(
    reader: PrefixCachedEnsemble, models: Sequence[Any], shares: Sequence[float], text: Sequence[int]
) -> Tensor:
    """log-probabilities float64[V] after a text, from the member's own tokens and without any cache.

    What may follow is weighed by the probability of all that is written for it: of the text's last three tokens and the
    next, and of what is written in place of the last one, two or three where a longer token covers the text's end.
    """
    spelled = Vocabulary.from_tokenizer(byte_level()).token_bytes
    with torch.no_grad():
        p = shares[0] * models[0](torch.tensor([list(text)])).logits[0, -1].double().softmax(-1)
        for one, member, share in zip(reader._members, models[1:], shares[1:], strict=True):
            (ids,) = one.encode([text])
            said = member(torch.tensor([ids])).logits[0].double().softmax(-1)
            until = max(len(ids) - 3, 1)  # what is read for certain
            sure = [float(said[n - 1, ids[n]]) for n in range(until, len(ids))]
            mapped = torch.zeros_like(p)
            for i, onto in zip(*(x.tolist() for x in one._maps[one._added_spaces(text)]), strict=True):
                mapped[onto] += said[-1, i]
            mapped *= math.prod(sure)
            own = Vocabulary.from_tokenizer(one._tokenizer, len(said[0])).token_bytes
            for start in range(len(ids) - 1, until - 1, -1):
                if None in (passages := [own[i] for i in ids[start:]]):
                    break
                end = b"".join(passage or b"" for passage in passages)
                tails = [text[n:] for n in range(len(text)) if None not in [spelled[i] for i in text[n:]]]
                known = {b"".join(spelled[i] or b"" for i in tail): tail for tail in tails}
                started = min((k for k in known if len(k) >= len(end)), key=len, default=b"")
                if not started.endswith(end):
                    break
                for i, passage in enumerate(own):
                    if passage and passage.startswith(end) and passage != end:
                        token = goes_on(started, known[started], passage[len(end) :])
                        if token is not None:
                            mapped[token] += math.prod(sure[: start - until]) * said[start - 1, i]
            p += share * mapped / mapped.sum()
    return p.log()


@pytest.mark.parametrize(
    ("pivot_name", "name"), [("llama", "gpt2"), ("gpt2", "llama"), ("llama", "prefix_space"), ("prefix_space", "gpt2")]
)
def test_a_texts_first_token_gets_the_pivots_space(pivot_name: str, name: str) -> None:
    """A member that says "The" means the "▁The" of a pivot that puts a space before every text, and the other way."""
    tokens, other = ZOO[pivot_name](), ZOO[name]()
    pivot, own, encode_pivot = zoo_vocabulary(pivot_name), zoo_vocabulary(name), partial(encode_all, tokens)
    member = model(LlamaConfig, len(own), 3)
    onto = build_map("mined", own, pivot, encode_target=encode_pivot)
    one = CrossTokenizerMember(
        PrefixCachedModel(member),
        other,
        own,
        pivot,
        torch.from_numpy(onto).long(),
        encode_pivot=encode_pivot,
        prefix=prefix_id(other),
        label=name,
    )
    before = one.read([[[prefix_id(tokens)]]], [None])[0]
    with torch.no_grad():  # the first token becomes likelier
        hidden = member.model(torch.tensor([[prefix_id(other)]])).last_hidden_state[0, 0]
        member.lm_head.weight[encode(other, "The fox")[0]] += 9 * hidden / hidden.norm()
    after = one.read([[[prefix_id(tokens)]]], [None])[0]
    assert int((after - before)[0].nan_to_num(-99).argmax()) == encode(tokens, "The fox")[0]


def test_members_read_their_own_tokens_of_the_prefix_alone(pivot: Any, members: dict[str, Any]) -> None:
    reader = translated(pivot, members)
    tokens = byte_level()
    ids = encode(tokens, TEXT)
    for one, family in zip(reader._members, members, strict=True):
        other = FAMILIES[family]()
        for n in range(1, len(ids) + 1):
            spelled = b"".join(Vocabulary.from_tokenizer(tokens).token_bytes[i] or b"" for i in ids[:n])
            whole = spelled.decode("utf-8", "ignore")
            left = spelled[len(whole.encode()) :]
            expected = encode(other, whole) + [other.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in left]
            assert one.encode([ids[:n]]) == [expected]
            # Where the pivot reads a control token first, the member reads its own.
            assert one.encode([[0, *ids[:n]]]) == [[prefix_id(other), *expected]]
        assert one.encode([[0]]) == [[prefix_id(other)]]
        assert one.encode([[*ids[:3], 0]])[0][-1] == other.eos_token_id


def test_translated_reading_is_its_definition(
    pivot: Any, members: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fusion.inference.likelihood

    reader = translated(pivot, members)
    models, shares = [pivot, *members.values()], [0.4, 0.3, 0.3]
    ids = [0, *encode(byte_level(), TEXT)]
    for one in reader._members:
        ends = [one._healing.covering_tokens(*one.encode([ids[:n]]), ids[:n]) for n in range(1, len(ids))]
        assert {0, 1, 2} <= set(map(len, ends))
    expected = torch.stack([by_definition(reader, models, shares, ids[: n + 1]) for n in range(len(ids))])
    with reader.patched_attention():
        found = reader.read([Branching(ids)], [range(len(ids))])
        _, (cached,) = reader.prefill([Branching(ids[:9])])
        continued = reader.read([Branching(ids[9:12], cached, [ids[12:], ids[3:5]])], [range(len(ids) - 9)])
        shuffled = PrefixCachedEnsemble([(reader._readers[0], 0.4)], [(one, 0.3) for one in reader._members[::-1]])
        other_order = shuffled.read([Branching(ids)], [range(len(ids))])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other_order, found, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(continued.double(), expected[9:], atol=1e-4, rtol=1e-4)
    nats = -expected[:-1].gather(1, torch.tensor(ids[1:])[:, None]).sum()
    for logits in (2**25, 5 * reader.widest):
        monkeypatch.setattr(fusion.inference.likelihood, "LOGITS_PER_CHUNK", logits)
        found = document_nats(reader, [ids[1:]], prefix=0, window=100, batch_tokens=100)
        assert found == pytest.approx([float(nats)], rel=1e-5)


@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_written_has_the_likelihood_of_its_steps(pivot: Any, members: dict[str, Any], seed: int | None) -> None:
    reader = translated(pivot, members, share=0.1)
    models, shares = [pivot, *members.values()], [0.1, 0.45, 0.45]
    given = [[0, *encode(byte_level(), text)] for text in (*TEXTS[:2], TEXTS[0][:30], "猫")]
    steps = [0.0] * len(given)
    new: list[list[int]] = [[] for _ in given]

    def choose(numbers: Sequence[int], logits: Tensor) -> list[int | None]:
        for number, row in zip(numbers, logits, strict=True):
            token = pick(row, number, len(new[number]), seed)
            steps[number] += float(row[token])
            new[number].append(token)
        return [None if len(new[number]) == 12 else new[number][-1] for number in numbers]

    decode(reader, given, choose, rows=3, batch_tokens=60)
    for prompt, answer, steps_sum in zip(given, new, steps, strict=True):
        with reader.patched_attention():
            text = [*prompt, *answer]
            rows = reader.read([Branching(text[:-1])], [range(len(prompt) - 1, len(text) - 1)])
        found = float(rows.gather(1, torch.tensor(answer)[:, None]).sum())
        assert found == pytest.approx(steps_sum, abs=1e-3)
    prompt = list(given[2])
    for step in range(4):  # and the steps are those of the naive loop
        token = pick(by_definition(reader, models, shares, prompt), 2, step, seed)
        assert token == new[2][step]
        prompt.append(token)


def test_a_tokenizer_of_the_pivots_in_other_numbers_changes_nothing(pivot: Any) -> None:
    """A model that is translated although it has the pivot's tokens, against the ensemble that needs no translation."""
    described = json.loads(byte_level().backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    shuffled = random.Random(1).sample(range(len(vocabulary)), len(vocabulary))
    number = [*shuffled, *range(len(vocabulary), len(byte_level()))]  # of each token, where the pivot has its index
    described["model"]["vocab"] = {token: number[i] for token, i in vocabulary.items()}
    for token in described["added_tokens"]:
        token["id"] = number[token["id"]]
    backend = Tokenizer.from_str(json.dumps(described))
    other = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert encode(other, TEXT) == [number[i] for i in encode(byte_level(), TEXT)] != encode(byte_level(), TEXT)

    member = model(GPTNeoXConfig, len(byte_level()), 4)
    renumbered = copy.deepcopy(member)
    for layer in (renumbered.get_input_embeddings(), renumbered.get_output_embeddings()):
        layer.weight.data[torch.tensor(number)] = layer.weight.data.clone()
    found = PrefixCachedEnsemble([(PrefixCachedModel(pivot), 0.4)], [(cross_tokenizer_member(renumbered, other), 0.6)])
    plain = joint([pivot, member], [0.4, 0.6])
    ids = [0, *encode(byte_level(), TEXT)]
    # A text that ends within a character is spelled in bytes, which the pivot's own tokens may join to others.
    whole = [n for n in range(len(ids)) if "\ufffd" not in byte_level().decode(ids[: n + 1])]
    assert len(whole) > len(ids) / 2
    said = []
    for reader in (found, plain):
        with reader.patched_attention():
            said.append(reader.read([Branching(ids)], [whole]))
    torch.testing.assert_close(*said, atol=1e-4, rtol=1e-4)


def test_a_mean_of_logits_needs_one_tokenizer(pivot: Any, members: dict[str, Any]) -> None:
    reader = translated(pivot, members)
    with pytest.raises(UserError, match="needs models with one tokenizer"):
        PrefixCachedEnsemble([(PrefixCachedModel(pivot), 1)], [(t, 1) for t in reader._members], "logits")


def test_a_text_beyond_a_members_context_is_refused(pivot: Any, members: dict[str, Any]) -> None:
    reader = translated(pivot, members)
    reader._members[0].reader.positions = 10
    with reader.patched_attention(), pytest.raises(UserError, match="does not fit the context of sentencepiece, 10"):
        reader.read([Branching(encode(byte_level(), TEXT))], [[12]])


@pytest.mark.parametrize("mode", ["rolling", "strided"])
def test_a_window_begins_alike_for_every_member(
    pivot: Any, members: dict[str, Any], mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member whose tokenizer puts a bos before any text reads it where a model by itself reads its own."""
    reader = translated(pivot, {"sentencepiece": members["sentencepiece"]})
    (member,) = reader._members
    member.adds_prefix = True
    read: dict[int, bool] = {}
    encode_texts = member.encode

    def watched(texts: Sequence[Sequence[int]]) -> list[list[int]]:
        found = encode_texts(texts)
        read.update({text[0]: own[0] == member._prefix for text, own in zip(texts, found, strict=True)})
        return found

    monkeypatch.setattr(member, "encode", watched)
    document_nats(reader, [encode(byte_level(), TEXT)], prefix=0, window=8, mode=mode, batch_tokens=100)
    assert read.pop(0)
    assert (read == {}) if mode == "strided" else (read and not any(read.values()))
    assert member.adds_prefix
