"""What is measured: real vocabularies, and real predictions of two texts, from the folder of reference inputs."""

import gzip
import json
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fusion.errors import UserError
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends

TARGET, SOURCE = "smol", "gemma"
PASSAGE = 512  # positions of a passage, about
_CONTROL_TOKENS = 6  # of gemma, whose other added tokens are text
_TEXTS = (0, 10)


@dataclass(frozen=True)
class RealPassage:
    """A passage of about 512 positions, read by two models, and its bytes of text."""

    predictions: dict[str, Predictions]
    n_bytes: int


class Inputs:
    """The reference inputs in `shared`: see its notes/alignment.md. Raises UserError when they are not there."""

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        if not (shared / "oracle").is_dir():
            raise UserError(f"{shared} holds no folder oracle: give the folder of reference inputs by --shared.")

    def _read(self, path: str) -> Any:
        with gzip.open(self.shared / "oracle" / path) as file:
            return json.load(file)

    @cached_property
    def vocabularies(self) -> dict[str, Vocabulary]:
        """Of both models."""
        found = {}
        for name in (TARGET, SOURCE):
            listed = self._read(f"vocabularies/{name}.json.gz")
            control = [i for i in listed["added_ids"] if name != SOURCE or i < _CONTROL_TOKENS]
            found[name] = Vocabulary.from_tokens(listed["tokens"], space=listed["space"], control=control)
        return found

    @cached_property
    def texts(self) -> list[dict[str, Predictions]]:
        """Two texts of 1,024 target tokens, prose and Python, as both models read them; no prefix token."""
        found = []
        for number in _TEXTS:
            predictions = {}
            for name, other in ((TARGET, SOURCE), (SOURCE, TARGET)):
                oracle = self._read(f"alignment/{name}_to_{other}_{number}.json.gz")
                predictions[name] = _predictions(oracle, self.vocabularies[name])
            found.append(predictions)
        return found

    @cached_property
    def passages(self) -> list[RealPassage]:
        """The texts cut into passages of about 512 positions, each with a prefix token."""
        return [passage for text in self.texts for passage in _cut(text)]

    def row(self, positions: int) -> list[RealPassage]:
        """Passages of at most so many positions of the target together, the same ones again and again."""
        row: list[RealPassage] = []
        for passage in cycle(self.passages):
            positions -= len(passage.predictions[TARGET].tokens)
            if positions < 0:
                break
            row.append(passage)
        return row

    def tokens(self, name: str, count: int) -> np.ndarray:
        """int32[count], token ids of both texts joined, repeated as needed."""
        return np.resize(np.concatenate([text[name].tokens for text in self.texts]), count)


def _predictions(oracle: dict[str, Any], vocabulary: Vocabulary) -> Predictions:
    tokens = np.array(oracle["source_ids"], np.int32)
    ids, logits = np.array(oracle["top_k_ids"], np.int32), np.array(oracle["top_k_logits"])
    # Their normaliser is not recorded. Random numbers in its place are at least not easier to compress.
    random = np.random.default_rng(len(tokens))
    tail = random.uniform(0.02, 0.5, len(tokens))
    p = (1 - tail)[:, None] * np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    in_top = (p * (ids == np.append(tokens[1:], -1)[:, None])).sum(axis=1)
    nats = -np.log(np.where(in_top > 0, in_top, tail * random.uniform(0.001, 0.5, len(tokens))))
    text = b"".join(vocabulary.token_bytes[i] or b"" for i in tokens.tolist())
    ends = byte_ends(tokens, vocabulary, text)
    return Predictions(
        tokens, ends, ids, np.log(p).astype(np.float32), tail.astype(np.float32), nats.astype(np.float32)
    )


def _cut(text: dict[str, Predictions]) -> list[RealPassage]:
    common = np.intersect1d(text[TARGET].byte_ends, text[SOURCE].byte_ends)
    middle = int(text[TARGET].byte_ends[PASSAGE])
    cuts = [0, int(common[np.abs(common - middle).argmin()]), int(common[-1])]
    passages = []
    for start, stop in pairwise(cuts):
        predictions = {}
        for name, whole in text.items():
            first = int((whole.byte_ends <= start).sum())
            last = int((whole.byte_ends <= stop).sum())
            # The position before a token is the one that predicts it; the first token's predecessor is not recorded.
            at = np.arange(first - 1, last).clip(min=0)
            ends = np.append(start, whole.byte_ends[first:last]) - start
            tokens = np.append(0, whole.tokens[first:last])
            nats = whole.nll[at].copy()
            nats[-1] = 0
            predictions[name] = Predictions(
                tokens.astype(np.int32),
                ends.astype(np.int32),
                whole.ids[at],
                whole.log_p[at],
                whole.tail[at],
                nats,
            )
        passages.append(RealPassage(predictions, stop - start))
    return passages
