"""What projection along the text keeps: the probability of the true next token after it, and of the same bytes before.

Before it, the source's full distributions give the bytes of the target's next token a probability by the chain rule
over the source's own tokens; after it, there are its k stored entries and what else an extraction stores.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.ensembles import Model
from fusion.alignment.fuse import Source, fuse_sequence
from fusion.alignment.path import text_ends
from fusion.errors import UserError
from fusion.switches import Switches
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import byte_ends
from harness.config.schema import CorpusConfig
from harness.data.corpus import documents
from harness.runtime.progress import notify


class FullReader:
    """A model that gives its distributions of a text in full, beside what an extraction with k entries stores."""

    def __init__(self, model: Model, k: int) -> None:
        from fusion.inference.top_k import BytePrefixes

        self.model, self.k, self.prefixes = model, k, BytePrefixes(model.vocabulary)

    def read(self, text: str) -> tuple[Predictions, np.ndarray]:
        """The stored predictions, and log-probabilities float64[M, V] of all tokens."""
        import torch

        from fusion.inference.top_k import predict_top_k, reader
        from fusion.vocabulary.tokenization import prefix_id

        tokens = [prefix_id(self.model.tokenizer), *self.model.encode(text)]
        ends = np.append(0, byte_ends(tokens[1:], self.model.vocabulary, text.encode()))
        backbone, project = reader(self.model.network)
        (stored,) = predict_top_k(
            backbone, project, [tokens], k=self.k, device=torch.device("cpu"), prefixes=self.prefixes
        )
        predictions = Predictions(
            np.array(tokens, np.int32),
            ends.astype(np.int32),
            stored.ids,
            stored.log_p.astype(np.float16).astype(np.float32),
            stored.tail,
            stored.nll,
            stored.prefix_nll,
        )
        with torch.inference_mode():
            logits = project(backbone(torch.tensor([tokens]))[0]).double()
            return predictions, torch.log_softmax(logits, -1).numpy()

    def begins(self, log_p: np.ndarray, beginning: bytes) -> float:
        """Log-probability of all tokens that begin so, of log_p[V]."""
        start, end = self.prefixes.range_of(beginning)
        return float(np.logaddexp.reduce(log_p[self.prefixes.order[start:end].numpy()]))


def chain_rule(source: FullReader, log_p: np.ndarray, ends: np.ndarray, nats: np.ndarray, text: bytes) -> Any:
    """A function of (j, start, end): the log-probability of text[start:end] where the source has read j tokens."""

    def of(j: int, start: int, end: int) -> float:
        total = -source.begins(log_p[j], text[ends[j] : start]) if start > ends[j] else 0.0
        while ends[j] < end:
            if j + 1 >= len(ends) or ends[j + 1] < 0:
                return np.nan
            total += -nats[j] if ends[j + 1] <= end else source.begins(log_p[j], text[ends[j] : end])
            j += 1
        return total

    return of


def compared(target: Model, source: FullReader, source_of: Source, text: str) -> Iterator[tuple[str, float, float]]:
    """For each aligned position: whether it is paired or inside a source token, nats before and after projection."""
    from fusion.vocabulary.tokenization import prefix_id

    tokens = np.array([prefix_id(target.tokenizer), *target.encode(text)], np.int32)
    own = Predictions.empty(
        tokens, np.append(0, byte_ends(tokens[1:], target.vocabulary, text.encode())).astype(np.int32), source.k
    )
    stored, log_p = source.read(text)
    fused = fuse_sequence(
        [{"target": own, source_of.name: stored}],
        [len(text.encode())],
        target="target",
        sources=[source_of],
        target_vocabulary=target.vocabulary,
        switches=Switches(include_target=False),
    )
    # Both count the space that some tokenizers write before a text.
    ends = text_ends(stored, source.model.vocabulary)
    target_ends = text_ends(
        Predictions(tokens, own.byte_ends, own.ids, own.log_p, own.tail, own.nll), target.vocabulary
    )
    before = chain_rule(source, log_p, ends, stored.nll, b" " + text.encode())
    p = np.where(fused.targets.ids == fused.gold[:, None], fused.targets.p, 0).sum(axis=1)
    for i in np.flatnonzero((fused.partner[0] >= 0) & (fused.gold >= 0)):
        nats = -before(int(fused.partner[0, i]), int(target_ends[i]), int(target_ends[i + 1]))
        if np.isfinite(nats):
            yield "inside" if fused.inside[0, i] else "paired", nats, -float(np.log(max(p[i], 1e-30)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a Markdown table; exit status 1 where a domain of 200 positions or more loses over 0.02 nats."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.projection", description=__doc__)
    parser.add_argument("--target", default="SmolLM2-135M-Instruct")
    parser.add_argument("--sources", nargs="+", default=["Gemma-3-270M", "Qwen2.5-Coder-0.5B-Instruct"])
    parser.add_argument("--root", type=Path, default=Path("work"), help="folder that holds models/")
    parser.add_argument("--data-root", type=Path, default=Path("../shared/data/hub"))
    parser.add_argument("--texts", type=int, default=2, help="validation documents of each domain")
    parser.add_argument("--bytes", type=int, default=700, help="how much of each text is read")
    parser.add_argument("--k", type=int, default=10, help="stored entries a position")
    options = parser.parse_args(arguments)
    from fusion.vocabulary.pieces import build_piece_map
    from fusion.vocabulary.tokenization import encode_all

    config = CorpusConfig(
        path="corpora/mixed",
        split="validation",
        domain_column="source",
        per_domain=options.texts,
        first_bytes=options.bytes,
    )
    rows = []
    try:
        given = list(documents(config, options.data_root))
        target = Model(options.target, options.root, "float32")
        for name in options.sources:
            notify(name)
            reader = FullReader(Model(name, options.root, "float32"), options.k)
            vocabulary = reader.model.vocabulary
            nothing = np.full(len(vocabulary.tokens), -1, np.int32)
            encode = partial(encode_all, target.tokenizer)
            pieces = build_piece_map("first_piece", nothing, vocabulary, target.vocabulary, encode)
            source = Source(name, vocabulary, nothing, pieces)
            rows += [
                (name, document.domain, *position)
                for document in given
                for position in compared(target, reader, source, document.text)
            ]
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    frame = pd.DataFrame(rows, columns=["source", "domain", "position", "before", "after"])
    frame["lost"] = frame.after - frame.before
    groups = frame.groupby(["source", "position", "domain"])
    shown = groups[["before", "after", "lost"]].mean().assign(positions=groups.size()).reset_index()
    print(
        "| source | positions | domain | n | nats before | after | lost |\n| --- | --- | --- | --: | --: | --: | --: |"
    )
    for row in shown.itertuples(index=False):
        print(
            f"| {row.source} | {row.position} | {row.domain} | {row.positions:,} | {row.before:.4f} | {row.after:.4f} "
            f"| {row.lost:+.4f} |"
        )
    return int(((shown.lost > 0.02) & (shown.positions >= 200)).any())


if __name__ == "__main__":
    sys.exit(main())
