"""Mistakes in a mergekit configuration are found in the plan, whether the models are there or not."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, LlamaConfig

from baselines.merge import run_mergekit
from baselines.merge_checks import check_mergeable, check_plan
from baselines.merge_configuration import check_configuration, models_of
from fusion.errors import UserError
from tests.harness.tiny_models import save_model

HALF = {"weight": 0.5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("models")
    return {
        "a": save_model(made / "a", LlamaConfig, 300, 0),
        "b": save_model(made / "b", LlamaConfig, 300, 1),
        "large": save_model(made / "large", LlamaConfig, 310, 1),
        "neox": save_model(made / "neox", GPTNeoXConfig, 300, 0),
    }


def models(method: str, a: Mapping[str, Any] = HALF, b: Mapping[str, Any] = HALF, **more: Any) -> dict[str, Any]:
    named = [{"model": name, "parameters": dict(parameters)} for name, parameters in (("a", a), ("b", b))]
    return {"merge_method": method, "dtype": "float32", "models": named, **more}


def slices(first: list[int], second: list[int]) -> dict[str, Any]:
    sources = [{"model": m, "layer_range": r, "parameters": HALF} for m, r in (("a", first), ("b", second))]
    return {"merge_method": "linear", "dtype": "float32", "slices": [{"sources": sources}]}


MISTAKES = {
    "no base": (models("ties"), "Merge method requires a base input"),
    "no weight": (models("linear", b={}), "Missing required parameter weight for b, model.embed_tokens.weight"),
    "no t": (models("slerp", {}, {}, base_model="a"), "Missing required parameter t"),
    "a weight that is no number": (
        models("linear", {"weight": "half"}),
        r"Input should be a valid number, .* \(it is 'half'\)",
    ),
    "weights that sum to 0": (models("linear", {"weight": -0.5}), "weights of the models sum to 0 for .*embed_tokens"),
    "weights that sum to 0 in a layer": (
        models("linear", {"weight": [1, -1]}, {"weight": [1, 1]}),
        "weights of the models sum to 0 for model.layers.1",
    ),
    "a misspelt parameter": (
        models("ties", {"weight": 1, "densty": 0.1}, base_model="a"),
        "ties has no parameter 'densty' .did you mean 'density'.",
    ),
    "a parameter of another method": (models("linear", parameters={"t": 0.5}), "linear has no parameter 't'"),
    "layers beyond the last": (slices([0, 2], [1, 3]), r"layer_range \[1, 3\] is none of b, which has 2 layers"),
    "layers before the first": (slices([-1, 1], [0, 2]), r"layer_range \[-1, 1\] is none of a"),
    "no layers": (slices([1, 1], [1, 1]), r"layer_range \[1, 1\] is none of a"),
    "other numbers of layers": (slices([0, 2], [0, 1]), "same number of layers"),
    "an unknown dtype": (models("linear", dtype="float33"), 'Unimplemented dtype "float33"'),
    "one model too many": (
        models("passthrough", {}, {}),
        "Merge method requires exactly 1 inputs",
    ),
}


@pytest.mark.parametrize("there", ["all", "a", "none"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_in_the_plan(mistake: str, there: str, folders: dict[str, Path]) -> None:
    configuration, said = MISTAKES[mistake]
    known: dict[str, Path | dict[str, Any]] = {"a": folders["a"], "b": folders["b"]}
    shapes = {n: known[n] if there in ("all", n) else {"num_hidden_layers": 2} for n in models_of(configuration)}
    with pytest.raises(UserError, match=f"^M: .*{said}") as refused:
        check_configuration(configuration, "M")
        check_plan(configuration, shapes, "M")
    assert str(folders["a"].parent) not in str(refused.value) and "pydantic" not in str(refused.value)


RIGHT = {
    "linear": models("linear"),
    "not divided by the sum": models("linear", {"weight": -0.5}, parameters={"normalize": False}),
    "ties": models("ties", {"weight": 1, "density": 0.5}, {}, base_model="b"),
    "slices": slices([0, 2], [0, 2]),
    "gradient": models("slerp", {}, {}, base_model="a", parameters={"t": [0, 1]}),
}


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("right", RIGHT)
def test_what_mergekit_takes_is_taken(right: str, there: bool, folders: dict[str, Path]) -> None:
    check_configuration(RIGHT[right], "M")
    check_plan(RIGHT[right], {name: folders[name] if there else {} for name in models_of(RIGHT[right])}, "M")


def test_gpt_neox_is_planned_too(folders: dict[str, Path]) -> None:
    configuration = {"merge_method": "linear", "models": [{"model": "neox", "parameters": HALF}]}
    check_plan(configuration, {"neox": folders["neox"]}, "M")


@pytest.mark.parametrize("source", ["union", "base", "large", {"source": "union"}])
def test_vocabularies_may_differ_where_mergekit_makes_the_tokenizer(
    source: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    key = "tokenizer" if isinstance(source, dict) else "tokenizer_source"
    named = [{"model": name, "parameters": HALF} for name in ("a", "large")]
    configuration = {"merge_method": "linear", "dtype": "float32", "models": named, "base_model": "a", key: source}
    shapes: dict[str, Any] = {name: folders[name] for name in ("a", "large")}
    with pytest.raises(UserError, match=r"differ in vocab_size \(300 and 310\)"):
        check_mergeable(shapes, "M")
    check_mergeable(shapes, "M", tokenizers=False)
    check_plan(configuration, shapes, "M")
    run_mergekit(configuration, folders, tmp_path / "out")
    rows = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    assert rows == {"base": 300, "large": 310}.get(str(source), 310)


def test_merged_weights_that_are_not_finite_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = load_file(folders["b"] / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    broken = save_model(tmp_path / "broken", LlamaConfig, 300, 1)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"weights that are not finite \(first model.norm.weight\)"):
        run_mergekit(models("linear"), {**folders, "b": broken}, tmp_path / "out")
