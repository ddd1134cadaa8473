"""Weight merging: what mergekit computes, what it is asked for, and what is refused before anything is loaded."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from baselines.fuse_then_merge import FuseThenMergeParameters, fuse_then_merge
from baselines.merge import MergeParameters, merge, run_mergekit, search_shares
from baselines.merge_checks import check_mergeable
from baselines.merge_methods import MergeMethod, register_sce
from baselines.method import Artifact, Candidate
from fusion.errors import UserError
from fusion.modeling.merging import mean_change, sce, varm_weights
from harness.models.checkpoints import load_model
from harness.models.resolution import ModelSpec, resolve
from tests.harness.tiny_models import save_model
from tests.shared import shared

KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "tied llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"num_key_value_heads": 1}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 8, "num_key_value_heads": 1}),
    "neox": (GPTNeoXConfig, {}),
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Of every architecture a base and two others like it."""
    folder = tmp_path_factory.mktemp("families")
    return {
        kind: {
            name: save_model(folder / kind / name, config, 300, seed, **settings)
            for seed, name in enumerate(["base", "a", "b"])
        }
        for kind, (config, settings) in KINDS.items()
    }


class _Context:
    """The context of a row, with two sources whose models are there."""

    seed = 3
    label = "Merged"
    sources = ("a", "b")
    validation_fingerprint = "text"

    def __init__(self, folders: Mapping[str, Path], root: Path, nll: Callable[[Path], float] | None = None) -> None:
        self.folders = folders
        self.root = root
        self.measured: list[str] = []
        self.trained: list[tuple[float, list[str]]] = []
        self.made: dict[str, Any] = {}
        self._nll = nll

    def model(self, role: str) -> Candidate:
        return Candidate(self.folders["base" if role == "target" else role], f"fingerprint of {role}", seeded=False)

    candidate = model

    def relabelled(self, label: str) -> "_Context":
        return self

    def train(self, *, lam: float, loss: Any, **given: Any) -> Candidate:
        """A source's own model in place of the target fused with it."""
        self.trained.append((lam, list(loss.sources)))
        return replace(self.model(*loss.sources), seeded=True)

    def validation_nll(self, candidate: Candidate, label: str = "") -> float:
        assert self._nll is not None
        self.measured.append(label)
        return self._nll(candidate.folder)

    def make(self, kind: str, build: Callable[[Path], Any], **identity: Any) -> Artifact:
        self.root.mkdir(exist_ok=True)
        self.made = {"kind": kind, **identity, "found": build(self.root)}
        return Artifact(self.root, "made")

    @contextmanager
    def progress(self, description: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        yield lambda amount: None


def _merged(families: dict[str, dict[str, Path]], kind: str, out: Path, **parameters: Any) -> dict[str, torch.Tensor]:
    context: Any = _Context(families[kind], out)
    candidate = merge(context, MergeParameters(**parameters))
    return load_file(candidate.folder / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_linear_and_task_arithmetic_are_their_formulas(
    families: dict[str, dict[str, Path]], kind: str, tmp_path: Path
) -> None:
    base, a, b = (load_file(families[kind][name] / "model.safetensors") for name in ("base", "a", "b"))
    linear = _merged(families, kind, tmp_path / "linear", weights=[1.0, 3.0])
    arithmetic = _merged(
        families, kind, tmp_path / "arithmetic", merge_method="task_arithmetic", weights=[1.0, 3.0], scale=1.5
    )
    assert linear.keys() == arithmetic.keys() == a.keys()
    for name in a:
        torch.testing.assert_close(linear[name], 0.25 * a[name] + 0.75 * b[name], rtol=0, atol=1e-6)
        change = 0.25 * (a[name] - base[name]) + 0.75 * (b[name] - base[name])
        torch.testing.assert_close(arithmetic[name], base[name] + 1.5 * change, rtol=0, atol=1e-6)
    assert (tmp_path / "linear/model/tokenizer.json").exists()


def test_a_merge_that_lacks_a_weight_is_refused(
    families: dict[str, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a definition mergekit leaves the head of a GPT-NeoX model out, and loading would make one up."""
    from mergekit.architecture.json_definitions import NAME_TO_ARCH

    monkeypatch.setattr("baselines.merge.define_gpt_neox", lambda: NAME_TO_ARCH.pop("GPTNeoXForCausalLM", None))
    with pytest.raises(UserError, match=r"1 missing keys, first lm_head.weight\): mergekit cannot"):
        _merged(families, "neox", tmp_path)


def test_slerp_goes_from_one_model_to_the_other(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    for weights, end in (([1.0, 0.0], "a"), ([0.0, 1.0], "b")):
        made = _merged(families, "llama", tmp_path / end, merge_method="slerp", weights=weights)
        for name, tensor in load_file(families["llama"][end] / "model.safetensors").items():
            torch.testing.assert_close(made[name], tensor, rtol=0, atol=1e-6)


def test_dare_draws_by_the_seed_and_ties_does_not(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    for algorithm, seeded in (("ties", False), ("dare_ties", True)):
        made = []
        for seed in (3, 4):
            context: Any = _Context(families["llama"], tmp_path / f"{algorithm}{seed}")
            context.seed = seed
            candidate = merge(context, MergeParameters(merge_method=algorithm))
            assert candidate.seeded == seeded and (context.made["params"]["seed"] == seed) == seeded
            made.append(load_file(candidate.folder / "model.safetensors")["model.norm.weight"])
            made.append(load_file(candidate.folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"])
        assert torch.equal(made[1], made[3]) != seeded


def test_a_mergekit_configuration_is_taken_as_it_is(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    written = tmp_path / "mine.yaml"
    written.write_text(
        "merge_method: linear\ndtype: float32\nmodels:\n"
        "  - {model: a, parameters: {weight: [{filter: mlp, value: 1.0}, {value: 0.0}]}}\n"
        "  - {model: b, parameters: {weight: [{filter: mlp, value: 0.0}, {value: 1.0}]}}\n"
    )
    made = _merged(families, "qwen2", tmp_path / "made", mergekit=str(written))
    a, b = (load_file(families["qwen2"][name] / "model.safetensors") for name in ("a", "b"))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, a[name] if "mlp" in name else b[name], rtol=0, atol=1e-6)


def test_how_the_donor_decodes_is_not_looked_at(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """Its file may hold what transformers refuses: only its control tokens count, where the model is loaded."""
    donor = Path(shutil.copytree(families["llama"]["a"], tmp_path / "a"))
    (donor / "generation_config.json").write_text('{"eos_token_id": 0, "num_return_sequences": 2}')
    halves = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
    folders = {"a": donor, "b": families["llama"]["b"]}
    run_mergekit({"merge_method": "linear", "dtype": "float32", "models": halves}, folders, tmp_path / "out")
    model = load_model(resolve(ModelSpec(name=str(tmp_path / "out")), tmp_path / "models"))
    assert model.generation_config and model.generation_config.eos_token_id == 0


def test_what_makes_a_merge_does_not_depend_on_names(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    context: Any = _Context(families["llama"], tmp_path)
    merge(context, MergeParameters())
    written = str(context.made["params"])
    assert "fingerprint of a" in written and "'a'" not in written and str(tmp_path) not in written


def test_tuned_weights_find_the_better_model(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """The loss falls towards b: its share grows, no trial is left behind, a second start measures nothing again."""
    target = load_file(families["llama"]["b"] / "model.safetensors")["lm_head.weight"]

    def nll(folder: Path) -> float:
        return float((load_file(folder / "model.safetensors")["lm_head.weight"] - target).norm())

    parameters = MergeParameters(weights="tuned", trials=6)
    context: Any = _Context(families["llama"], tmp_path / "made", nll)
    folder = merge(context, parameters).folder
    assert context.measured == [f"Merged, trial {i} of 6" for i in range(1, 7)]
    assert context.made["inputs"]["validation"] == "text" and context.made["validations"] == 6
    uniform = 0.5 * (load_file(families["llama"]["a"] / "model.safetensors")["lm_head.weight"] + target)
    assert nll(folder) < 0.5 * float((uniform - target).norm())
    assert "the best of 6 merges" in context.made["found"]["note"]
    assert not (tmp_path / "made" / "trial").exists()
    again: Any = _Context(families["llama"], tmp_path / "made", nll)
    merge(again, parameters)
    assert again.measured == []


def test_the_search_keeps_to_its_budget_and_to_shares(tmp_path: Path) -> None:
    best = np.array([0.7, 0.2, 0.1])
    tried = search_shares(lambda shares, n: float(np.abs(shares - best).sum()), 3, 40, tmp_path / "log")
    assert len(tried) <= 40 and tried[0][0] == pytest.approx([1 / 3] * 3)
    assert all(sum(shares) == pytest.approx(1) and min(shares) >= 0 for shares, _ in tried)
    np.testing.assert_allclose(min(tried, key=lambda one: one[1])[0], best, atol=0.05)


def oracle(name: str) -> Any:
    with gzip.open(shared(f"oracle/methods/{name}.json.gz"), "rt") as file:
        return json.load(file)


def _oracle_models() -> dict[str, dict[str, torch.Tensor]]:
    return {
        model: {name: torch.tensor(one["values"]).reshape(one["shape"]) for name, one in tensors.items()}
        for model, tensors in oracle("varm")["tensors"].items()
    }


def test_varm_is_that_of_fusechat() -> None:
    """Its code gives equal weights where one model did not change; by equation 7 that model has none."""
    models, compared = _oracle_models(), 0
    base = models["P"]
    granularity = {"avg_param": "matrix", "avg_module": "module", "avg_layer": "layer", "avg_model": "model"}
    for case in oracle("varm")["cases"]:
        if case["name"] != "one_file_a_target" or case["method"] not in granularity or case.get("use_sfmax"):
            continue
        if case["merge_type"] not in ("square", "abs"):  # signed changes cancel
            continue
        change: Any = "square" if case["merge_type"] == "square" else "absolute"
        targets = [models[name] for name in case["targets"]]
        changes = {name: [mean_change(target[name], base[name], change) for target in targets] for name in base}
        kind: Any = granularity[case["method"]]
        weights = varm_weights(changes, {name: tensor.numel() for name, tensor in base.items()}, kind)
        for name, tensor in base.items():
            if kind in ("matrix", "module") and 0 in weights[name]:
                continue
            merged = sum(w * target[name] for w, target in zip(weights[name], targets, strict=True))
            published = torch.tensor(case["merged_float32"][name]["values"]).reshape(tensor.shape)
            torch.testing.assert_close(merged, published, rtol=1e-5, atol=1e-7)
            compared += 1
    assert compared > 200
    assert varm_weights({"m": [0.5, 2.0, 0.0]}, {"m": 4}, "matrix") == {"m": [0.2, 0.8, 0.0]}  # by hand
    assert varm_weights({"m": [0.0, 0.0]}, {"m": 4}, "matrix") == {"m": [0.5, 0.5]}


@pytest.mark.parametrize(("definition", "published"), [("paper", False), ("fuseai", True)])
def test_sce_is_that_of_its_paper_and_of_its_code(definition: str, published: bool) -> None:
    models, found = _oracle_models(), oracle("sce")
    base = models["P"]
    for case in found["cases"]:
        factor = 1 / 512 if case["name"] == "small" else 1
        for name, tensor in base.items():
            changed = [tensor + factor * (models[one][name] - tensor) for one in case["targets"]]
            merged = sce(tensor, changed, select_topk=case["select_topk"], published=published)
            expected = torch.tensor(case[definition]["merged"][name]).reshape(tensor.shape)
            torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-7)
    for case in found["small_matrices"]:
        changes = [torch.tensor(case[name]) for name in ("delta_A", "delta_B")]
        merged = sce(torch.zeros(4), changes, select_topk=case["select_topk"], published=published)
        torch.testing.assert_close(merged, torch.tensor(case[definition]["merged_delta"]), rtol=1e-5, atol=1e-6)


def test_every_method_of_mergekit_merges_by_its_name(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    from mergekit.merge_methods.registry import registered_methods

    register_sce()
    names = get_args(MergeMethod)
    assert {method.spec.name for method in registered_methods()} == set(names) - {"varm"}
    given: dict[str, dict[str, Any]] = {
        "nearswap": {"models": ["a"], "parameters": {"t": 0.01}},
        "arcee_fusion": {"models": ["a"]},
        "passthrough": {"models": ["a"]},
        "della": {"parameters": {"epsilon": 0.1}},
        "della_linear": {"parameters": {"epsilon": 0.1}},
        "breadcrumbs": {"parameters": {"gamma": 0.1}},
        "breadcrumbs_ties": {"parameters": {"gamma": 0.1}},
    }
    folders = families["llama"]
    a, base = (load_file(folders[name] / "model.safetensors")["lm_head.weight"] for name in ("a", "base"))
    for name in names:
        made = _merged(families, "llama", tmp_path / name, merge_method=name, **given.get(name, {}))
        assert made["lm_head.weight"].isfinite().all() and not torch.equal(made["lm_head.weight"], base)
        assert torch.equal(made["lm_head.weight"], a) == (name == "passthrough")


def test_fused_targets_are_merged(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """With each source by itself, then as changes of the target."""
    base, a, b = (load_file(families["llama"][name] / "model.safetensors")["lm_head.weight"] for name in _NAMES)
    context: Any = _Context(families["llama"], tmp_path / "sce")
    candidate = fuse_then_merge(context, FuseThenMergeParameters())
    assert context.trained == [(0.9, ["a"]), (0.9, ["b"])] and candidate.seeded
    made = load_file(candidate.folder / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(made, sce(base, [a, b], select_topk=0.1, published=False))
    context = _Context(families["llama"], tmp_path / "linear")
    step: Any = {"merge_method": "linear", "weights": [3, 1]}
    candidate = fuse_then_merge(context, FuseThenMergeParameters(merge=step, sources=["a", "b"]))
    made = load_file(candidate.folder / "model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(made, 0.75 * a + 0.25 * b)


_NAMES = ("base", "a", "b")


@pytest.mark.parametrize("kind", ["llama", "neox", "tied llama"])
def test_varm_and_sce_through_mergekit(families: dict[str, dict[str, Path]], kind: str, tmp_path: Path) -> None:
    base, a, b = (load_file(families[kind][name] / "model.safetensors") for name in ("base", "a", "b"))
    varm = _merged(families, kind, tmp_path / "varm", merge_method="varm")
    paper = _merged(families, kind, tmp_path / "sce", merge_method="sce_paper", parameters={"select_topk": 0.3})
    for name, origin in base.items():
        x, y = (float((model[name] - origin).square().mean()) for model in (a, b))
        share = x / (x + y) if x + y else 0.5
        torch.testing.assert_close(varm[name], share * a[name] + (1 - share) * b[name], rtol=1e-5, atol=1e-6)
        expected = sce(origin, [a[name], b[name]], select_topk=0.3, published=False)
        torch.testing.assert_close(paper[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"merge_method": "varm", "weights": [1.0, 2.0]}, "Merged: varm takes no weights"),
        ({"merge_method": "sce", "weights": "tuned"}, "Merged: sce takes no weights"),
        ({"merge_method": "varm", "parameters": {"granularity": "matrices"}}, "granularity"),
        ({"merge_method": "ties", "models": ["a"], "weights": "tuned"}, "merges a alone: name more"),
        ({"weights": [1.0, -1.0]}, "do not sum to a positive number"),
        ({"weights": [1.0], "models": ["a", "b"]}, "weights has 1 numbers for 2 models"),
        ({"models": ["a", "a"]}, "names one twice"),
        ({"mergekit": {"merge_method": "linear"}, "scale": 2.0}, "says everything by itself: remove scale"),
        ({"mergekit": "nowhere.yaml"}, "nowhere.yaml cannot be read"),
        ({"merge_method": "ties", "weights": [1.0]}, "Merged has 1 weights for 2 models .a, b.: give one each"),
        ({"merge_method": "slerp", "models": ["base", "a", "b"]}, "merges two models with slerp and not 3"),
        ({"mergekit": {"merge_method": "lineal", "models": [{"model": "a"}]}}, "no merge_method 'lineal'.*'linear'"),
        ({"mergekit": {"merge_method": "linear", "models": "a"}}, "mergekit does not take its configuration: models"),
        ({"mergekit": {"merge_method": "slerp", "models": [{"model": "a"}]}}, "mergekit cannot merge a"),
    ],
)
def test_what_cannot_be_asked_for(
    families: dict[str, dict[str, Path]], tmp_path: Path, parameters: dict[str, Any], expected: str
) -> None:
    with pytest.raises((UserError, ValueError), match=expected):
        _merged(families, "llama", tmp_path, **parameters)


def test_other_shapes_and_tokenizers_are_refused(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    a = families["llama"]["a"]
    wide = save_model(tmp_path / "wide", LlamaConfig, 300, 0, hidden_size=24)
    with pytest.raises(UserError, match=r"row cannot merge a and wide, which differ in hidden_size \(16 and 24\)"):
        check_mergeable({"a": a, "wide": wide}, "row")
    with pytest.raises(UserError, match=r"a and neox, which differ in model_type \(llama and gpt_neox\)"):
        check_mergeable({"a": a, "neox": families["neox"]["a"]}, "row")
    strange = shutil.copytree(a, tmp_path / "strange")
    written = (strange / "tokenizer.json").read_text(encoding="utf-8")
    raw = json.loads(written)
    words = raw["model"]["vocab"]
    words["x"], words["y"] = words["y"], words["x"]
    (strange / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UserError, match=r"a and strange, whose tokenizers differ \(first in token \d+, '[xy]'\)"):
        check_mergeable({"a": a, "strange": strange}, "row")
    # Written by another version of the library, and read alike.
    (strange / "tokenizer.json").write_text(json.dumps(json.loads(written)), encoding="utf-8")
    check_mergeable({"a": a, "strange": strange}, "row")


def test_layers_can_be_stacked(families: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    stacked = {
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {"sources": [{"model": "b", "layer_range": [1, 2]}]},
        ],
    }
    run_mergekit(stacked, families["llama"], tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    b = load_file(families["llama"]["b"] / "model.safetensors")
    name = "mlp.up_proj.weight"
    assert torch.equal(made[f"model.layers.2.{name}"], b[f"model.layers.1.{name}"])
