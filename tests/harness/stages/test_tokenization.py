"""The tokens stage: several processes and kills give the same bytes, and nothing encodes the corpus again."""

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from harness.config.loading import load
from harness.data import tokens
from harness.data.passages import Passages
from harness.experiment import run
from harness.experiment.headroom import audit
from harness.experiment.pipeline import open_experiment, tokenise
from harness.stages import tokenization
from harness.store.artifacts import Store
from harness.store.cleanup import leftovers

# Encodes the corpus three passages at a time, and says before each part is written which it is, then waits.
SLOW_WORKER = """
import sys, time
from pathlib import Path
from harness.config.loading import load
from harness.data import tokens
from harness.experiment.pipeline import open_experiment, tokenise
from harness.stages import tokenization
tokens.PASSAGES_PER_PART = 3
write = tokens.write_part
def slowly(path, *rest):
    print(path.name, flush=True)
    time.sleep(float(sys.argv[1]))
    write(path, *rest)
tokenization.write_part = slowly
print(tokenise(open_experiment(load(sys.argv[2]), Path(sys.argv[3])), "neox"), flush=True)
"""


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture
def alone(experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tokens that one undisturbed process makes, three passages a part."""
    monkeypatch.setattr(tokens, "PASSAGES_PER_PART", 3)
    return tokenise(open_experiment(load(str(experiment_file)), tmp_path / "alone"), "neox")


def test_a_killed_stage_goes_on_with_the_same_bytes(
    alone: Path, experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    write = tokens.write_part

    def dying(path: Path, *rest: Any) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path.name)
        write(path, *rest)

    monkeypatch.setattr(tokenization, "write_part", dying)
    experiment = open_experiment(load(str(experiment_file)), tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        tokenise(experiment, "neox")
    begun = set(made)
    made.clear()
    made.append("")
    monkeypatch.setattr(tokenization, "write_part", lambda path, *rest: (made.append(path.name), write(path, *rest)))
    resumed = tokenise(experiment, "neox")
    assert len(begun) == 2 and not begun & set(made)
    assert files(resumed) == files(alone) and len(files(alone)) > 4
    assert sorted(path.name for path in resumed.iterdir()) == sorted(path.name for path in alone.iterdir())


@pytest.mark.slow
def test_two_processes_share_the_work_and_one_is_killed(alone: Path, experiment_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "shared"

    def start(pause: float) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", SLOW_WORKER, str(pause), str(experiment_file), str(root)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    count = len(files(alone)) - 1
    with start(600) as stuck:
        try:
            assert stuck.stdout is not None
            held = stuck.stdout.readline().strip()
            with start(0) as other:
                assert other.stdout is not None
                made = {other.stdout.readline().strip() for _ in range(count - 1)}
                assert held not in made and len(made) == count - 1
                stuck.send_signal(signal.SIGKILL)
                assert other.stdout.readline().strip() == held
                whole = Path(other.stdout.readline().strip())
        finally:
            stuck.kill()
    assert files(whole) == files(alone)
    assert not list(leftovers(Store(root / "artifacts")))


@pytest.mark.slow
def test_nothing_encodes_the_corpus_a_second_time(
    experiment_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extraction, checks, training, loader and audit read what is stored: each passage once for each tokenizer."""
    encoded: Counter[str] = Counter()
    backend_of = PreTrainedTokenizerFast.backend_tokenizer.fget
    assert backend_of is not None

    class Counting:
        def __init__(self, backend: Any) -> None:
            object.__setattr__(self, "backend", backend)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.backend, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.backend, name, value)

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            encoded.update(texts)
            return self.backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "backend_tokenizer", property(lambda own: Counting(backend_of(own))))
    config = load(str(experiment_file))
    config.methods = {name: entry for name, entry in config.methods.items() if name in ("CLM", "FuseLLM")}
    run.run(config, tmp_path)
    # The prefix check of an audit reads the beginning of a few passages.
    before = encoded.copy()
    audit(config, tmp_path)
    experiment = open_experiment(config, tmp_path)
    passages = Passages(experiment.corpora.passages[1])
    texts = {passages.text(passage) for passage in range(len(passages))}
    assert {before[text] for text in texts} == {2}
    assert sum((encoded - before)[text] for text in texts) <= 2 * 8
