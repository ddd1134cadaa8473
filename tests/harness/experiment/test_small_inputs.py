"""Small inputs that fail: mistakes are found before the first stage that costs, and a sentence names the remedy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig

from fusion.errors import UserError
from harness.config.loading import load
from harness.config.schema import CorpusConfig
from harness.data.corpus import documents
from harness.experiment import run
from harness.experiment.plan import plan
from results.records import read
from tests.harness.command import answer, sentence
from tests.harness.tiny_models import save_model


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment that trains for a second."""
    folder = tmp_path_factory.mktemp("small")
    for seed, name in enumerate(("train", "test")):
        (folder / name).mkdir()
        for i in range(4):
            (folder / name / f"{i}.txt").write_text(f"the quick {['fox', 'dog'][seed]} {i} jumps\n" * 3)
    save_model(folder / "a", LlamaConfig, 300, 0)
    save_model(folder / "b", LlamaConfig, 300, 1)
    save_model(folder / "large", LlamaConfig, 304, 1)
    return {
        "title": "small",
        "reference": "CLM",
        "device": "cpu",
        "roles": {
            "target": {"model": str(folder / "a"), "dtype": "float32"},
            "sources": {"b": {"model": str(folder / "b"), "dtype": "float32"}},
        },
        "methods": {"CLM": {"method": "clm"}},
        "corpus": {"path": str(folder / "train")},
        "training": {"sequence_length": 250, "global_batch_size": 2, "dtype": "float32"},
        "suites": {"perplexity": {"documents": {"path": str(folder / "test")}, "window": 64}},
        "curve": {"per_domain": 0},
        "seeds": [0],
    }


def _written(raw: dict[str, Any], folder: Path, **changes: Any) -> Path:
    path = folder / "e.yaml"
    path.write_text(yaml.safe_dump({**raw, **changes}), encoding="utf-8")
    return path


# Rows of data.


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            '{"text": "the dog", "n": ' + "9" * 5000 + "}",
            "line 3 is not JSON in UTF-8 (it has a number of too many digits)",
        ),
        (
            '{"text": "the dog", "n": ' + "[" * 100_000 + "]" * 100_000 + "}",
            "line 3 is not JSON in UTF-8 (it is nested too",
        ),
        (
            '{"text": "the dog", "n": -' + "1" * 4301 + "}",
            "line 3 is not JSON in UTF-8 (it has a number of too many digits)",
        ),
        ('{"text": "the dog" "n": 1}', "line 3 is not JSON in UTF-8 (Expecting ',' delimiter at character 20)"),
        ("\0\0\0\0", "line 3 is not JSON in UTF-8"),
        ('["the dog"]', "line 3 has no 'text'"),
        ('{"text": {"body": "the dog"}}', "has no text"),
        ('{"text": "\\ud83d"}', "is not valid Unicode"),
        ('{"text": 7}', "has no text"),
    ],
)
def test_a_row_is_read_or_named(row: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "the quick fox"}}\n\n{row}\n', encoding="utf-8")
    with pytest.raises(UserError) as refused:
        list(documents(CorpusConfig(path=str(path)), None))
    assert reason in str(refused.value) and path.name in str(refused.value)


@pytest.mark.parametrize(
    "row", ['{"text": "the dog", "n": 1e400}', '{"text": "the dog\\u0000", "n": NaN}', '{"text": "\\ud83d\\ude42"}', ""]
)
def test_odd_rows_that_are_read(row: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f'{{"text": "the quick fox"}}\r\n{row}\n \n'.encode())
    assert len(list(documents(CorpusConfig(path=str(path)), None))) == (2 if row else 1)


@pytest.mark.parametrize(("text", "size"), [("猫 sleeps", 2), ("🙂", 3), ("é", 1), ("\u0301x", 1)])
def test_documents_of_which_nothing_is_left_are_refused_before_the_training(
    text: str, size: int, small: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.txt").write_text(text, encoding="utf-8")
    asked = {"perplexity": {"documents": {"path": str(tmp_path / "test"), "first_bytes": size}, "window": 64}}
    command = ["experiment", "run", str(_written(small, tmp_path, suites=asked)), "--root", str(tmp_path / "root")]
    status, _, said = answer(*command)
    assert status == 2 and "Document '1.txt' of " in sentence(said)
    assert sentence(said).endswith(f"has no whole character in its first {size} bytes: raise first_bytes.")
    assert not list(tmp_path.glob("root/artifacts/train/*"))
    assert len(list(documents(CorpusConfig(path=str(tmp_path / "test"), first_bytes=size + 2), None))) == 1


# Merges.


def _merge(method: str, folder: Path, other: str = "b", **more: Any) -> dict[str, Any]:
    named = [{"model": name, "parameters": {"weight": 0.5}} for name in ("target", other)]
    path = folder / "m.yaml"
    path.write_text(yaml.safe_dump({"merge_method": method, "dtype": "float32", "models": named, **more}))
    return {"method": "merge", "mergekit": str(path)}


@pytest.mark.slow
def test_a_mistake_of_a_later_row_is_said_before_the_first_is_trained(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"CLM": {"method": "clm"}, "M": _merge("ties", tmp_path)}
    config = load(str(_written(small, tmp_path, methods=methods)))
    reason = "M: mergekit cannot merge target, b: Merge method requires a base input"
    with pytest.raises(UserError, match=reason):
        plan(config, tmp_path / "root")
    said: list[str] = []
    monkeypatch.setattr(run, "notify", lambda text: said.append(f"{text} {list(tmp_path.glob('root/**/train'))}"))
    with pytest.raises(UserError, match=reason):
        run.run(config, tmp_path / "root")
    assert reason in said[0] and said[0].endswith("The other rows are made. []")


@pytest.mark.slow
def test_the_union_of_two_vocabularies_is_a_row(small: dict[str, Any], tmp_path: Path) -> None:
    sources = {"large": {"model": str(Path(small["roles"]["target"]["model"]).parent / "large"), "dtype": "float32"}}
    methods = {
        "T": {"method": "as_is", "role": "target"},
        "M": _merge("linear", tmp_path, "large", tokenizer_source="union"),
    }
    roles = {**small["roles"], "sources": sources}
    config = load(str(_written(small, tmp_path, methods=methods, roles=roles, reference="T")))
    folder = run.run(config, tmp_path / "root")
    assert set(read(folder / "records")["method"]) == {"T", "M"}
    (merged,) = tmp_path.glob("root/artifacts/merge/M*/model/config.json")
    assert json.loads(merged.read_text())["vocab_size"] == 304


# Names of rows.


@pytest.mark.slow
def test_a_row_has_any_name(small: dict[str, Any], tmp_path: Path) -> None:
    """Also one that is longer than a file's name may be, and two that are one when hyphens stand for odd characters."""
    names = ["猫" * 200, "T+1", "T/1", "../up", "=1|<b>", "."]
    methods = {name: {"method": "as_is", "role": "target"} for name in names} | {"long " * 60: {"method": "clm"}}
    config = load(str(_written(small, tmp_path, methods=methods, reference="T+1")))
    folder = run.run(config, tmp_path / "root")
    assert set(read(folder / "records")["method"]) == set(methods)
    assert not list(tmp_path.glob("up*"))


# Paths, caches, launchers and terminals.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ro[ot]", "a:b", "100%25", "é 猫", "#1 ?*", "x::y"])
def test_a_root_of_any_name(name: str, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed, said = answer(
        "experiment", "run", str(_written(small, tmp_path)), "--root", name, "--format", "md"
    )
    assert status == 0, said
    assert answer("tables", "e", "--root", name, "--format", "md") == (0, printed, "")
    assert answer("report", "e", "--root", name)[0] == 0
    assert answer("artifact", "gc", "--root", name)[1].startswith("Nothing to remove")


def test_a_path_that_is_not_utf8_is_read_or_named(small: dict[str, Any], tmp_path: Path) -> None:
    root = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    status, _, said = answer("experiment", "run", str(_written(small, tmp_path)), "--root", root)
    assert status == 0 or "caf" in sentence(said)


@pytest.fixture(scope="module")
def finished(small: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    methods = {"CLM": {"method": "clm"}, "Größe 猫": {"method": "as_is", "role": "target"}}
    run.run(load(str(_written(small, folder, methods=methods))), folder)
    return folder


ENVIRONMENTS: dict[str, dict[str, str]] = {
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "cp437": {"PYTHONIOENCODING": "cp437"},
    "no locale": {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "unknown locale": {"LC_ALL": "xx_YY.nothing"},
    "no terminal": {"TERM": "dumb", "COLUMNS": "30"},
    "odd columns": {"COLUMNS": "many", "LINES": "-1"},
    "no folder for temporary files": {"TMPDIR": "/nowhere"},
    "no home": {"HOME": "/nowhere"},
    "caches that cannot be": {"HF_HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "MPLCONFIGDIR": "/proc/none"},
}


@pytest.mark.slow
@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_a_table_is_printed_in_any_environment(environment: str, finished: Path) -> None:
    command = [sys.executable, "-m", "harness", "tables", "e", "--root", str(finished)]
    done = subprocess.run(command, capture_output=True, env={**os.environ, **ENVIRONMENTS[environment]})
    assert done.returncode == 0, done.stderr
    assert b"CLM" in done.stdout and b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "2", "0"])
def test_a_closed_stream_loses_nothing_else(closed: str, finished: Path) -> None:
    command = f'"{sys.executable}" -m harness tables e --root "{finished}" --format md {closed}>&-'
    done = subprocess.run(["bash", "-c", command], capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (b"CLM" in done.stdout) is (closed != "1")
