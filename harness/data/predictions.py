"""Stored predictions of a model, read passage by passage from memory-mapped shards."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from fusion.errors import UserError
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import prefix_id
from harness.data.passages import Passages
from harness.data.shards import LOST, Shard, shard_path, shard_size, token_digest
from harness.data.tokens import Tokens
from harness.store.artifacts import read_manifest

_OPEN_SHARDS = 128  # file handles kept open; they hold no memory, since passages are read from the map


class PredictionsReader:
    """The predictions of one model on all passages, as the extraction stage stored them.

    Token ids are those of the passages' stored tokens, and a passage is refused whose ids do not have the hash that is
    stored with the predictions.
    """

    def __init__(
        self,
        folder: Path,
        passages: Passages,
        tokens: Tokens,
        tokenizer: Any,
        vocabulary: Vocabulary,
        temperature: float = 1.0,
        k: int | None = None,
    ) -> None:
        """Opens the artifact in `folder`.

        Args:
            folder: The artifact of the predictions.
            passages: The passages that it was made of.
            tokens: The tokens of the passages.
            tokenizer: The tokenizer of the model that predicted.
            vocabulary: The vocabulary of that model.
            temperature: 1, or one of the temperatures of the extraction: distributions are taken to the power 1/T.
            k: Only the k most probable of the stored entries are given. Default: all.
        """
        self._folder = folder
        self._passages = passages
        self._stored_tokens = tokens
        self.vocabulary = vocabulary
        params = read_manifest(folder)["params"]
        self._prefix = prefix_id(tokenizer, params.get("prefix"))
        self._shard_size = shard_size(params["passages_per_shard"], len(passages))
        self._temperature = temperature
        self._k = k
        self._temperature_column = None if temperature == 1 else params["temperatures"].index(temperature)
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # another process opens the shards itself

    def _shard(self, passage: int) -> Shard:
        """The shard that holds a passage; the most recently used ones stay open."""
        index = passage // self._shard_size
        if index not in self._open:
            self._open[index] = Shard(shard_path(self._folder, index))
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]

    def _columns(self, passage: int) -> dict[str, np.ndarray]:
        return self._shard(passage).columns(passage % self._shard_size)

    def _tokens(self, passage: int) -> np.ndarray:
        """The token ids int32[M] of a passage, prefix included. Raises UserError where the model read others."""
        tokens = np.concatenate([np.array([self._prefix], np.int32), self._stored_tokens.ids(passage)])
        if token_digest(tokens) != int(self._shard(passage).tokens[passage % self._shard_size]):
            raise UserError(
                f"{self._folder} was made of other tokens of {self._passages.name(passage)} than "
                f"{self._stored_tokens.folder} holds: the tokenizer's library has changed between them; remove both "
                "folders to have them made again."
            )
        return tokens

    def predictions(self, passage: int) -> Predictions:
        """The predictions of a passage, without positions where the passage was skipped.

        Raises UserError when the stored tokens are not those that the model read.
        """
        columns, tokens = self._columns(passage), self._tokens(passage)
        m, k = columns["ids"].shape
        if not m:
            ends = np.append(0, self._stored_tokens.byte_ends(passage)).astype(np.int32)
            return Predictions.empty(tokens, ends, self._k or k)
        steps = columns["steps"].astype(np.int64)
        ends = np.cumsum(steps).astype(np.int32)
        ends[np.maximum.accumulate(steps == int(LOST))] = -1
        log_p, tail = columns["log_p"].astype(np.float32), columns["tail"].astype(np.float32)
        nll, prefix_nll = columns["nll"], columns["prefix_nll"].astype(np.float32)
        if self._temperature_column is not None:
            log_z = columns["log_z"][:, self._temperature_column]
            log_p = log_p / np.float32(self._temperature) - log_z[:, None]
            nll = nll / np.float32(self._temperature) + log_z
            nll[-1] = 0  # no token follows
            tail = np.maximum(1 - np.exp(log_p, dtype=np.float64).sum(axis=1), 0).astype(np.float32)
        predictions = Predictions(
            tokens=tokens,
            byte_ends=ends,
            ids=columns["ids"].astype(np.int32),
            log_p=log_p,
            tail=tail,
            nll=nll,
            prefix_nll=prefix_nll if self._temperature_column is None else None,  # known at temperature 1
            spread=columns["spread"] if self._temperature_column is None else None,
        )
        return predictions if self._k is None else predictions.top(self._k)
