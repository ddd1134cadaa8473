"""The map stage: the target token that stands for each token of a source's vocabulary."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusion.vocabulary.maps import MAPS, build_map
from fusion.vocabulary.pieces import PIECES, PieceMap, build_piece_map
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import encode_all
from harness.runtime.progress import track
from harness.store.artifacts import Estimate, Spec, Store
from harness.store.files import rename_durably

VERSION = 4
MAP_FILE = "map.npy"
PIECES_FILE = "pieces.npy"
_SECONDS = 1e-4  # of one core for a source token, by the slowest kinds: "mined" of Gemma onto SmolLM2 took 27 s


def map_spec(
    label: str,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    kind: str,
    on: Literal["bytes", "strings"],
) -> Spec:
    """The key of a map of one vocabulary onto another, each named by what it is read from (no text, no weights)."""
    params = {"map": MAPS.choose(kind).identity(), "on": on}
    return Spec("map", f"{label}-{kind}-{on}", VERSION, {"source": source, "target": target}, params)


def make_map(
    store: Store,
    spec: Spec,
    source: Callable[[], Vocabulary],
    target: Callable[[], tuple[Any, Vocabulary]],
    *,
    vocabulary_size: int,
) -> Path:
    """The artifact of a map of the whole vocabulary, which `read_map` reads.

    `source` loads the source's vocabulary and `target` the target's tokenizer and vocabulary; they are called only
    where the map is not there yet. `vocabulary_size` is the source's, for the estimate.
    """

    def build(folder: Path) -> None:
        own = source()
        tokenizer, vocabulary = target()
        kind, encode_target = spec.params["map"]["name"], partial(encode_all, tokenizer)
        with _progress(f"map {spec.label}", len(own), "tokens") as progress:
            vocabulary_map = build_map(
                kind,
                own,
                vocabulary,
                on=spec.params["on"],
                encode_target=encode_target,
                progress=progress,
            )
        _save(folder / MAP_FILE, vocabulary_map)
        if kind in PIECES:
            with _progress(f"pieces {spec.label}", len(own), "tokens") as progress:
                pieces = build_piece_map(kind, vocabulary_map, own, vocabulary, encode_target, progress=progress)
            _save(folder / PIECES_FILE, pieces.images)

    places = 8 if spec.params["map"]["name"] in PIECES else 1  # a token's bytes, and two more
    return store.ensure(spec, build, Estimate(4 * places * vocabulary_size, 1e9, 1 + _SECONDS * vocabulary_size))


@contextmanager
def _progress(description: str, tokens: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over `tokens`, moved by calls of (done, total) in another unit."""
    with track(description, tokens, unit) as advance:
        reported = 0

        def progress(done: int, total: int) -> None:
            nonlocal reported
            advance((done - reported) * tokens / max(total, 1))
            reported = done

        yield progress


def _save(path: Path, array: np.ndarray) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    with unfinished.open("wb") as file:
        np.save(file, array, allow_pickle=False)
    rename_durably(unfinished, path)


def read_map(folder: Path) -> np.ndarray:
    """The target ids int32[source vocabulary] of a map artifact; negative where a token has no image."""
    vocabulary_map: np.ndarray = np.load(folder / MAP_FILE, allow_pickle=False)
    return vocabulary_map


def read_pieces(folder: Path, source: Vocabulary) -> PieceMap | None:
    """What the source's tokens begin with in the target's; None where the map is of a kind that does not tell."""
    path = folder / PIECES_FILE
    return PieceMap.of(source, np.load(path, allow_pickle=False)) if path.exists() else None
