"""Tokenizers and models that are made of the standard library's text."""

import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion.errors import UserError
from fusion.modeling.context import context_length
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends
from fusion.vocabulary.tokenization import encode, prefix_id
from harness.data.standard_library import LibraryDocument
from harness.models.tiny import (
    TinyModel,
    TinyRecipe,
    build_model,
    build_tokenizer,
    make_tokenizer,
    tiny_recipe,
    training_documents,
)

MICRO = tiny_recipe("micro")
REHEARSAL = tiny_recipe("rehearsal")
NAMES = [model.name for model in MICRO.models]
MODELS = [pytest.param(recipe, model, id=model.name) for recipe in (MICRO, REHEARSAL) for model in recipe.models]
TEXTS = [
    "def f(x):\n    return {'a': 12345, \"b\": [x] * 7}\n\n\nclass C: pass\n",
    "  spaces at both ends  ",
    "\tтекст, 漢字 and \U0001f600\U0001f469\u200d\U0001f4bb\r\n\x00\x1f",
    "<|endoftext|> <bos> <0x41> <|bos|>",
    "",
]
DECOMPOSED = "cafe\u0301"


@pytest.fixture(scope="module")
def documents() -> list[LibraryDocument]:
    return MICRO.corpus.documents()


@pytest.mark.slow
def test_the_whole_corpus_suffices_for_the_training_text() -> None:
    recipe = tiny_recipe()
    documents = recipe.corpus.documents()
    for model in recipe.models:
        size = sum(len(d.text.encode()) for d in training_documents(model, documents))
        assert model.train_bytes <= size < model.train_bytes * 1.1


def test_training_text_has_the_mix(documents: list[LibraryDocument]) -> None:
    for model in MICRO.models:
        chosen = training_documents(model, documents)
        assert {d.split for d in chosen} == {"train"}
        assert {d.domain for d in chosen} == set(model.mix)
        assert chosen == training_documents(model, list(reversed(documents)))
        assert sum(model.mix.values()) == pytest.approx(1)
    orders = [[d.name for d in training_documents(model, documents)] for model in MICRO.models]
    assert all(order != sorted(order) for order in orders)  # domains are mixed, not one after another


@pytest.fixture(scope="module")
def rehearsal_documents() -> list[LibraryDocument]:
    return [document for document in REHEARSAL.corpus.documents() if document.domain != "line"]


@pytest.mark.parametrize("name", [model.name for model in REHEARSAL.models])
def test_tokenizers_of_the_rehearsal_spell_what_the_papers_do(
    name: str, rehearsal_documents: list[LibraryDocument]
) -> None:
    """OpenLLaMA's reads several spaces as one, GPT-NeoX's composes characters; all other text is read back as it is."""
    model = REHEARSAL.model(name)
    tokenizer = make_tokenizer(model, rehearsal_documents)
    assert len(tokenizer) == model.vocabulary <= model.embedded
    vocabulary = Vocabulary.from_tokenizer(tokenizer, model.embedded)
    for text in [*TEXTS, DECOMPOSED, *(d.text for d in rehearsal_documents if d.domain == "awkward")]:
        expected = text
        if model.tokenizer == "open_llama":
            expected = re.sub(" {2,}", " ", expected)
        if model.tokenizer == "gpt_neox":
            expected = unicodedata.normalize("NFC", expected)
        else:
            expected = expected.replace("▁", " ")  # SentencePiece's sign for a space is no other character
        ids = encode(tokenizer, text)
        assert not set(ids) & vocabulary.control
        assert tokenizer.decode(ids) == expected


def test_tokenizers_of_the_rehearsal_are_of_the_papers_kinds(rehearsal_documents: list[LibraryDocument]) -> None:
    llama, open_llama, mpt, large, pythia = (make_tokenizer(m, rehearsal_documents) for m in REHEARSAL.models)
    assert large.backend_tokenizer.to_str() == llama.backend_tokenizer.to_str()
    assert llama.pad_token is None and llama("word")["input_ids"][0] == llama.bos_token_id
    assert llama.tokenize("word")[0].startswith("▁") and llama.tokenize("漢")[1:] == ["<0xE6>", "<0xBC>", "<0xA2>"]
    assert [token.strip("▁") for token in llama.tokenize("2024") if token != "▁"] == list("2024")
    assert open_llama.tokenize("a    b") == open_llama.tokenize("a b") != llama.tokenize("a    b")
    for neox in (mpt, pythia):
        assert neox.bos_token_id == neox.eos_token_id != neox.pad_token_id
        assert len(encode(neox, " " * 24)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_are_deterministic_and_spell_any_text(name: str, documents: list[LibraryDocument]) -> None:
    model = MICRO.model(name)
    tokenizer = make_tokenizer(model, documents)
    assert len(tokenizer) == model.vocabulary
    assert tokenizer.backend_tokenizer.to_str() == make_tokenizer(model, documents).backend_tokenizer.to_str()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    for text in [*TEXTS, *(d.text for d in documents[::5])]:
        ids = encode(tokenizer, text)
        assert not set(ids) & vocabulary.control
        ends = byte_ends(ids, vocabulary, text.encode())
        assert (len(ids) == 0 and not text) or ends[-1] == len(text.encode())
        assert tokenizer.decode(ids) == text


def test_tokenizers_are_of_different_families(documents: list[LibraryDocument]) -> None:
    target, coder, reader, teacher = (make_tokenizer(model, documents) for model in MICRO.models)
    assert teacher.backend_tokenizer.to_str() == target.backend_tokenizer.to_str()
    assert target.bos_token_id is not None
    assert coder.bos_token is None
    assert prefix_id(coder) == coder.eos_token_id
    assert all(len(coder.tokenize(number)) == len(number) for number in ("2024", "100"))
    spaces = [Vocabulary.from_tokenizer(tokenizer).space for tokenizer in (target, coder, reader)]
    assert spaces == ["Ġ", "Ġ", "▁"]
    assert len(Vocabulary.from_tokenizer(reader).byte_fallback) == 256
    assert reader.tokenize("漢") == ["<0xE6>", "<0xBC>", "<0xA2>"]
    # Like the real one it composes characters, which its bytes then do not spell.
    assert coder.decode(encode(coder, DECOMPOSED)) == "café"
    assert target.decode(encode(target, DECOMPOSED)) == reader.decode(encode(reader, DECOMPOSED)) == DECOMPOSED
    assert reader("word")["input_ids"][0] == reader.bos_token_id  # unless told otherwise, as Gemma's does


def test_a_vocabulary_too_large_for_the_text() -> None:
    with pytest.raises(UserError, match="a vocabulary of 5000 tokens cannot be made from so little text"):
        build_tokenizer("gpt2", ["a few words"], 5_000)


@pytest.mark.parametrize(("recipe", "tiny"), MODELS)
def test_saved_folders_load_plainly(
    recipe: TinyRecipe, tiny: TinyModel, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    of_recipe = "documents" if recipe == MICRO else "rehearsal_documents"
    tokenizer = make_tokenizer(tiny, request.getfixturevalue(of_recipe))
    model = build_model(tiny, tokenizer).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # With a configuration beside it, another tokenizer class could be chosen by the model's type.
    reloaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded_tokenizer.is_fast
    for text in [*TEXTS, DECOMPOSED]:
        assert encode(reloaded_tokenizer, text) == encode(tokenizer, text)
    fingerprints = [Vocabulary.from_tokenizer(t, tiny.embedded).fingerprint() for t in (tokenizer, reloaded_tokenizer)]
    assert fingerprints[0] == fingerprints[1]
    for role in ("bos", "eos", "pad"):
        assert getattr(reloaded_tokenizer, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([encode(tokenizer, TEXTS[0])])
    torch.testing.assert_close(reloaded(ids).logits, model(ids).logits)
    assert reloaded.config.model_type == tiny.architecture
    assert (reloaded.config.vocab_size, context_length(reloaded.config)) == (tiny.embedded, tiny.context)


def test_models_follow_their_seed_and_leave_the_random_state(documents: list[LibraryDocument]) -> None:
    tiny = MICRO.model("target")
    tokenizer = make_tokenizer(tiny, documents)
    torch.manual_seed(5)
    first = build_model(tiny, tokenizer)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == drawn
    again, other = build_model(tiny, tokenizer), build_model(replace(tiny, seed=99), tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_micro_models_learn(name: str, documents: list[LibraryDocument]) -> None:
    tiny = MICRO.model(name)
    tokenizer = make_tokenizer(tiny, documents)
    model = build_model(tiny, tokenizer).train()
    text = " ".join(d.text for d in training_documents(tiny, documents))
    ids = encode(tokenizer, text)[: 8 * 64]
    rows = torch.tensor(ids).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=tiny.learning_rate)
    losses = []
    for _ in range(8):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_recipes() -> None:
    for recipe in (tiny_recipe(), MICRO, REHEARSAL):
        assert all(model.sequence_length <= model.context for model in recipe.models)
        assert all(set(model.mix) <= set(recipe.corpus.domains) for model in recipe.models)
    for recipe in (tiny_recipe(), MICRO):
        assert [model.name for model in recipe.models] == ["target", "coder", "reader", "teacher"]
        target, *sources, teacher = recipe.models
        for kind in ("architecture", "tokenizer", "vocabulary", "seed"):
            assert len({getattr(model, kind) for model in (target, *sources)}) == 3
        assert teacher.family == target and teacher.hidden > target.hidden
        for model in recipe.models:
            assert isinstance(model, TinyModel)
    with pytest.raises(UserError, match="no tiny model 'poet': choose one of target, coder, reader, teacher"):
        MICRO.model("poet")
    with pytest.raises(UserError, match="profile 'large': choose one of tiny, micro"):
        tiny_recipe("large")
