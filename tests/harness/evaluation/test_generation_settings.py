"""How an answer is generated is the suite's to say: of a model's generation_config.json only the end tokens count."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from transformers import LlamaConfig

from fusion.errors import UserError
from harness.evaluation import shared_prefix_lm
from harness.evaluation.evaluated_model import EvaluatedModel
from harness.evaluation.shared_prefix_lm import SharedPrefixLM
from harness.evaluation.suite import SUITES, read_lines, suite_config
from harness.models.checkpoints import load_model
from harness.models.resolution import GENERATION_FILE, ModelSpec, resolve
from harness.store.artifacts import Store
from harness.store.costs import Costs
from tests.harness.suite_rows import make_data_root
from tests.harness.tiny_models import save_model, sentences

PROMPT = sentences(1, 3)[0]
NEW = 20
GREEDY = {"until": ["\0"], "max_gen_toks": NEW, "do_sample": False}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("plain") / "m", LlamaConfig, 300, 1, 6, max_position_embeddings=8192)


def with_settings(plain: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the model whose generation_config.json has these settings."""
    shutil.copytree(plain, folder)
    (folder / GENERATION_FILE).write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0, **settings}))
    return folder


def evaluated(folder: Path) -> EvaluatedModel:
    spec = ModelSpec(name=str(folder), dtype="float32")
    fingerprint = resolve(spec, folder.parent / "models").fingerprint
    return EvaluatedModel("m", fingerprint, spec, "float32", "cpu", 2048, 1e4, folder.parent / "models")


def answer(lm: SharedPrefixLM, **settings: Any) -> str:
    (text,) = lm.generate_until([Instance("generate_until", {}, (PROMPT, {**GREEDY, **settings}), 0)])
    return text


ODD: list[dict[str, Any]] = [
    {"repetition_penalty": 5.0, "num_beams": 3, "stop_strings": ["the"]},
    {"no_repeat_ngram_size": 1},
    {"num_return_sequences": 2},
    {"num_return_sequences": 2, "do_sample": True},
    {"do_sample": True, "temperature": 9.0, "top_k": 5, "min_p": 0.2},
    {"prompt_lookup_num_tokens": 3},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"min_new_tokens": NEW, "suppress_tokens": [5, 6, 7], "forced_eos_token_id": 9},
    {"max_length": 3, "max_time": 0.0},
    {"guidance_scale": 3.0},
    {"watermarking_config": {"bias": 20.0}},
    {"cache_implementation": "static", "return_dict_in_generate": True, "output_scores": True},
]


@pytest.mark.parametrize("shares", [True, False], ids=["shared prefixes", "HFLM"])
def test_no_setting_of_the_checkpoint_changes_an_answer(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    if not shares:

        def refuse(model: Any) -> None:
            raise shared_prefix_lm.UnsupportedModel("it is a test")

        monkeypatch.setattr(shared_prefix_lm, "PrefixCachedModel", refuse)
    first = evaluated(plain)
    expected, fingerprints = answer(first.lm(batch_size=1, seed=0)), {first.fingerprint}
    odd = ODD if shares else ODD[:2]
    for number, settings in enumerate(odd):
        other = evaluated(with_settings(plain, tmp_path / str(number), **settings))
        assert answer(other.lm(batch_size=1, seed=0)) == expected, settings
        fingerprints.add(other.fingerprint)
    assert len(fingerprints) == len(odd) + 1


def test_settings_in_an_old_config_change_no_answer(plain: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(plain, tmp_path / "old"))
    (old / GENERATION_FILE).unlink()
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps({**config, "repetition_penalty": 5.0}))
    assert answer(evaluated(old).lm(batch_size=1, seed=0)) == answer(evaluated(plain).lm(batch_size=1, seed=0))


def test_what_the_task_asks_for_counts(plain: Path, tmp_path: Path) -> None:
    lm = evaluated(with_settings(plain, tmp_path / "m", repetition_penalty=5.0)).lm(batch_size=1, seed=0)
    assert answer(lm, repetition_penalty=3.0) != answer(lm)


def test_the_end_tokens_of_the_checkpoint_end_an_answer(plain: Path, tmp_path: Path) -> None:
    model = evaluated(plain)
    whole = answer(model.lm(batch_size=1, seed=0))
    prompt = model.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    tokens = model.model.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :].tolist()
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    other = evaluated(with_settings(plain, tmp_path / "m", eos_token_id=[0, end])).lm(batch_size=1, seed=0)
    assert other.end_tokens == [0, end]
    cut = answer(other)
    assert whole.startswith(cut) and 0 < len(cut) < len(whole)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [('{"eos_token_id": "x"}', "eos_token_id = 'x', which is no token id"), ("{broken", "is no JSON object")],
)
def test_a_generation_config_that_does_not_hold_is_named(plain: Path, tmp_path: Path, text: str, sentence: str) -> None:
    folder = with_settings(plain, tmp_path / "m")
    (folder / GENERATION_FILE).write_text(text)
    with pytest.raises(UserError, match=f"generation_config.json .*{sentence}"):
        load_model(resolve(ModelSpec(name=str(folder)), tmp_path / "models"))


def test_the_settings_stand_beside_the_answers(plain: Path, tmp_path: Path) -> None:
    section = {"tasks": ["boolean_expressions"], "variant": "zeroshot", "max_new_tokens": 4, "limit": 2}
    suite = SUITES.get("bbh")(suite_config("bbh", section), make_data_root(tmp_path / "data"))
    result = suite.measure(evaluated(plain), Store(tmp_path / "artifacts"), Costs("cpu"))
    lines = read_lines(result.artifacts["boolean_expressions"] / "examples.jsonl")
    assert len(lines) == 2
    for line in lines:
        settings = line["generation"]
        assert settings["max_gen_toks"] == 4 and settings["do_sample"] is False and settings["end_tokens"] == [0]
