"""The map stage: the target token that stands for each token of a source's vocabulary."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fusion.vocabulary.maps import MAPS
from fusion.vocabulary.token_bytes import Vocabulary
from fusion.vocabulary.tokenization import encode_all
from harness.data.predictions import PredictionsReader
from harness.models.resolution import ResolvedModel
from harness.runtime.progress import track
from harness.store.artifacts import Estimate, Spec, Store

VERSION = 2
MAP_FILE = "map.npy"


def map_spec(source: str, predictions: Spec, target: ResolvedModel, kind: str, on: Literal["bytes", "strings"]) -> Spec:
    """The key of a map of the source's vocabulary onto the target's, for the tokens that its predictions hold."""
    inputs = {"extraction": predictions.fingerprint, "target": target.fingerprint}
    params = {"map": MAPS.choose(kind).identity(), "on": on}
    return Spec("map", f"{source}-to-{target.name}-{kind}-{on}", VERSION, inputs, params)


def make_map(
    store: Store,
    spec: Spec,
    source: Callable[[], PredictionsReader],
    target: Callable[[], tuple[Any, Vocabulary]],
    *,
    vocabulary_size: int,
) -> Path:
    """The artifact of a map, which `read_map` reads.

    `source` opens the source's predictions and `target` loads the target's tokenizer and vocabulary; they are called
    only where the map is not there yet. `vocabulary_size` is the source's, for the estimate of disk space.
    """

    def build(folder: Path) -> None:
        from fusion.alignment.pairing import consulted_ids
        from fusion.vocabulary.maps import build_map

        reader = source()
        tokenizer, vocabulary = target()
        only = consulted_ids(reader.vocabulary, reader.occurring_ids())
        with track(f"map {spec.label}", len(only), "tokens") as advance:
            reported = 0

            def progress(done: int, total: int) -> None:
                nonlocal reported
                advance((done - reported) * len(only) / max(total, 1))
                reported = done

            vocabulary_map = build_map(
                spec.params["map"]["name"],
                reader.vocabulary,
                vocabulary,
                on=spec.params["on"],
                only=only,
                encode_target=partial(encode_all, tokenizer),
                progress=progress,
            )
        unfinished = folder / f"{MAP_FILE}.tmp"
        with unfinished.open("wb") as file:
            np.save(file, vocabulary_map, allow_pickle=False)
        unfinished.replace(folder / MAP_FILE)

    return store.ensure(spec, build, Estimate(disk=4 * vocabulary_size, memory=1e9, seconds=10))


def read_map(folder: Path) -> np.ndarray:
    """The target ids int32[source vocabulary] of a map artifact; negative where a token has no image."""
    vocabulary_map: np.ndarray = np.load(folder / MAP_FILE, allow_pickle=False)
    return vocabulary_map
