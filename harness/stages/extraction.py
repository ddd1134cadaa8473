"""The extraction stage: a model reads every passage once, and its predictions are stored for any target.

The shards of one artifact are divided among all processes that share its store (see `harness.store.leases`).
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import UserError
from fusion.modeling.context import context_length
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import prefix_id
from harness.config.schema import ExtractionConfig
from harness.data.passages import Passages
from harness.data.shards import LOST, checked, existing_shards, shard_path, shard_size, write_shard
from harness.data.tokens import Tokens
from harness.models.checkpoints import load_config, load_model, load_tokenizer
from harness.runtime.progress import Advance, notify, track
from harness.store.artifacts import Estimate, Spec, Store
from harness.store.leases import Leases

if TYPE_CHECKING:
    from fusion.inference.top_k import TopKPredictions
    from harness.models.resolution import ResolvedModel

VERSION = 5
TOLERANCE: Mapping[str, float] = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.1}
"""By how many nats a position, on average over a passage, a model may differ from its stored predictions.

The same text in another batch changes SmolLM2-135M by 1e-6 in float32 and 0.02 in bfloat16, another implementation of
attention by 3e-6 and 0.04; a model that masks, scales or positions otherwise is off by tenths.
"""
_POLL_S = 1.0


def extraction_spec(
    model: "ResolvedModel", passages: Spec, settings: ExtractionConfig, *, dtype: str, batch_tokens: int
) -> Spec:
    """What the stored predictions of a model are made of: the model, the passages, k, precision, shards."""
    # Optional settings are part of the identity only where they differ from their defaults.
    optional: dict[str, Any] = model.spec.prefix_identity()
    if settings.store_dtype != "float16":
        optional["store_dtype"] = settings.store_dtype
    if settings.temperatures:
        optional["temperatures"] = sorted(set(settings.temperatures))
    return Spec(
        "predictions",
        model.name,
        VERSION,
        {"model": model.fingerprint, "passages": passages.fingerprint},
        {"k": settings.k, "passages_per_shard": settings.passages_per_shard, **model.spec.computing(dtype), **optional},
        {"batch_tokens": batch_tokens},
    )


def make_extraction(
    store: Store,
    spec: Spec,
    model: "ResolvedModel",
    passages_folder: Path,
    tokens_folder: Path,
    settings: ExtractionConfig,
    *,
    device: str,
    estimate: Estimate,
) -> Path:
    """Makes the predictions of a model on all passages and returns their artifact.

    A shard holds `passages_per_shard` passages and is written whole or not at all. Any number of processes that share
    a file system can work on it: each makes the shards whose leases it gets, and the bytes do not depend on their
    number. A passage is skipped where the model's logits are not finite, and where it is longer than its context.

    Raises:
        UserError: More passages would be skipped than `settings.max_skipped_fraction` allows, or the model's
            predictions here differ by more than `TOLERANCE` from those that are there already (made by other
            processes, or before an interruption).
    """

    def make_parts(folder: Path, leases: Leases) -> None:
        _extract(folder, leases, spec, model, Passages(passages_folder), Tokens(tokens_folder), settings, device)

    def build(folder: Path) -> dict[str, Any]:
        return _summary(folder, spec, model, Passages(passages_folder), Tokens(tokens_folder), settings)

    return store.ensure(spec, build, estimate, make_parts=make_parts)


def _members(passages: Passages, spec: Spec) -> list[range]:
    """The indices of the passages of each shard."""
    size = shard_size(spec.params["passages_per_shard"], len(passages))
    return [range(start, min(start + size, len(passages))) for start in range(0, len(passages), size)]


def _extract(
    folder: Path,
    leases: Leases,
    spec: Spec,
    model: "ResolvedModel",
    passages: Passages,
    tokens: Tokens,
    settings: ExtractionConfig,
    device: str,
) -> None:
    """Makes every shard that no other process makes, and returns when all shards exist."""
    shards = _members(passages, spec)
    n_bytes = [int(passages.n_bytes[s.start : s.stop].sum()) for s in shards]

    finished = existing_shards(folder)
    if len(finished) == len(shards):
        return
    reader = _Reader(spec, model, passages, tokens, settings, device)
    own: set[int] = set()
    compared = waiting = False
    with track(f"extract {model.name}", sum(n_bytes), "bytes", done=sum(n_bytes[i] for i in finished)) as advance:
        while len(finished) < len(shards):
            if finished - own and not compared:
                first = min(finished - own)
                reader.compare(shard_path(folder, first), shards[first])
                compared = True
            index = next((i for i in range(len(shards)) if i not in finished and leases.take(f"shard-{i:06d}")), None)
            if index is None:
                if not waiting:
                    notify(f"{model.name}: other processes are reading what is left; waiting for them.")
                    waiting = True
                time.sleep(_POLL_S)
            elif not (path := shard_path(folder, index)).exists():
                read = reader.read(shards[index], advance)
                own.add(index)
                if not path.exists():  # otherwise our lease expired and another process made the shard
                    beside = leases.folder / uuid.uuid4().hex
                    write_shard(
                        path,
                        beside,
                        *read,
                        wide=reader.wide,
                        compression=settings.compression,
                        dtype=settings.store_dtype,
                    )
            now = existing_shards(folder)
            advance(sum(n_bytes[i] for i in now - finished - own))
            finished = now


def _summary(
    folder: Path,
    spec: Spec,
    model: "ResolvedModel",
    passages: Passages,
    stored_tokens: Tokens,
    settings: ExtractionConfig,
) -> dict[str, Any]:
    """Checks the bytes of all shards; returns, for the manifest, their number of tokens, the skipped passages: those
    with logits that are not finite (`skipped`), and those longer than the model's context (`too_long`), and the number
    of passages whose text the tokens do not spell to its end (`unspelled`).
    """
    empty = []
    tokens = unspelled = 0
    for index, members in enumerate(_members(passages, spec)):
        shard = checked(shard_path(folder, index))
        positions = np.diff(shard.offsets)
        tokens += int(positions.sum())
        empty += [p for p, n in zip(members, positions, strict=True) if not n]
        for at in np.flatnonzero(positions).tolist():
            steps = shard.columns(at)["steps"]
            unspelled += bool((steps == LOST).any() or steps.sum(dtype=np.int64) < passages.n_bytes[members[at]])
    info: dict[str, Any] = {"tokens": tokens}
    if unspelled:
        notify(
            f"{model.name}: its tokens do not spell the text of {unspelled} of {len(passages)} passages (its tokenizer "
            "drops or changes some of it): positions from there on have no partner, and it is not selected there."
        )
        info["unspelled"] = unspelled
    if not empty:
        return info
    context = context_length(load_config(model))
    long = [p for p in empty if context and 1 + stored_tokens.counts[p] > context]
    names = {
        "skipped": [passages.name(p) for p in sorted(set(empty) - set(long))],
        "too_long": [passages.name(p) for p in long],
    }
    _check_skipped(names["skipped"], model, passages, settings)
    if len(long) == len(passages):
        raise UserError(
            f"Every passage is longer than the context of {model.name}, {context} tokens: lower passages.max_bytes."
        )
    notify(
        f"{model.name}: {len(empty)} of {len(passages)} passages are skipped, {len(long)} of them because they are "
        "longer than its context; the manifest names them."
    )
    return {**info, **{reason: listed for reason, listed in names.items() if listed}}


def _check_skipped(
    names: Sequence[str], model: "ResolvedModel", passages: Passages, settings: ExtractionConfig
) -> None:
    """Raises UserError where more passages are skipped than allowed: one at least, unless the fraction is 0."""
    fraction = settings.max_skipped_fraction
    if len(names) > (max(1, int(fraction * len(passages))) if fraction else 0):
        raise UserError(
            f"The logits of {model.name} about {len(names)} of {len(passages)} passages are not finite (first "
            f"{names[0]}), more than extraction.max_skipped_fraction = {fraction:g} allows: set the role's "
            "dtype, or allow more."
        )


class _Reader:
    """A loaded model that reads passages."""

    def __init__(
        self,
        spec: Spec,
        model: "ResolvedModel",
        passages: Passages,
        tokens: Tokens,
        settings: ExtractionConfig,
        device: str,
    ) -> None:
        from fusion.inference.top_k import BytePrefixes, reader

        self._spec, self._model, self._settings, self._device = spec, model, settings, device
        self._passages, self._stored_tokens = passages, tokens
        tokenizer = load_tokenizer(model)
        self._prefix = prefix_id(tokenizer, model.spec.prefix)
        loaded = load_model(model, dtype=spec.params["dtype"], device=device)
        self._vocabulary = Vocabulary.from_tokenizer(tokenizer, loaded.config.get_text_config().vocab_size)
        self._backbone, self._project = reader(loaded)
        self._prefixes = BytePrefixes(self._vocabulary)
        self._context = context_length(loaded.config)
        self._skipped: list[str] = []
        self.wide = len(self._vocabulary.tokens) > 65536

    def _predict(self, sequences: list[list[int]]) -> "list[TopKPredictions]":
        import torch

        from fusion.inference.top_k import predict_top_k

        return predict_top_k(
            self._backbone,
            self._project,
            sequences,
            k=int(self._spec.params["k"]),
            device=torch.device(self._device),
            temperatures=self._spec.params.get("temperatures", ()),
            prefixes=self._prefixes,
        )

    def _tokens(self, passage: int) -> list[int]:
        tokens = [self._prefix, *self._stored_tokens.ids(passage).tolist()]
        if max(tokens) >= len(self._vocabulary):
            raise UserError(
                f"The tokenizer of {self._model.name} gives token {max(tokens)}, but its config.json has a vocabulary "
                f"of {len(self._vocabulary)}: put the model's own tokenizer.json into {self._model.folder}."
            )
        return tokens

    def read(
        self, members: Sequence[int], advance: Advance
    ) -> "tuple[list[TopKPredictions], list[np.ndarray], list[list[int]]]":
        """The predictions of the model on the passages `members`, the byte ends of their tokens, and the tokens."""
        from fusion.inference.top_k import TopKPredictions, batches_by_length

        sequences = [self._tokens(passage) for passage in members]
        none = TopKPredictions.none(int(self._spec.params["k"]), len(self._spec.params.get("temperatures", ())))
        results = [none] * len(sequences)
        fitting = [i for i, s in enumerate(sequences) if not self._context or len(s) <= self._context]
        advance(sum(int(self._passages.n_bytes[members[i]]) for i in set(range(len(sequences))) - set(fitting)))
        for group in batches_by_length([len(sequences[i]) for i in fitting], int(self._spec.info["batch_tokens"])):
            batch = [fitting[i] for i in group]
            for i, result in zip(batch, self._predict([sequences[i] for i in batch]), strict=True):
                results[i] = result
                if not len(result.nll):
                    self._skip(members[i])
            advance(sum(int(self._passages.n_bytes[members[i]]) for i in batch))
        return results, [self._stored_tokens.byte_ends(passage) for passage in members], sequences

    def _skip(self, passage: int) -> None:
        self._skipped.append(self._passages.name(passage))
        _check_skipped(self._skipped, self._model, self._passages, self._settings)
        notify(f"{self._model.name}: its logits about {self._skipped[-1]} are not finite; the passage is skipped.")

    def compare(self, path: Path, members: Sequence[int]) -> None:
        """Reads one passage of a finished shard again. Raises UserError where its predictions differ."""
        shard, dtype = checked(path), self._spec.params["dtype"]
        longest = int(np.diff(shard.offsets).argmax())
        before = shard.columns(longest)["nll"]
        if not len(before):
            return
        (again,) = self._predict([self._tokens(members[longest])])
        apart = float(np.abs(before - again.nll).mean()) if len(before) == len(again.nll) else np.inf
        if not apart <= TOLERANCE[dtype]:
            raise UserError(
                f"{self._model.name} reads {self._passages.name(members[longest])} otherwise than when {path} was "
                f"made, by {apart:.2g} nats a position where {TOLERANCE[dtype]:g} are allowed in {dtype}: go on with "
                f"the machine and libraries of then, or remove {path.parent}."
            )
