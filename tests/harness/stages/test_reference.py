"""The whole line, from text to the loss and every gradient, against a second, plain implementation of the method.

The store keeps log-probabilities in float16. What a model says is therefore compared with the reference's own float64
logits to half a unit of float16, and from there on the reference is given what was stored, so that everything after
(maps, alignment, fusion, packing, objective, accumulation, the Trainer's denominator) must agree to rounding.
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from harness.config.loading import load
from harness.config.schema import Config
from harness.data.passages import Passages
from harness.data.sequences import pack
from harness.experiment.pipeline import open_experiment, read_predictions
from tests.fusion.tokenizers_for_tests import byte_level, sentencepiece_bpe
from tests.harness import reference
from tests.harness.listening import rows_of, trained
from tests.harness.reference import ExpectedTargets, Read, Reader

pytestmark = pytest.mark.slow

DOCUMENTS = {
    "prose": "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox does not. The dog does not jump "
    "over the fox.",
    "code": "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))\n",
    # A literal "▁" is a space to SentencePiece: from there on its tokens do not spell the text.
    "signs": "猫は好きです。 Überall gibt es Käse, crème brûlée und 猫. 🙂🙃 Привет, мир! e\u0301 \x07 the fox ▁ the "
    "dog.",
}
K = 6
MARKS = {"level": ("Ġ", False), "passage": ("▁", True)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-NeoX with a byte-level tokenizer, a Llama with a dummy prefix, both with ids without a token; the text."""
    from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

    folder = tmp_path_factory.mktemp("models")
    made = [("level", byte_level(), GPTNeoXConfig), ("passage", sentencepiece_bpe(True), LlamaConfig)]
    for seed, (name, tokenizer, kind) in enumerate(made, 3):
        torch.manual_seed(seed)
        config = kind(
            vocab_size=len(tokenizer) + 3,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=256,
            initializer_range=0.25,  # wide, so that one model reads this passage better and the other that
            tie_word_embeddings=False,
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text").mkdir()
    for name, text in DOCUMENTS.items():
        (folder / "text" / f"{name}.txt").write_text(text, encoding="utf-8")
    (folder / "held-out.txt").write_text("The lazy fox.", encoding="utf-8")
    return folder


def experiment_of(models: Path, target: str, source: str, method: dict[str, Any]) -> Config:
    """One row, trained for one step over the whole text, a row of passages at a time."""
    raw = {
        "title": "the reference",
        "reference": "FuseLLM",
        "roles": {
            "target": {"model": str(models / target), "dtype": "float32"},
            "sources": {source: {"model": str(models / source), "dtype": "float32"}},
        },
        "methods": {"FuseLLM": {"method": "fusellm", **method}},
        "corpus": {"path": str(models / "text")},
        "passages": {"max_bytes": 60},
        "extraction": {"k": K, "passages_per_shard": 3},
        "training": {"sequence_length": 48, "global_batch_size": 64, "dtype": "float32"},
        "suites": {"perplexity": {"documents": {"path": str(models / "held-out.txt"), "split": "test"}, "window": 64}},
        "curve": {"per_domain": 0},
    }
    path = models / f"onto-{target}.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return load(str(path))


@cache
def reader(models: Path, role: str, name: str) -> Reader:
    return Reader.load(role, models / name, *MARKS[name])


def read(model: Reader, text: str, stored: Any) -> Read:
    """The model's predictions, which the stored ones must be, with the stored numbers."""
    tokens = model.tokens(text)
    assert stored.tokens.tolist() == tokens
    with torch.no_grad():
        log_q = model.log_q(tokens).numpy()
    assert stored.ids.shape == stored.log_p.shape == (len(tokens), K)
    assert all(len(set(row)) == K for row in stored.ids.tolist())
    top = -np.sort(-log_q, axis=1)[:, :K]
    np.testing.assert_allclose(np.take_along_axis(log_q, stored.ids, 1), top, atol=2e-5)
    np.testing.assert_allclose(stored.log_p, top, rtol=2**-11, atol=2e-5)
    nats = -log_q[np.arange(len(tokens) - 1), tokens[1:]]
    np.testing.assert_allclose(stored.nll, [*nats, 0], atol=2e-5)
    np.testing.assert_allclose(stored.tail, 1 - np.exp(top.astype(float)).sum(1), rtol=2**-11, atol=2e-5)
    return Read(tokens, stored.ids, stored.log_p.astype(float), stored.tail.astype(float), float(nats.sum()))


def assert_teaches(made: dict[str, np.ndarray], expected: list[ExpectedTargets]) -> None:
    """A row of the data loader, made dense, is what its passages are to teach."""
    p, tail, weight = (np.concatenate([getattr(t, name) for t in expected]) for name in ("p", "tail", "weight"))
    dense = np.zeros_like(p)
    at, column = np.nonzero(made["ids"] >= 0)
    dense[at, made["ids"][at, column]] = made["p"][at, column]
    np.testing.assert_array_equal(made["weight"], weight)
    np.testing.assert_allclose(dense[weight > 0], p[weight > 0], atol=1e-6)
    np.testing.assert_allclose(made["tail"][weight > 0], tail[weight > 0], atol=1e-6)


def what_happened(
    target: Reader,
    source: Reader,
    own: list[Read],
    theirs: list[Read],
    expected: dict[int, ExpectedTargets],
    image: dict[int, int],
) -> set[str]:
    """The rules that a case met; without them it would prove nothing about them."""
    met = set()
    for p, (ours, other) in enumerate(zip(own, theirs, strict=True)):
        partners = expected[p].partner
        if partners == list(range(len(partners))):
            met.add("the target's own")
            continue
        met.add("the source's")
        for i, j in enumerate(partners):
            if j < 0:
                met.add("unaligned")
                continue
            mapped = [image[k] for k in other.top_ids[j].tolist() if k in image]
            met.add("nothing left" if not mapped else "duplicates" if len(set(mapped)) < len(mapped) else "entries")
            mine, its = target.strings()[ours.tokens[i]] or "", source.strings()[other.tokens[j]] or ""
            if i == 1 and mine == target.mark + its:
                met.add("a mark added")
            elif i > 0 and mine != its.replace(source.mark, target.mark):
                met.add("mapped onto each other")
    return met


PUBLISHED = {"preset": "published"}
# Entry by entry: the projection along the text has a plain implementation of its own in the tests of `fusion`.
BY_ENTRY = {"map": "mined", "projection": "token", "inside": "none", "true_token": "top_k"}
CORRECTED = {"preset": "corrected", **BY_ENTRY}
CHOSEN = {"the target's own", "the source's", "entries", "unaligned"}
CASES = {
    "published": (PUBLISHED, CHOSEN | {"duplicates", "mapped onto each other"}),
    "published, em": (PUBLISHED | {"map": "em"}, CHOSEN | {"nothing left"}),
    "published, avgce": (PUBLISHED | {"fusion": "avgce", "lambda": 0.3}, {"duplicates", "unaligned"}),
    "corrected": (CORRECTED, CHOSEN),
    "corrected, em": (CORRECTED | {"map": "em"}, CHOSEN),
    "corrected, avgce": (CORRECTED | {"fusion": "avgce", "lambda": 0.3}, {"entries", "unaligned"}),
}


@pytest.mark.parametrize("names", [("passage", "level"), ("level", "passage")], ids=["onto-passages", "onto-bytes"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_the_plain_implementation(
    case: str, names: tuple[str, str], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, met = CASES[case]
    config = experiment_of(models, *names, {"lambda": 0.9, **method})
    experiment = open_experiment(config, models / f"onto-{names[0]}")
    rows = rows_of(experiment, monkeypatch)
    step, gradients = trained(experiment, monkeypatch)

    target, source = reader(models, "target", names[0]), reader(models, names[1], names[1])
    passages = Passages(experiment.corpora.passages[1])
    texts = [passages.text(p) for p in range(len(passages))]
    own, theirs = (
        [read(model, text, read_predictions(experiment, model.name).predictions(p)) for p, text in enumerate(texts)]
        for model in (target, source)
    )
    if method["preset"] == "published":
        map_of, fuse = reference.map_of_strings, reference.published_row
    else:
        map_of, fuse = reference.map_of_bytes, reference.corrected_row
    image = map_of(source, target, method.get("map", "mined"))
    expected: dict[int, ExpectedTargets] = {}
    members = [rows.members(i) for i in range(len(rows))]
    assert members == pack([len(r.tokens) for r in own], config.training.sequence_length)
    for i, row in enumerate(members):
        its_texts, ours, others = ([of[p] for p in row] for of in (texts, own, theirs))
        teaches = fuse(its_texts, target, source, ours, others, image, method.get("fusion", "mince"))
        assert_teaches(rows[i], teaches)
        expected |= dict(zip(row, teaches, strict=True))

    clm, fusion, count = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for p, ours in enumerate(own):
        after = int(target.tokenizer.eos_token_id) if passages.last[p] else None
        terms = reference.loss(target, ours.tokens, after, expected[p])
        clm, fusion, count = clm + terms[0], fusion + terms[1], count + terms[2]
    lam = config.methods["FuseLLM"]["lambda"]
    target.model.zero_grad()
    ((lam * clm + (1 - lam) * fusion) / count).backward()

    assert step["tokens"] == count
    assert step["clm_nats_per_token"] == pytest.approx(float(clm.detach()) / count, rel=1e-5)
    assert step["fusion_nats_per_token"] == pytest.approx(float(fusion.detach()) / count, rel=1e-5)
    assert gradients.keys() == dict(target.model.named_parameters()).keys()
    for name, parameter in target.model.named_parameters():
        assert parameter.grad is not None
        assert float((gradients[name] - parameter.grad).norm()) <= 1e-4 * float(parameter.grad.norm()), name

    happened = what_happened(target, source, own, theirs, expected, image)
    assert happened >= met
    if case == "published, avgce":  # all passages take part in it, the first of a document too
        assert ("a mark added" in happened) == (names == ("passage", "level"))
