import io
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion.errors import UserError
from harness.models import manifest, reproduction
from harness.models.checkpoints import load_model, load_tokenizer
from harness.models.convert import convert
from harness.models.manifest import read_model_manifest
from harness.models.reproduction import SAMPLE_TEXTS
from harness.models.resolution import ModelSpec, resolve
from harness.store.fingerprint import fingerprint
from tests.harness.models.test_checkpoints import make_llama

IDS = torch.tensor([[0, 40, 41, 42, 260, 261, 7]])


def logits_of(folder: Path, models_dir: Path, dtype: Any = "float32") -> torch.Tensor:
    with torch.no_grad():
        return load_model(resolve(ModelSpec(name=str(folder)), models_dir), dtype)(IDS).logits


def make_pickle(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama's folder with its weights as a pickle."""
    make_llama(folder)
    state = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def make_gguf(
    path: Path,
    folder: Path,
    *,
    split: str = "smollm",
    tensors: dict[str, np.ndarray] | None = None,
    add_bos: bool | None = None,
) -> Path:
    """The Llama in `folder` as a GGUF file, written by llama.cpp's own library."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    for name, weight in load_file(folder / "model.safetensors").items():
        parts = name.split(".")
        block = f"blk.{parts[2]}." if parts[1] == "layers" else ""
        value = weight.numpy()
        if parts[-2] in ("q_proj", "k_proj"):  # llama.cpp pairs neighbouring rows for its rotary positions
            heads = config["num_attention_heads" if parts[-2] == "q_proj" else "num_key_value_heads"]
            value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(f"{block}{names[parts[-2]]}.weight", np.ascontiguousarray(value))
    for name, value in (tensors or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "tiny")


def test_gguf_gives_the_logits_and_tokens_of_the_original(llama: Path, tmp_path: Path) -> None:
    file = make_gguf(tmp_path / "tiny.gguf", llama)
    with pytest.raises(UserError, match=r"fusellm model convert .*tiny\.gguf"):
        resolve(ModelSpec(name=str(file)), tmp_path / "models")
    out = convert(file, tmp_path / "models" / "tiny")
    torch.testing.assert_close(logits_of(out, tmp_path), logits_of(llama, tmp_path), rtol=1e-6, atol=1e-6)
    assert read_model_manifest(out)["source"]["kind"] == "gguf"
    resolved = resolve(ModelSpec(name=str(file)), tmp_path / "models")
    assert resolved.folder == out
    tokenizer = load_tokenizer(resolved)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    # "smollm" splits digits off before merging, which decides where the space before a digit goes.
    passages = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("at  12")
    assert [passage for passage, _ in passages] == ["at", "ĠĠ", "1", "2"]
    from transformers import AutoTokenizer

    plain = AutoTokenizer.from_pretrained(out, local_files_only=True)
    assert all(plain(text)["input_ids"] == tokenizer(text)["input_ids"] for text in SAMPLE_TEXTS)


def test_a_conversion_of_another_version_is_refused_with_the_remedy(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_gguf(tmp_path / "tiny.gguf", llama)
    out = convert(file, tmp_path / "models" / "tiny")
    sentence = f"{re.escape(str(out))} was converted by another version .*: delete that folder and .* convert the model"

    def refused() -> None:
        with pytest.raises(UserError, match=sentence):
            resolve(ModelSpec(name=str(file)), tmp_path / "models")
        with pytest.raises(UserError, match=sentence):
            resolve(ModelSpec(name=str(out)), tmp_path / "models")
        with pytest.raises(UserError, match=sentence):
            convert(file, out)

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "CONVERTER", manifest.CONVERTER + 1)
        refused()
    assert resolve(ModelSpec(name=str(file)), tmp_path / "models").folder == out
    # One that says nothing of its converter is older than all that do.
    written = read_model_manifest(out)
    del written["converter"]
    (out / manifest.MANIFEST).write_text(json.dumps(written))
    refused()


CONVERTED = {3: "374b594159cc1089a78622b6d70546eccaa055f5ab0a73c8ccb88fe1435127cf"}
"""By version of the converter a hash of what it makes of four small models."""


def test_another_conversion_has_another_version(llama: Path, tmp_path: Path) -> None:
    """Where this fails, models that are converted by now differ from those of the same files from now on: raise
    CONVERTER, so that they are refused, and put the new hash beside it.
    """
    decodes = Path(shutil.copytree(llama, tmp_path / "decodes"))
    (decodes / "generation_config.json").write_text('{"eos_token_id": [1, 5], "pad_token_id": 7, "temperature": 0.5}')
    slow = make_pickle(tmp_path / "slow", torch.float16)
    make_slow(slow, normalization_rule_name="identity", remove_extra_whitespaces=False)
    makes = []
    for number, original in enumerate(
        (make_gguf(tmp_path / "a.gguf", llama), make_gguf(tmp_path / "b.gguf", llama, add_bos=False), decodes, slow)
    ):
        out = convert(original, tmp_path / f"out{number}")
        config, decoding = (json.loads((out / f"{name}.json").read_text()) for name in ("config", "generation_config"))
        tokenizer = load_tokenizer(resolve(ModelSpec(name=str(out)), tmp_path))
        makes.append(
            [
                {key: value for key, value in decoding.items() if key != "transformers_version"},
                {key: config[key] for key in ("vocab_size", "hidden_size", "tie_word_embeddings", "dtype")},
                [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id],
                [tokenizer(text)["input_ids"] for text in SAMPLE_TEXTS],
                [tokenizer.decode(tokenizer(text)["input_ids"]) for text in SAMPLE_TEXTS],
                sorted(file.name for file in out.iterdir()),
            ]
        )
    assert {manifest.CONVERTER: fingerprint(makes)} == CONVERTED


def test_weights_that_fit_in_16_bits_are_stored_so(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(llama, tmp_path / "rounded"))
    weights = {name: value.bfloat16().float() for name, value in load_file(llama / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    out = convert(make_gguf(tmp_path / "rounded.gguf", folder), tmp_path / "out")
    assert {value.dtype for value in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    torch.testing.assert_close(logits_of(out, tmp_path), logits_of(folder, tmp_path), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("add_bos", "bos"), [(None, 0), (True, 0), (False, None)])
def test_a_bos_that_the_model_is_never_given_is_none(
    llama: Path, tmp_path: Path, add_bos: bool | None, bos: int | None
) -> None:
    out = convert(make_gguf(tmp_path / "tiny.gguf", llama, add_bos=add_bos), tmp_path / "out")
    tokenizer = load_tokenizer(resolve(ModelSpec(name=str(out)), tmp_path / "models"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (bos, 1)


def test_gguf_that_would_not_come_out_exact_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'some-new-way' way"):
        convert(make_gguf(tmp_path / "a.gguf", llama, split="some-new-way"), tmp_path / "a")
    scaled = make_gguf(tmp_path / "b.gguf", llama, tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(UserError, match="rope_freqs"):
        convert(scaled, tmp_path / "b")
    (tmp_path / "c.gguf").write_bytes(b"GGUF and then nothing of the kind")
    with pytest.raises(UserError, match=r"c\.gguf cannot be read"):
        convert(tmp_path / "c.gguf", tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_of_how_a_model_decodes_only_control_tokens_are_kept(file: str, llama: Path, tmp_path: Path) -> None:
    """transformers neither loads nor saves some combinations of the other settings."""
    folder = Path(shutil.copytree(llama, tmp_path / "m"))
    settings = {"eos_token_id": [1, 5], "num_return_sequences": 2, "temperature": 0.5}
    if file == "config.json":
        (folder / "generation_config.json").unlink()
        settings = json.loads((folder / file).read_text()) | settings
    (folder / file).write_text(json.dumps(settings))
    out = convert(folder, tmp_path / "out")
    written = json.loads((out / "generation_config.json").read_text())
    assert written["eos_token_id"] == [1, 5]
    assert not {"num_return_sequences", "temperature"} & set(written)
    load_model(resolve(ModelSpec(name=str(out)), tmp_path)).save_pretrained(tmp_path / "trained")
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(UserError, match=r"m/generation_config\.json has eos_token_id = 'x'"):
        convert(folder, tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pickle_keeps_its_weights_and_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_pickle(tmp_path / "pickle", dtype)  # config.json says float32 in both cases
    original = torch.load(folder / "pytorch_model.bin", weights_only=True)
    with pytest.raises(UserError, match="fusellm model convert"):
        resolve(ModelSpec(name=str(folder)), tmp_path)
    said: list[str] = []
    out = convert(folder, tmp_path / "out", licence="MIT", notify=said.append)
    written = load_file(out / "model.safetensors")
    assert set(written) == set(original)
    assert all(torch.equal(written[name], original[name]) and written[name].dtype == dtype for name in original)
    assert read_model_manifest(out)["licence"] == "MIT"
    assert convert(folder, tmp_path / "out", notify=said.append) == out
    assert "there already" in said[-1]


class Evil:
    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.touched),)


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path: Path) -> None:
    folder = make_pickle(tmp_path / "pickle")
    torch.save({"a": Evil(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="not executed"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_a_pickle_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    folder = make_pickle(tmp_path / "pickle")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    del state["model.layers.0.mlp.up_proj.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="missing keys"):
        convert(folder, tmp_path / "out")


def test_another_model_is_not_written_over(tmp_path: Path) -> None:
    folder = make_pickle(tmp_path / "pickle")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="something else"):
        convert(folder, tmp_path / "out")
    with pytest.raises(UserError, match="neither"):
        convert(tmp_path / "nothing", tmp_path / "other")


def make_slow(folder: Path, **options: Any) -> None:
    """Replaces the tokenizer of a folder by a SentencePiece one of 290 passages."""
    from sentencepiece import SentencePieceTrainer

    text = ["the cat  sat on the mat", "and the dog sat on the log", " in 1984 it was so", "  the end  "] * 20
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=written,
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        **options,
    )
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))


def test_a_slow_tokenizer_becomes_a_fast_one_that_splits_alike(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = make_pickle(tmp_path / "pickle")
    make_slow(folder, normalization_rule_name="identity", remove_extra_whitespaces=False)
    out = convert(folder, tmp_path / "out")
    slow = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = load_tokenizer(resolve(ModelSpec(name=str(out)), tmp_path))
    for text in (*SAMPLE_TEXTS, "the cat  sat", "   ", "\n the end"):
        assert fast(text, add_special_tokens=False)["input_ids"] == slow.encode(text)
    assert (fast.bos_token_id, fast.eos_token_id) == (1, 2)


def test_a_slow_tokenizer_that_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    folder = make_pickle(tmp_path / "pickle")
    make_slow(folder, normalization_rule_name="nmt_nfkc")  # folds characters and spaces, which the fast one would not
    with pytest.raises(UserError, match="otherwise than the slow one"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make_pickle(tmp_path / "pickle")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        convert(folder, tmp_path / "out")
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"only vocab\.json"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "weight"),
    [
        (float("nan"), "model.norm.weight"),
        (float("inf"), "model.embed_tokens.weight"),
        (-float("inf"), "model.layers.0.mlp.up_proj.weight"),
    ],
)
@pytest.mark.parametrize("form", ["pickle", "gguf"])
def test_weights_that_are_not_finite_are_refused_by_name(form: str, value: float, weight: str, tmp_path: Path) -> None:
    """Those of a training that diverged, for instance; all of a weight or a single number of it."""
    folder = make_pickle(tmp_path / "source")
    state = torch.load(folder / "pytorch_model.bin")
    state[weight].view(-1)[-1] = value
    torch.save(state, folder / "pytorch_model.bin")
    path = folder
    if form == "gguf":
        save_file(state, folder / "model.safetensors")
        path = make_gguf(tmp_path / "tiny.gguf", folder)
    with pytest.raises(UserError) as refused:
        convert(path, tmp_path / "out")
    assert str(refused.value) == f"{path} has weights that are not finite (first {weight}): it was not converted."
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda logits: logits + 1,
            r"its logits differ by up to 1, where \d\S+ is allowed, in [\d,]+ of [\d,]+ numbers",
        ),
        (
            lambda logits: logits * float("nan"),
            r"0 of the original's and [\d,]+ of the converted model's are not finite",
        ),
    ],
)
@pytest.mark.parametrize("times", [1, 2])
def test_a_conversion_that_fails_its_check_is_tried_once_more(
    times: int, change: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_pickle(tmp_path / "source")
    calls, told = 0, []
    compute = reproduction._logits

    def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        of_model = compute(model, ids)
        return change(of_model) if calls in (2, 4)[:times] else of_model  # of the model that was loaded again

    monkeypatch.setattr(reproduction, "_logits", logits)
    if times == 1:
        out = convert(folder, tmp_path / "out", notify=told.append)
        assert re.search(said, told[1]) and told[1].endswith("converting once more ...")
        torch.testing.assert_close(logits_of(out, tmp_path), logits_of(convert(folder, tmp_path / "b"), tmp_path))
        assert not list(tmp_path.glob("*.difference"))
        return
    with pytest.raises(UserError, match=said) as refused:
        convert(folder, tmp_path / "out", notify=told.append)
    kept = tmp_path / "out.difference"
    assert str(kept) in str(refused.value) and "run the same command again" in str(refused.value)
    assert load_file(kept / "logits.safetensors").keys() == {"ids", "expected", "found"}
    assert "torch" in json.loads((kept / "difference.json").read_text())["libraries"]
    assert not (tmp_path / "out").exists() and (folder / "pytorch_model.bin").exists()
