"""What a stored thing is made of, as one table: every file of a model's folder, every setting, every input.

A line names one change and the artifacts that it makes anew; all others must keep their fingerprints. `measured:ROW` is
what the suites store of a row, `run` the folder of the run alone. What is not listed here is not tested: the last test
fails for a setting that no line changes.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import BaseModel

from baselines import ensemble
from fusion.vocabulary.maps import MAPS
from harness.config.loading import load
from harness.config.schema import Config, CurveConfig, ExtractionConfig, PassagesConfig, RoleConfig, TrainingConfig
from harness.data import passages
from harness.evaluation import perplexity
from harness.evaluation.lm_eval import task_suite
from harness.evaluation.lm_eval.suites import BbhConfig
from harness.evaluation.multipl_e import code_suite
from harness.evaluation.multipl_e import execute as executing
from harness.evaluation.multipl_e.code_suite import MultiplEConfig
from harness.evaluation.perplexity import PerplexityConfig
from harness.experiment.identity import run_fingerprint
from harness.experiment.pipeline import open_experiment
from harness.experiment.plan import plan_stages
from harness.stages import extraction, tokenization, training, vocabulary_maps
from tests.harness.suite_rows import make_data_root

SUITES = ("perplexity", "bbh", "multipl_e_samples", "multipl_e")
TARGET, SOURCE, BOTH = "llama", "neox", "Both"
TRAINED = "train curve measured:CLM measured:FuseLLM"
FUSED = "train:FuseLLM curve:FuseLLM measured:FuseLLM"
OF_SOURCE = f"predictions:neox measured:neox measured:Both {FUSED}"
OF_TARGET = f"predictions:llama measured:llama measured:Both {TRAINED}"
ALL_TEXT = f"passages tokens predictions {TRAINED}"
PERPLEXITY = "perplexity curve"
BBH, SAMPLES = "bbh", "multipl_e_samples multipl_e"

SETTINGS: dict[str, str] = {
    # Who and where.
    "experiment=other": "run",
    "title=other": "run",
    "banner=other": "run",
    "reference=FuseLLM": "run",
    "profiles=[own, other]": "run",
    "device=cpu": "",
    "threads=1": "",
    "seeds=[1]": TRAINED,
    "data.root=DATA": "",
    # Models.
    "roles.target.dtype=bfloat16": f"predictions:llama answered:llama answered:Both answered:CLM {FUSED}",
    "roles.target.batch_tokens=100": "",
    "roles.target.attn_implementation=eager": OF_TARGET,
    "roles.target.trust_remote_code=true": "run",
    "roles.sources.neox.dtype=bfloat16": OF_SOURCE.replace(
        "measured:neox measured:Both", "answered:neox answered:Both"
    ),
    "roles.sources.neox.batch_tokens=100": "",
    "roles.sources.neox.attn_implementation=eager": OF_SOURCE,
    "roles.target.prefix=eos": f"predictions:llama perplexity:llama measured:Both {TRAINED}",
    "roles.sources.neox.prefix=eos": f"predictions:neox perplexity:neox measured:Both {FUSED}",
    # Texts.
    "corpus.first_bytes=300": ALL_TEXT,
    "corpus.expected_bytes=5000": "run",
    "passages.max_bytes=100": ALL_TEXT,
    "validation.path=TEXT": "run",
    # Predictions.
    "extraction.k=3": f"predictions {FUSED}",
    "extraction.passages_per_shard=8": f"predictions {FUSED}",
    "extraction.store_dtype=float32": f"predictions {FUSED}",
    "extraction.temperatures=[2.0]": f"predictions {FUSED}",
    "extraction.compression=none": "",
    "extraction.max_skipped_fraction=0.5": "",
    # Training.
    "training.sequence_length=100": TRAINED,
    "training.global_batch_size=4": TRAINED,
    "training.micro_batch_size=2": "",
    "training.learning_rate=0.1": TRAINED,
    "training.betas=[0.8, 0.9]": TRAINED,
    "training.weight_decay=0.2": TRAINED,
    "training.gradient_clip=2.0": TRAINED,
    "training.warmup_ratio=0.1": TRAINED,
    "training.schedule=linear": TRAINED,
    "training.epochs=2": TRAINED,
    "training.dtype=bfloat16": TRAINED,
    "training.gradient_checkpointing=true": "",
    "training.save_every=7": "",
    "training.workers=1": "",
    "training.timeout_minutes=5": "",
    "training.deepspeed=zero2": "",
    "training.fsdp2=true": "",
    "curve.points=3": "curve",
    "curve.per_domain=2": "curve",
    # Rows.
    "methods.FuseLLM.lambda=0.7": FUSED,
    "methods.FuseLLM.preset=published": f"map {FUSED}",
    "methods.FuseLLM.fusion=avgce": FUSED,
    "methods.FuseLLM.training.epochs=2": FUSED,
    "methods.FuseLLM.training.global_batch_size=2": "run",  # the experiment's
    "methods.FuseLLM.warm_start=CLM": FUSED,
    "methods.FuseLLM.balance=rescale": FUSED,
    "methods.Both.map=em": "measured:Both",
    "methods.Both.pivot=neox": "measured:Both",
    "methods.Both.weights=[0.5, 0.25]": "measured:Both",
    # Suites.
    "suites.perplexity.dtype=bfloat16": PERPLEXITY,
    "suites.perplexity.window=32": PERPLEXITY,
    "suites.perplexity.mode=strided": PERPLEXITY,
    "suites.perplexity.documents.first_bytes=200": PERPLEXITY,
    "suites.bbh.limit=2": BBH,
    "suites.bbh.overflow=skip": BBH,
    "suites.bbh.limit_by=seed": "run",  # without a limit all rows are taken
    "suites.bbh.tasks=[navigate]": BBH,
    "suites.bbh.num_fewshot=1": BBH,
    "suites.bbh.max_new_tokens=7": BBH,
    "suites.bbh.variant=cot_zeroshot": BBH,
    "suites.bbh.seed=3": BBH,
    "suites.bbh.batch_size=2": "",
    "suites.multipl_e.limit=2": SAMPLES,
    "suites.multipl_e.limit_by=seed": "run",
    "suites.multipl_e.max_execution_seconds=9": "run",
    "suites.multipl_e.samples=3": SAMPLES,
    "suites.multipl_e.greedy=true": SAMPLES,
    "suites.multipl_e.max_new_tokens=7": SAMPLES,
    "suites.multipl_e.seed=3": SAMPLES,
    "suites.multipl_e.k=2": "run",
    "suites.multipl_e.overflow=truncate_left": SAMPLES,
    "suites.multipl_e.batch_size=2": "",
    "suites.multipl_e.sandbox=false": "multipl_e",
}
# Those that no line can change by itself, and why.
UNTOUCHED = {
    "profile": "is part of what the layers are",
    "roles.target.model": "a model is its files, below",
    "roles.target.revision": "a model is its files, below",
    "roles.target.corpus": "makes another role of it, in the tests of continued models",
    "suites.perplexity.stride": "only in mode strided",
    "training.select": "needs validation text, in a test of its own",
    "suites.multipl_e.tasks": "there are problems of one language only",
    "suites.multipl_e.execute": "leaves artifacts out, and changes none",
}
FILES = {
    "config.json": True,
    "generation_config.json": True,
    "tokenizer.json": True,
    "tokenizer_config.json": True,
    "special_tokens_map.json": True,
    "added_tokens.json": True,
    "model.safetensors": True,
    "README.md": False,
    "LICENSE": False,
    "chat_template.jinja": False,
    "vocab.json": False,
    "modeling_own.py": False,  # which is not run
}

VOCABULARY = ("tokenizer", "special_tokens_map", "added_tokens")  # of what the map depends on, too


@pytest.fixture(scope="module")
def inputs(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, texts, rows, and the file of an experiment that has every kind of artifact."""
    folder = tmp_path_factory.mktemp("inputs")
    for name in (TARGET, SOURCE, "train", "test"):
        shutil.copytree(made / name, folder / name)
    make_data_root(folder / "rows", 3)
    raw = {
        "title": "keys",
        "reference": "CLM",
        "data": {"root": str(folder / "rows")},
        "roles": {
            "target": {"model": str(folder / TARGET), "dtype": "float32"},
            "sources": {SOURCE: {"model": str(folder / SOURCE), "dtype": "float32"}},
        },
        "methods": {
            TARGET: {"method": "as_is"},
            SOURCE: {"method": "as_is", "role": SOURCE},
            "CLM": {"method": "clm"},
            "FuseLLM": {"method": "fusellm"},
            BOTH: {"method": "ensemble", "models": ["target", SOURCE]},
        },
        "corpus": {"path": str(folder / "train"), "first_bytes": 500},
        "passages": {"max_bytes": 120},
        "extraction": {"k": 5, "passages_per_shard": 4},
        "training": {"sequence_length": 200, "global_batch_size": 2, "dtype": "float32"},
        "suites": {
            "perplexity": {"documents": {"path": str(folder / "test"), "first_bytes": 300}, "window": 64},
            "bbh": {"tasks": ["boolean_expressions"], "variant": "zeroshot"},
            "multipl_e": {"tasks": ["python"], "samples": 2},
        },
        "curve": {"per_domain": 3, "points": 2},
    }
    (folder / "keys.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def toolchains(monkeypatch: pytest.MonkeyPatch) -> None:
    """No toolchain is looked for."""
    monkeypatch.setattr(executing, "verdict_keys", _toolchains_of_version(1))


def _toolchains_of_version(version: int) -> Callable[..., Mapping[str, str]]:
    return lambda names, *, unsafe: {name: f"{name} {version}{' unsafe' if unsafe else ''}" for name in names}


def keys(folder: Path, *settings: str) -> dict[str, str]:
    """The fingerprint of every artifact of the experiment, by KIND:ROW, and that of the run under `run`."""
    config = load(str(folder / "keys.yaml"), overrides=settings)
    experiment = open_experiment(config, folder / "root", dry=True)
    fingerprints = {"run": run_fingerprint(experiment)}
    for planned in plan_stages(experiment):
        spec = planned.spec
        row = next((row for row in config.methods if spec.label.startswith(row)), "")
        name = spec.kind if spec.kind in ("passages", "map") else f"{spec.kind}:{row}"
        assert name not in fingerprints, f"two artifacts are called {name}"
        fingerprints[name] = spec.fingerprint
    return fingerprints


@pytest.fixture(scope="module")
def before(inputs: Path) -> dict[str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executing, "verdict_keys", _toolchains_of_version(1))
        return keys(inputs)


def names(expected: str, known: Mapping[str, str]) -> set[str]:
    """The names of artifacts that a line of the table stands for."""
    found: set[str] = set()
    for word in expected.split():
        kind, _, row = word.partition(":")
        kinds = {"measured": SUITES, "answered": SUITES[1:]}.get(kind, (kind,))  # perplexity has a precision of its own
        found |= {name for name in known if name.partition(":")[0] in kinds and row in ("", name.partition(":")[2])}
    return found


def check(before: Mapping[str, str], after: Mapping[str, str], expected: str, *, run: bool = True) -> None:
    assert {name for name in before.keys() & after.keys() if before[name] != after[name]} == names(
        f"{expected} run" if expected and run else expected, before
    )


@pytest.mark.parametrize(("setting", "expected"), SETTINGS.items(), ids=SETTINGS)
def test_settings(inputs: Path, before: dict[str, str], setting: str, expected: str, tmp_path: Path) -> None:
    if "DATA" in setting:
        setting = setting.replace("DATA", str(shutil.copytree(inputs / "rows", tmp_path / "elsewhere")))
    setting = setting.replace("TEXT", str(inputs / "train"))
    check(before, keys(inputs, setting), expected, run=not setting.startswith("seeds"))


@pytest.fixture
def restored(inputs: Path) -> Iterator[Path]:
    """The inputs, as they were when the test is over."""
    kept = inputs.with_name("kept")
    shutil.copytree(inputs, kept)
    yield inputs
    shutil.rmtree(inputs)
    kept.rename(inputs)


def change(path: Path) -> None:
    """Other bytes that mean nothing else, where the file is one that is read."""
    if path.suffix == ".json":
        value = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(value, indent=7))
    elif path.suffix == ".safetensors":
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    else:
        path.write_text("other")


@pytest.mark.parametrize(("file", "counts"), FILES.items(), ids=FILES)
@pytest.mark.parametrize(("model", "expected"), [(TARGET, OF_TARGET), (SOURCE, OF_SOURCE)], ids=[TARGET, SOURCE])
def test_files_of_a_model(
    restored: Path, before: dict[str, str], model: str, expected: str, file: str, counts: bool
) -> None:
    change(restored / model / file)
    if file.startswith(VOCABULARY):
        expected += f" map tokens:{model}"
    check(before, keys(restored), expected if counts else "")


def test_a_vocabulary_without_some_of_its_rows(restored: Path, before: dict[str, str]) -> None:
    """The map holds an entry for every row of the embedding, and the configuration says how many there are."""
    path = restored / SOURCE / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 1}))
    check(before, keys(restored), f"{OF_SOURCE} map")


def test_code_counts_where_it_is_run(restored: Path) -> None:
    trusted = keys(restored, "roles.target.trust_remote_code=true")
    change(restored / TARGET / "modeling_own.py")
    check(trusted, keys(restored, "roles.target.trust_remote_code=true"), OF_TARGET)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("train/000.txt", ALL_TEXT),
        ("test/000.txt", PERPLEXITY),
        ("test/023.txt", "perplexity"),  # not among those of the curve
        ("rows/SaylorTwift/bbh/boolean_expressions/test.parquet", BBH),
        ("rows/SaylorTwift/bbh/navigate/test.jsonl", ""),
        ("rows/openai/openai_humaneval/openai_humaneval/test.parquet", SAMPLES),
    ],
)
def test_inputs(restored: Path, before: dict[str, str], path: str, expected: str) -> None:
    changed = restored / path
    if changed.suffix == ".parquet":
        pq.write_table(pq.read_table(changed), changed, compression="none")
    else:
        changed.write_text(changed.read_text() + " more\n")
    check(before, keys(restored), expected)


VERSIONS: list[tuple[Any, str, str]] = [
    (passages, "VERSION", ALL_TEXT),
    (tokenization, "VERSION", "tokens"),
    (extraction, "VERSION", f"predictions {FUSED}"),
    (vocabulary_maps, "VERSION", f"map {FUSED}"),
    (training, "VERSION", TRAINED),
    (training, "CURVE_VERSION", "curve"),
    (perplexity, "VERSION", PERPLEXITY),
    (task_suite, "VERSION", BBH),
    (code_suite, "VERSION", SAMPLES),
    (ensemble, "VERSION", "measured:Both"),
]


@pytest.mark.parametrize(
    ("module", "name", "expected"), VERSIONS, ids=[f"{m.__name__}.{name}" for m, name, _ in VERSIONS]
)
def test_versions_of_stages(
    inputs: Path, before: dict[str, str], monkeypatch: pytest.MonkeyPatch, module: Any, name: str, expected: str
) -> None:
    monkeypatch.setattr(module, name, 99)
    after = keys(inputs)
    check({**before, "run": ""}, {**after, "run": ""}, expected, run=False)


def test_versions_of_registered_parts(inputs: Path, before: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, expected in (("first_piece", f"map measured:Both {FUSED}"), ("mined", "")):
        with monkeypatch.context() as patch:
            patch.setitem(MAPS._parts, name, replace(MAPS.part(name), version=99))
            check({**before, "run": ""}, {**keys(inputs), "run": ""}, expected, run=False)


def test_the_micro_batch_counts_where_a_ratio_is_taken_over_it(inputs: Path) -> None:
    rescaled = keys(inputs, "methods.FuseLLM.balance=rescale")
    check(rescaled, keys(inputs, "methods.FuseLLM.balance=rescale", "training.micro_batch_size=2"), FUSED)


def test_validation_text_counts_where_it_chooses_the_checkpoint(inputs: Path) -> None:
    text = f"validation.path={inputs / 'train'}"
    last, best = keys(inputs, text), keys(inputs, text, "training.select=best")
    check(last, best, TRAINED)
    check(best, keys(inputs, text, "training.select=best", "validation.first_bytes=300"), TRAINED)
    check(best, keys(inputs, text, "training.select=best", "curve.points=3"), TRAINED)
    check(last, keys(inputs, text, "validation.first_bytes=300"), "run", run=False)


def test_toolchains(inputs: Path, before: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executing, "verdict_keys", _toolchains_of_version(2))
    check(before, keys(inputs), "multipl_e")


def test_every_setting_is_in_the_table() -> None:
    sections: dict[str, type[BaseModel]] = {
        "passages": PassagesConfig,
        "extraction": ExtractionConfig,
        "training": TrainingConfig,
        "curve": CurveConfig,
        "roles.target": RoleConfig,
        "suites.perplexity": PerplexityConfig,
        "suites.bbh": BbhConfig,
        "suites.multipl_e": MultiplEConfig,
    }
    every = set(Config.model_fields)
    every |= {f"{section}.{name}" for section, model in sections.items() for name in model.model_fields}
    changed = {setting.partition("=")[0] for setting in SETTINGS} | UNTOUCHED.keys()
    untested = {name for name in every if not any(f"{path}.".startswith(f"{name}.") for path in changed)}
    assert not untested
