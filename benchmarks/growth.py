"""How time and memory grow with a corpus: made-up text of ever more documents, from Parquet to the first batch.

`python -m benchmarks.growth --documents 10000 100000 1000000 --output docs/results/growth/README.md`
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support import machine
from fusion.vocabulary.token_bytes import Vocabulary
from harness.config.schema import CorpusConfig
from harness.data.passages import Passages, make_passages
from harness.data.sequences import PackedSequences, collate
from harness.data.tokens import Tokens
from harness.runtime.progress import notify
from harness.stages.tokenization import make_tokens, tokens_spec
from harness.stages.trainer.fusion_trainer import Order
from harness.store.artifacts import Spec, Store
from harness.store.files import write_atomically

SEQUENCE_LENGTH = 2048
PASSAGE_BYTES = 4096
_WORDS = 30_000
_VOCABULARY = 16_000
_BATCH = 4  # sequences of the first batch
_READ = 200  # sequences that the loader's rate is taken over
_MORE_MEMORY, _SECOND_START = 300e6, 60.0  # what may be needed at most, at a million documents


@dataclass(frozen=True)
class Stage:
    """What a stage took: seconds, and bytes of memory at its height (anonymous pages)."""

    name: str
    seconds: float
    memory: int
    note: str = ""


@contextmanager
def _peak_anonymous() -> Iterator[list[int]]:
    """A list whose one number is the largest memory of this process inside the block, without mapped files.

    The kernel drops pages of mapped files when it needs memory, so that they are not counted.
    """
    peak = [0]
    ended = threading.Event()

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)
            if ended.wait(0.02):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _measured(name: str, run: Callable[[], str | None]) -> Stage:
    with _peak_anonymous() as peak:
        started = time.perf_counter()
        note = run()
        seconds = time.perf_counter() - started
    return Stage(name, seconds, peak[0], note or "")


class _Words:
    """Made-up text: words of syllables, by Zipf's law."""

    def __init__(self) -> None:
        drawn = np.random.default_rng(0)
        syllables = [a + b for a in "bcdfghklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ou")]
        lengths = drawn.integers(1, 5, _WORDS)
        self._words = np.array(
            [" " + "".join(syllables[i] for i in drawn.integers(0, len(syllables), n)) for n in lengths], object
        )
        shares = 1 / (np.arange(_WORDS) + 2.7)
        self._until = np.cumsum(shares / shares.sum())
        self._mean = float(np.dot(shares / shares.sum(), [len(word) for word in self._words]))

    def documents(self, count: int, n_bytes: int, seed: int) -> list[str]:
        """Texts of about so many bytes each."""
        drawn = np.random.default_rng([1, seed])
        per_document = max(1, round(n_bytes / self._mean))
        chosen = np.searchsorted(self._until, drawn.random((count, per_document)), "right").clip(max=_WORDS - 1)
        return ["".join(words) + ".\n" for words in self._words[chosen]]


def make_corpus(path: Path, documents: int, n_bytes: int) -> None:
    """A Parquet file of made-up documents of about `n_bytes` each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words, schema = _Words(), pa.schema([("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for seed, start in enumerate(range(0, documents, 10_000)):
            texts = words.documents(min(10_000, documents - start), n_bytes, seed)
            writer.write_table(pa.table({"text": texts}, schema=schema))


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the same words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(_Words().documents(2000, 1000, 10**6), trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|end|>", eos_token="<|end|>").save_pretrained(folder)


def _tokenizer(root: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(root / "tokenizer", local_files_only=True)


def _passages(root: Path) -> tuple[Spec, Path]:
    config = CorpusConfig(path=str(root / "corpus.parquet"))
    return make_passages(Store(root / "artifacts"), config, PASSAGE_BYTES, None)


def _tokens(root: Path) -> tuple[Path, Path]:
    spec, passages = _passages(root)
    tokens = make_tokens(
        Store(root / "artifacts"),
        tokens_spec("made-up", spec, {"made": "up"}),
        passages,
        partial(_tokenizer, root),
        n_bytes=float((root / "corpus.parquet").stat().st_size),
    )
    return passages, tokens


def _sequences(passages: Path, tokens: Path, root: Path) -> PackedSequences:
    tokenizer = _tokenizer(root)
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    return PackedSequences(Passages(passages), Tokens(tokens), tokenizer, vocabulary, SEQUENCE_LENGTH)


def _passages_stage(root: Path) -> Stage:
    return _measured("passages", lambda: f"{len(Passages(_passages(root)[1])):,} passages")


def _tokens_stage(root: Path) -> Stage:
    def run() -> str:
        tokens = Tokens(_tokens(root)[1])
        return f"{tokens.counts.sum(dtype=np.int64):,} tokens"

    return _measured("tokens", run)


def _start_stages(root: Path) -> list[Stage]:
    """Of a start that finds passages and tokens made."""
    found: list[tuple[Path, Path]] = []
    sequences: list[PackedSequences] = []

    def construct() -> str:
        sequences.append(_sequences(*found[0], root))
        return f"{len(sequences[0]):,} sequences"

    def first_batch() -> None:
        order = iter(Order(len(sequences[0]), seed=0, multiple=_BATCH))
        collate([sequences[0][next(order)] for _ in range(_BATCH)])

    def read() -> str:
        order, started = iter(Order(len(sequences[0]), seed=1, multiple=1)), time.perf_counter()
        count = min(_READ, len(sequences[0]))
        for _ in range(count):
            collate([sequences[0][next(order)]])
        return f"{count / (time.perf_counter() - started):,.0f} sequences a second"

    return [
        _measured("second start: passages and tokens are found", lambda: found.append(_tokens(root))),
        _measured("training set", construct),
        _measured("first batch", first_batch),
        _measured("loader", read),
    ]


def measure(documents: int, n_bytes: int, folder: Path) -> list[Stage]:
    """What each stage takes of a corpus of so many documents; every line in a process of its own."""
    root = folder / str(documents)
    root.mkdir()
    make_corpus(root / "corpus.parquet", documents, n_bytes)
    make_tokenizer(root / "tokenizer")
    return [
        machine.in_fresh_process(_passages_stage, root),
        machine.in_fresh_process(_tokens_stage, root),
        *machine.in_fresh_process(_start_stages, root),
    ]


def page(measured: dict[int, list[Stage]], n_bytes: int, facts: Sequence[tuple[str, str]]) -> str:
    """The page as Markdown."""
    sizes = sorted(measured)
    lines = [
        "# Growth",
        "",
        f"Written by `python -m benchmarks.growth --documents {' '.join(map(str, sizes))} --bytes {n_bytes}`: made-up",
        f"text of about {n_bytes:,} bytes a document in one Parquet file, a byte-level tokenizer of {_VOCABULARY:,}",
        f"tokens, passages of at most {PASSAGE_BYTES:,} bytes, sequences of {SEQUENCE_LENGTH:,} tokens. Memory is the",
        "largest of the process without the pages of mapped files, which the kernel drops when it needs memory. The",
        "passages, the tokens and all of a second start are measured in a new process each; predictions, maps, the",
        "audit and tables are not measured.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {fact} |" for name, fact in facts),
        "",
        f"| stage | {' | '.join(f'{size:,} documents' for size in sizes)} |",
        f"| --- |{' ---: |' * len(sizes)}",
    ]
    for stages in zip(*(measured[size] for size in sizes), strict=True):
        cells = [f"{s.seconds:,.1f} s, {s.memory / 1e6:,.0f} MB{f', {s.note}' if s.note else ''}" for s in stages]
        lines.append(f"| {stages[0].name} | {' | '.join(cells)} |")
    lines += [""]
    for smaller, larger in pairwise(sizes):
        times = ", ".join(
            f"{one.name} {other.seconds / one.seconds:.1f}"
            for one, other in zip(measured[smaller], measured[larger], strict=True)
            if one.name in ("passages", "tokens", "training set")
        )
        lines.append(f"- From {smaller:,} to {larger:,} documents, {larger / smaller:g} times as many, times: {times}.")
    first, last = measured[sizes[0]], measured[sizes[-1]]
    more = max(other.memory - one.memory for one, other in zip(first, last, strict=True))
    start = sum(stage.seconds for stage in last[2:5])
    lines += [
        f"- At {sizes[-1]:,} documents a stage has at most {more / 1e6:,.0f} MB more than at {sizes[0]:,} "
        f"(allowed at a million: {_MORE_MEMORY / 1e6:,.0f}).",
        f"- A second start has its first batch after {start:.1f} s (allowed at a million: {_SECOND_START:.0f}).",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, and writes the page; exit status 1 where a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--documents", nargs="+", type=int, default=[10_000, 100_000, 1_000_000], help="sizes")
    parser.add_argument("--bytes", type=int, default=600, help="bytes of a document (default: 600)")
    parser.add_argument("--scratch", type=Path, help="folder for the corpora (default: the system's)")
    parser.add_argument("--output", type=Path, help="file for the page (default: standard output)")
    options = parser.parse_args(arguments)
    facts = machine.facts()
    measured: dict[int, list[Stage]] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        for documents in sorted(options.documents):
            notify(f"growth: {documents:,} documents")
            measured[documents] = measure(documents, options.bytes, Path(folder))
    text = page(measured, options.bytes, facts)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.output, text)
    else:
        print(text)
    first, last = (measured[size] for size in (min(measured), max(measured)))
    within = all(b.memory - a.memory <= _MORE_MEMORY for a, b in zip(first, last, strict=True))
    return 0 if within and sum(stage.seconds for stage in last[2:5]) <= _SECOND_START else 1


if __name__ == "__main__":
    sys.exit(main())
