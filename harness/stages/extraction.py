"""The extraction stage: one source model reads every passage once, and what it says is stored for any target."""

import json
import time
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import UserError
from fusion.types import Predictions
from fusion.vocabulary.token_bytes import Vocabulary, byte_ends, encode, prefix_id
from harness.config.loading import ExtractionConfig
from harness.data.passages import Passages
from harness.runtime.progress import Advance, notify, track
from harness.stages.shards import LOST, Shard, checked, write_shard
from harness.store.artifacts import Estimate, Spec, Store
from harness.store.leases import Leases

if TYPE_CHECKING:
    from fusion.inference.top_k import TopKPredictions
    from harness.models.checkpoints import ResolvedModel

VERSION = 1
TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""By how many nats a position, on average over a passage, a model may differ from what is stored of it.

The same text in another batch changes SmolLM2-135M by 1e-6 in float32 and 0.02 in bfloat16, another implementation of
attention by 3e-6 and 0.04; a model that masks, scales or positions otherwise is off by tenths.
"""
_OPEN_SHARDS = 128  # file handles kept, not memory: a passage is read from the map
_POLL_S = 1.0


def extraction_spec(
    model: "ResolvedModel", passages: Spec, settings: ExtractionConfig, *, dtype: str, batch_tokens: int
) -> Spec:
    # What came later is a part of it where it is set, so that what was made before is still known.
    later: dict[str, Any] = {}
    if settings.store_dtype != "float16":
        later["store_dtype"] = settings.store_dtype
    if settings.temperatures:
        later["temperatures"] = sorted(set(settings.temperatures))
    return Spec(
        "predictions",
        model.name,
        VERSION,
        {"model": model.fingerprint, "passages": passages.fingerprint},
        {"k": settings.k, "dtype": dtype, "passages_per_shard": settings.passages_per_shard, **later},
        {"batch_tokens": batch_tokens},
    )


def make_extraction(
    store: Store,
    spec: Spec,
    model: "ResolvedModel",
    passages_folder: Path,
    settings: ExtractionConfig,
    *,
    device: str,
    estimate: Estimate,
) -> Path:
    """Lets the model read all passages; a shard holds `passages_per_shard` passages and is written whole or not at all.

    Any number of processes that share a file system may be at it: each makes the shards that it can claim, and the
    bytes do not depend on how many they were. A passage about which the model's logits are not finite is left out.

    Raises:
        UserError: more passages would be left out than `settings.max_skipped_fraction` allows, or the model reads here
            what was read before (by other processes, or before an interruption) otherwise than `TOLERANCE` allows.
    """

    def share(folder: Path, leases: Leases) -> None:
        _extract(folder, leases, spec, model, Passages(passages_folder), settings, device)

    def build(folder: Path) -> dict[str, Any]:
        return _look_over(folder, spec, model, Passages(passages_folder), settings)

    return store.ensure(spec, build, estimate, make_parts=share)


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:06d}.safetensors"


def _members(passages: Passages, spec: Spec) -> list[range]:
    """The passages of each shard."""
    size = int(spec.params["passages_per_shard"])
    return [range(start, min(start + size, len(passages))) for start in range(0, len(passages), size)]


def _extract(
    folder: Path,
    leases: Leases,
    spec: Spec,
    model: "ResolvedModel",
    passages: Passages,
    settings: ExtractionConfig,
    device: str,
) -> None:
    """Makes all shards that no other process makes, and waits for those."""
    shards = _members(passages, spec)
    n_bytes = [int(passages.n_bytes[s.start : s.stop].sum()) for s in shards]

    def there() -> set[int]:
        return {i for i in range(len(shards)) if _shard(folder, i).exists()}

    finished = there()
    if len(finished) == len(shards):
        return
    reader = _Reader(spec, model, passages, settings, device)
    own: set[int] = set()
    compared = waiting = False
    with track(f"extract {model.name}", sum(n_bytes), "bytes", done=sum(n_bytes[i] for i in finished)) as advance:
        while len(finished) < len(shards):
            if finished - own and not compared:
                first = min(finished - own)
                reader.compare(_shard(folder, first), shards[first])
                compared = True
            index = next((i for i in range(len(shards)) if i not in finished and leases.take(f"shard-{i:06d}")), None)
            if index is None:
                if not waiting:
                    notify(f"{model.name}: other processes are reading what is left; waiting for them.")
                    waiting = True
                time.sleep(_POLL_S)
            elif not (path := _shard(folder, index)).exists():
                read = reader.read(shards[index], advance)
                own.add(index)
                if not path.exists():  # else we were silent for so long that another took it over
                    beside = leases.folder / uuid.uuid4().hex
                    write_shard(
                        path,
                        beside,
                        *read,
                        wide=reader.wide,
                        compression=settings.compression,
                        dtype=settings.store_dtype,
                    )
            now = there()
            advance(sum(n_bytes[i] for i in now - finished - own))
            finished = now
    if reader.lost:
        notify(f"{model.name}: the tokens of {reader.lost} passages do not spell their text and are unaligned there.")


def _look_over(
    folder: Path, spec: Spec, model: "ResolvedModel", passages: Passages, settings: ExtractionConfig
) -> dict[str, Any]:
    """Checks the finished shards; returns what the manifest is to say of them."""
    skipped = []
    tokens = 0
    for index, members in enumerate(_members(passages, spec)):
        positions = np.diff(checked(_shard(folder, index)).offsets)
        tokens += int(positions.sum())
        skipped += [passages.name(p) for p, n in zip(members, positions, strict=True) if not n]
    _check_left_out(skipped, model, passages, settings)
    if not skipped:
        return {"tokens": tokens}
    notify(f"{model.name}: {len(skipped)} of {len(passages)} passages are left out; the manifest names them.")
    return {"tokens": tokens, "skipped": skipped}


def _check_left_out(
    names: Sequence[str], model: "ResolvedModel", passages: Passages, settings: ExtractionConfig
) -> None:
    share = settings.max_skipped_fraction
    if len(names) > (max(1, int(share * len(passages))) if share else 0):
        raise UserError(
            f"The logits of {model.name} about {len(names)} of {len(passages)} passages are not finite (first "
            f"{names[0]}), more than extraction.max_skipped_fraction = {share:g} allows: set the role's "
            "dtype, or allow more."
        )


class _Reader:
    """A loaded source model, which reads passages."""

    def __init__(
        self, spec: Spec, model: "ResolvedModel", passages: Passages, settings: ExtractionConfig, device: str
    ) -> None:
        from fusion.inference.top_k import reader
        from harness.models.checkpoints import load_model, load_tokenizer

        self._spec, self._model, self._passages, self._settings, self._device = spec, model, passages, settings, device
        self._tokenizer = load_tokenizer(model)
        loaded = load_model(model, dtype=spec.params["dtype"], device=device)
        self._vocabulary = Vocabulary.from_tokenizer(self._tokenizer, loaded.config.get_text_config().vocab_size)
        self._backbone, self._project = reader(loaded)
        self._window = getattr(loaded.config, "max_position_embeddings", None)
        self._left_out: list[str] = []
        self.lost = 0
        self.wide = len(self._vocabulary.tokens) > 65536

    def _externalise(self, sequences: list[list[int]]) -> "list[TopKPredictions]":
        import torch

        from fusion.inference.top_k import predict_top_k

        return predict_top_k(
            self._backbone,
            self._project,
            sequences,
            k=int(self._spec.params["k"]),
            device=torch.device(self._device),
            temperatures=self._spec.params.get("temperatures", ()),
        )

    def _tokens(self, passage: int) -> list[int]:
        tokens = [prefix_id(self._tokenizer), *encode(self._tokenizer, self._passages.text(passage))]
        if max(tokens) >= len(self._vocabulary):
            raise UserError(
                f"The tokenizer of {self._model.name} gives token {max(tokens)}, but its config.json has a vocabulary "
                f"of {len(self._vocabulary)}: put the model's own tokenizer.json into {self._model.folder}."
            )
        if self._window and len(tokens) > self._window:
            raise UserError(
                f"{self._passages.name(passage)} is {len(tokens)} tokens for {self._model.name}, whose context is "
                f"{self._window}: lower passages.max_bytes."
            )
        return tokens

    def read(self, members: Sequence[int], advance: Advance) -> "tuple[list[TopKPredictions], list[np.ndarray]]":
        """What the model says about the passages, and the byte ends of their tokens."""
        from fusion.inference.top_k import batches_by_length

        sequences = [self._tokens(passage) for passage in members]
        results: list[Any] = [None] * len(sequences)
        for batch in batches_by_length([len(s) for s in sequences], int(self._spec.info["batch_tokens"])):
            for i, result in zip(batch, self._externalise([sequences[i] for i in batch]), strict=True):
                results[i] = result
                if not len(result.nats):
                    self._leave_out(members[i])
            advance(sum(int(self._passages.n_bytes[members[i]]) for i in batch))
        ends = []
        for passage, tokens in zip(members, sequences, strict=True):
            ends.append(byte_ends(tokens[1:], self._vocabulary, self._passages.text(passage).encode("utf-8")))
            self.lost += bool(len(ends[-1]) and ends[-1][-1] < 0)
        return results, ends

    def _leave_out(self, passage: int) -> None:
        self._left_out.append(self._passages.name(passage))
        _check_left_out(self._left_out, self._model, self._passages, self._settings)
        notify(f"{self._model.name}: its logits about {self._left_out[-1]} are not finite; the passage is left out.")

    def compare(self, path: Path, members: Sequence[int]) -> None:
        """Reads one passage of a finished shard again. Raises UserError when other numbers come out."""
        shard, dtype = checked(path), self._spec.params["dtype"]
        longest = int(np.diff(shard.offsets).argmax())
        before = shard.columns(longest)["nats"]
        if not len(before):
            return
        (again,) = self._externalise([self._tokens(members[longest])])
        apart = float(np.abs(before - again.nats).mean()) if len(before) == len(again.nats) else np.inf
        if not apart <= TOLERANCE[dtype]:
            raise UserError(
                f"{self._model.name} reads {self._passages.name(members[longest])} otherwise than when {path} was "
                f"made, by {apart:.2g} nats a position where {TOLERANCE[dtype]:g} are allowed in {dtype}: go on with "
                f"the machine and libraries of then, or remove {path.parent}."
            )


class Extraction:
    """A stored extraction, read passage by passage from memory-mapped shards.

    Token ids are not stored: they are the tokenizer's, and `reading` refuses when their number is not the stored one.
    At a temperature T other than 1, one of the extraction's own, distributions are those to the power 1/T. With
    `k` only the k most probable of the stored entries are given.
    """

    def __init__(
        self,
        folder: Path,
        passages: Passages,
        tokenizer: Any,
        vocabulary: Vocabulary,
        temperature: float = 1.0,
        k: int | None = None,
    ) -> None:
        self._folder = folder
        self._passages = passages
        self._tokenizer = tokenizer
        self._prefix = prefix_id(tokenizer)
        self.vocabulary = vocabulary
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self._size = int(manifest["params"]["passages_per_shard"])
        self._temperature = temperature
        self._k = k
        self._column = None if temperature == 1 else manifest["params"]["temperatures"].index(temperature)
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def _shard(self, index: int) -> Shard:
        if index not in self._open:
            self._open[index] = Shard(_shard(self._folder, index))
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(index)
        return self._open[index]

    def predictions(self, passage: int) -> Predictions:
        """What the model says about a passage (see `Predictions`)."""
        columns = self._shard(passage // self._size).columns(passage % self._size)
        text = self._passages.text(passage)
        tokens = np.array([self._prefix, *encode(self._tokenizer, text)], np.int32)
        m, k = columns["ids"].shape
        if not m:
            ends = np.append(0, byte_ends(tokens[1:], self.vocabulary, text.encode("utf-8"))).astype(np.int32)
            return Predictions.empty(tokens, ends, self._k or k)
        if len(tokens) != m:
            raise UserError(
                f"{self._folder} holds {m} positions of {self._passages.name(passage)}, but the tokenizer now gives "
                f"{len(tokens)}: the tokenizer's library has changed; remove that folder to have it made again."
            )
        steps = columns["steps"].astype(np.int64)
        ends = np.cumsum(steps).astype(np.int32)
        ends[np.maximum.accumulate(steps == int(LOST))] = -1
        log_p, tail = columns["log_p"].astype(np.float32), columns["tail"].astype(np.float32)
        if self._column is not None:
            log_p = log_p / np.float32(self._temperature) - columns["log_z"][:, self._column, None]
            tail = np.maximum(1 - np.exp(log_p, dtype=np.float64).sum(axis=1), 0).astype(np.float32)
        found = Predictions(
            tokens=tokens,
            ends=ends,
            ids=columns["ids"].astype(np.int32),
            log_p=log_p,
            tail=tail,
            nats=columns["nats"],
        )
        return found if self._k is None else found.top(self._k)

    def occurring_ids(self) -> np.ndarray:
        """int64[n], every token id that is among the top k or in the text: what a lazy vocabulary map must cover."""
        found: set[int] = {self._prefix}
        for passage in range(len(self._passages)):
            found.update(encode(self._tokenizer, self._passages.text(passage)))
            found.update(np.unique(self._shard(passage // self._size).columns(passage % self._size)["ids"]).tolist())
        return np.array(sorted(found), np.int64)
