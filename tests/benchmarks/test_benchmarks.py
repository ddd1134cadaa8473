"""The benchmarks run, and what they measure agrees with the plain re-implementations that they are held against."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import GPTNeoXConfig, LlamaConfig

from benchmarks import ensembles
from benchmarks.__main__ import NAMES, main
from benchmarks.support.page import Result, page
from tests.harness.tiny_models import save_model, sentences
from tests.shared import shared

pytestmark = pytest.mark.slow


def test_the_driver_runs_every_benchmark(
    experiment_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.md"
    # Each compares with its plain re-implementation, and raises where the two disagree.
    arguments = ["--quick", "--shared", str(shared("oracle").parent), "--experiment", str(experiment_file)]
    assert main([*arguments, "--root", str(tmp_path), "--output", str(output)]) == 0
    assert capsys.readouterr().err.count("benchmark: ") == len(NAMES)
    lines = [line for line in output.read_text(encoding="utf-8").splitlines() if line.count(" | ") == 6][2:]
    assert len(lines) == 22


def test_models_that_are_not_there_are_left_out_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--quick", "--shared", str(shared("oracle").parent), "--root", str(tmp_path)]
    assert main([*arguments, "--only", "training"]) == 0
    assert "- Left out: training: The model SmolLM2-135M-Instruct is not in" in capsys.readouterr().out
    assert main(["--shared", str(tmp_path)]) == 2
    assert "holds no folder oracle" in capsys.readouterr().err


def test_the_page_says_what_was_missed() -> None:
    results = [
        Result("faster", "ms", 20.0, 25.0, reference=6000.0, roofline=1.0),
        Result("rate", "tokens/s", 0.5, 1.0, "more", reference=0.25),
        Result("no goal", "s", 3.0),
    ]
    assert [r.times() for r in results] == [300, 2, None]
    lines = page(results, [], [("processor", "one")], quick=False).splitlines()
    assert "| faster | ms | ≤ 25 | 20 | 6,000 | 300 | 1 |" in lines
    assert "| rate | tokens/s | ≥ 1 | **0.5, missed** | 0.25 | 2 | – |" in lines
    assert "| no goal | s | – | 3 | – | – | – |" in lines


def test_ensembles_are_compared_on_texts_of_every_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pivot = save_model(tmp_path / "pivot", LlamaConfig, 330, 0, 4, max_position_embeddings=512)
    member = save_model(tmp_path / "member", GPTNeoXConfig, 400, 1, 4, max_position_embeddings=512)
    corpus = tmp_path / "corpora/mixed/default/test.parquet"
    corpus.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": sentences(6), "source": ensembles.DOMAINS * 2}), corpus)
    arguments = ["--pivot", str(pivot), "--member", str(member), "--root", str(tmp_path), "--dtype", "float32"]
    arguments += ["--data-root", str(tmp_path), "--texts", "3", "--bytes", "40", "--overlaps", "2"]
    assert ensembles.main(arguments) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert lines[0].endswith(" nats a byte | wiki | code | news | s |")
    assert lines[7] == "| likelier than token by token | wiki, of 1 | code, of 1 | news, of 1 |"
    assert len({tuple(line.split(" | ")[1:4]) for line in lines[2:7]}) == 5
    assert len(lines) == 7 + 2 + 4
    assert ensembles.main([*arguments, "--member", "Qwen2.5-Coder-0.5B-Instruct"]) == 2
    assert capsys.readouterr().err.startswith("benchmarks: The model Qwen2.5-Coder-0.5B-Instruct is not in")
