"""The extraction stage: one source model reads every piece once, and what it says is stored for any target."""

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusion.errors import UserError
from fusion.targets import Reading
from fusion.vocabulary import Vocabulary, byte_ends, encode, prefix_id
from harness.artifacts import Estimate, Spec, Store
from harness.corpus import Pieces
from harness.progress import say, track

if TYPE_CHECKING:
    from harness.models import ResolvedModel

VERSION = 1
_OPEN_SHARDS = 128  # file handles kept, not memory: a piece is read from the map
_LOST = np.uint16(65535)  # a byte end where the tokens no longer spell the text


def position_bytes(k: int, vocabulary: int) -> int:
    """Bytes a stored position takes: ids, float16 log-probabilities and tail, float32 nats, uint16 step in bytes."""
    return k * (2 if vocabulary <= 65536 else 4) + 2 * k + 2 + 4 + 2


def extraction_spec(
    model: "ResolvedModel", pieces: Spec, *, k: int, dtype: str, pieces_per_shard: int, batch_tokens: int
) -> Spec:
    return Spec(
        "extraction",
        model.name,
        VERSION,
        {"model": model.fingerprint, "pieces": pieces.fingerprint},
        {"k": k, "dtype": dtype, "pieces_per_shard": pieces_per_shard},
        {"batch_tokens": batch_tokens},
    )


def make_extraction(
    store: Store,
    spec: Spec,
    model: "ResolvedModel",
    pieces_folder: Path,
    *,
    device: str,
    estimate: Estimate,
) -> Path:
    """Lets the model read all pieces; a shard holds `pieces_per_shard` pieces and is written whole or not at all."""

    def build(folder: Path) -> None:
        _extract(folder, spec, model, Pieces(pieces_folder), device)

    return store.ensure(spec, build, estimate)


def _shard(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:06d}.safetensors"


def _extract(folder: Path, spec: Spec, model: "ResolvedModel", pieces: Pieces, device: str) -> None:
    import torch

    from fusion.extraction import batches_by_length, externalise, reader
    from harness.models import load_model, load_tokenizer

    size = int(spec.params["pieces_per_shard"])
    shards = [range(start, min(start + size, len(pieces))) for start in range(0, len(pieces), size)]
    todo = [i for i, _ in enumerate(shards) if not _is_whole(_shard(folder, i))]
    n_bytes = [int(pieces.n_bytes[s.start : s.stop].sum()) for s in shards]
    done = sum(n_bytes) - sum(n_bytes[i] for i in todo)
    if not todo:
        return
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, dtype=spec.params["dtype"], device=device)
    vocabulary = Vocabulary.from_tokenizer(tokenizer, loaded.config.get_text_config().vocab_size)
    backbone, project = reader(loaded)
    prefix = prefix_id(tokenizer)
    window = getattr(loaded.config, "max_position_embeddings", None)
    k = int(spec.params["k"])
    lost_pieces = 0
    with track(f"extract {model.name}", sum(n_bytes), "bytes", done=done) as advance:
        for index in todo:
            members = shards[index]
            tokens = [encode(tokenizer, pieces.text(p)) for p in members]
            sequences = [[prefix, *t] for t in tokens]
            longest = max(range(len(sequences)), key=lambda i: len(sequences[i]))
            if window and len(sequences[longest]) > window:
                raise UserError(
                    f"{pieces.name(members[longest])} is {len(sequences[longest])} tokens for {model.name}, "
                    f"whose context is {window}: lower pieces.max_bytes."
                )
            results: list[Any] = [None] * len(sequences)
            for batch in batches_by_length([len(s) for s in sequences], int(spec.info["batch_tokens"])):
                try:
                    read = externalise(
                        backbone, project, [sequences[i] for i in batch], k=k, device=torch.device(device)
                    )
                except UserError as error:
                    names = ", ".join(pieces.name(members[i]) for i in batch)
                    raise UserError(f"{model.name} failed on {names}: {error}") from None
                for i, result in zip(batch, read, strict=True):
                    results[i] = result
                advance(sum(int(pieces.n_bytes[members[i]]) for i in batch))
            ends = []
            for member, ids in zip(members, tokens, strict=True):
                piece_ends = byte_ends(ids, vocabulary, pieces.text(member).encode("utf-8"))
                lost_pieces += bool(len(piece_ends) and piece_ends[-1] < 0)
                ends.append(piece_ends)
            _write_shard(_shard(folder, index), results, ends, wide=len(vocabulary.tokens) > 65536)
    if lost_pieces:
        say(f"{model.name}: the tokens of {lost_pieces} pieces do not spell their text; from there it is unpaired.")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}:{tensors[name].dtype}:{tensors[name].shape};".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _write_shard(path: Path, results: list[Any], ends: list[np.ndarray], *, wide: bool) -> None:
    from safetensors.numpy import save_file

    steps = []
    for piece_ends in ends:
        step = np.diff(piece_ends, prepend=0).astype(np.int64)
        if step[piece_ends >= 0].max(initial=0) >= int(_LOST):
            raise UserError("a token stands for more than 65,534 bytes of text: the store cannot hold it.")
        step[piece_ends < 0] = int(_LOST)
        steps.append(np.concatenate([[0], step]).astype(np.uint16))
    ids = np.concatenate([r.ids for r in results])
    width = np.uint32 if wide else np.uint16
    if ids.max() > np.iinfo(width).max:  # a cast would wrap around and name other tokens
        raise UserError(
            f"the model's logits name token {ids.max()}, beyond the vocabulary of its config.json: correct vocab_size."
        )
    tensors = {
        "offsets": np.cumsum([0, *(len(r.nats) for r in results)]).astype(np.int64),
        "ids": ids.astype(width),
        "log_p": np.concatenate([r.log_p for r in results]).astype(np.float16),
        "tail": np.concatenate([r.tail for r in results]).astype(np.float16),
        "nats": np.concatenate([r.nats for r in results]).astype(np.float32),
        "steps": np.concatenate(steps),
    }
    beside = path.with_suffix(".tmp")
    save_file(tensors, beside, {"sha256": _digest(tensors)})
    beside.replace(path)


def _load_shard(path: Path) -> tuple[dict[str, np.ndarray], str]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict
        return tensors, (file.metadata() or {}).get("sha256", "")


def _is_whole(path: Path) -> bool:
    """Whether an earlier run finished this shard. Raises UserError when its bytes have changed since."""
    if not path.exists():
        return False
    try:
        tensors, sha256 = _load_shard(path)
    except Exception:  # safetensors raises its own errors for a damaged header
        tensors, sha256 = {}, "damaged"
    if _digest(tensors) != sha256:
        raise UserError(f"{path} does not match its checksum: remove that file to have it made again.")
    return True


class Extraction:
    """A stored extraction, read piece by piece from memory-mapped shards.

    Token ids are not stored: they are the tokenizer's, and `reading` refuses when their number is not the stored one.
    """

    def __init__(self, folder: Path, pieces: Pieces, tokenizer: Any, vocabulary: Vocabulary) -> None:
        self._folder = folder
        self._pieces = pieces
        self._tokenizer = tokenizer
        self._prefix = prefix_id(tokenizer)
        self.vocabulary = vocabulary
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self._size = int(manifest["params"]["pieces_per_shard"])
        self._open: OrderedDict[int, tuple[Any, np.ndarray]] = OrderedDict()

    def _shard(self, shard: int) -> tuple[Any, np.ndarray]:
        """An open (memory-mapped) shard and where its pieces begin."""
        from safetensors import safe_open

        if shard not in self._open:
            file = safe_open(_shard(self._folder, shard), framework="numpy")
            self._open[shard] = file, file.get_tensor("offsets")
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        return self._open[shard]

    def reading(self, piece: int) -> Reading:
        """What the model says about a piece (see `Reading`)."""
        file, offsets = self._shard(piece // self._size)
        start, end = (int(x) for x in offsets[piece % self._size : piece % self._size + 2])

        def part(name: str) -> np.ndarray:
            values: np.ndarray = file.get_slice(name)[start:end]
            return values

        tokens = np.array([self._prefix, *encode(self._tokenizer, self._pieces.text(piece))], np.int32)
        if len(tokens) != end - start:
            raise UserError(
                f"{self._folder} holds {end - start} positions of {self._pieces.name(piece)}, but the tokenizer now "
                f"gives {len(tokens)}: the tokenizer's library has changed; remove that folder to have it made again."
            )
        steps = part("steps").astype(np.int64)
        ends = np.cumsum(steps).astype(np.int32)
        ends[np.maximum.accumulate(steps == int(_LOST))] = -1
        return Reading(
            tokens=tokens,
            ends=ends,
            ids=part("ids").astype(np.int32),
            log_p=part("log_p").astype(np.float32),
            tail=part("tail").astype(np.float32),
            nats=part("nats"),
        )

    def occurring_ids(self) -> np.ndarray:
        """int64[n], every token id that is among the top k or in the text: what a lazy vocabulary map must cover."""
        found: set[int] = {self._prefix}
        for piece in range(len(self._pieces)):
            found.update(encode(self._tokenizer, self._pieces.text(piece)))
        for path in sorted(self._folder.glob("shard-*.safetensors")):
            found.update(np.unique(_load_shard(path)[0]["ids"]).tolist())
        return np.array(sorted(found), np.int64)
