"""Maps, alignments, and what the data loader does with them."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np

from benchmarks.support import machine, reference_implementation
from benchmarks.support.inputs import SOURCE, TARGET, Inputs
from benchmarks.support.page import Result
from fusion.alignment.fuse import Source, fuse_sequence
from fusion.alignment.pairing import ALIGNMENTS, same_end
from fusion.switches import PRESETS, Switches
from fusion.vocabulary.edit_distance import Targets, code_points, to_alphabet
from fusion.vocabulary.maps import MAPS, MapTask
from fusion.vocabulary.pieces import PieceMap, build_piece_map
from fusion.vocabulary.token_bytes import Vocabulary, respace

_SEED = 0
_TWO = ("first", "second")  # the source read by the texts' other model stands for two


def maps(inputs: Inputs, *, quick: bool) -> list[Result]:
    """MinED of the whole source vocabulary onto the target's."""
    generator = np.random.default_rng(_SEED)
    drawn = generator.permutation(np.flatnonzero([bool(b) for b in inputs.vocabularies[SOURCE].token_bytes]))
    everything = drawn[:2000] if quick else drawn
    return [
        _map(inputs, "strings", everything, 45.0, "MinED of {} gemma tokens onto {} of smol, strings", quick),
        _map(inputs, "bytes", everything, 120.0, "MinED of {} gemma tokens onto {} of smol, bytes", quick),
    ]


def _mined(inputs: Inputs, on: Literal["strings", "bytes"], ids: np.ndarray) -> np.ndarray:
    """int32[V]: the images of some source tokens; -1 for all others."""
    source, target = inputs.vocabularies[SOURCE], inputs.vocabularies[TARGET]
    image = np.full(len(source), -1, np.int32)
    image[ids] = MAPS.choose("mined").value(MapTask(source, target, on, ids, None, lambda done, total: None))
    return image


def _map(
    inputs: Inputs, on: Literal["strings", "bytes"], ids: np.ndarray, goal: float, what: str, quick: bool
) -> Result:
    _mined(inputs, on, ids[:50])  # compiles
    image = np.empty(0)

    def run() -> None:
        nonlocal image
        image = _mined(inputs, on, ids)

    taken = machine.seconds(run, repeat=1, warm=False)
    sample = np.random.default_rng(_SEED).choice(ids, 4 if quick else 300, replace=False)
    texts, candidates, places = _texts(inputs, on, sample)
    found: list[int] = []
    reference = machine.seconds(
        lambda: found.extend(reference_implementation.mined(texts, candidates)), repeat=1, warm=False
    )
    _same(f"the map on {on}", image[sample], [places[i] for i in found])
    return Result(
        what.format(f"{len(ids):,}", f"{len(candidates):,}"),
        "s",
        taken,
        goal,
        reference=reference * len(ids) / len(sample),
        roofline=_search_limit(inputs, on, ids) / machine.cores(),
        note=f"on {machine.cores()} cores. Reference: one compiled distance a pair in a loop, extrapolated from "
        f"{len(sample)} tokens drawn at random, whose images are equal. Roofline: the bit-parallel recurrence over all "
        "pairs (common prefixes once, equal patterns once) at the rate of 64-bit integer operations, "
        f"{machine.integer_operations() / 1e9:.0f} billion a second and core.",
    )


def _texts(inputs: Inputs, on: Literal["strings", "bytes"], ids: np.ndarray) -> tuple[list, list, list[int]]:
    """What the map compares: the source tokens `ids`, the target's tokens, and the ids of those."""
    source, target = inputs.vocabularies[SOURCE], inputs.vocabularies[TARGET]
    spelled: tuple = target.tokens if on == "strings" else target.token_bytes
    if on == "strings":
        texts: list = [respace(source.tokens[i], source.space, target.space) for i in ids]
    else:
        texts = [source.token_bytes[i] for i in ids]
    places = [i for i, token in enumerate(spelled) if token]
    return texts, [spelled[i] for i in places], places


def _search_limit(inputs: Inputs, on: Literal["strings", "bytes"], ids: np.ndarray) -> float:
    """Seconds of one core for the arithmetic of the edit distance: 16 operations a character and 9 a distance."""
    texts, candidates, _ = _texts(inputs, on, ids)
    known = set(candidates)
    inexact = [text for text in texts if text not in known]
    patterns, strings, alphabet = to_alphabet(code_points(inexact), code_points(candidates))
    distinct = {patterns.codes[a:b].tobytes() for a, b in pairwise(patterns.offsets.tolist())}
    targets = Targets.build(strings, alphabet)
    columns = int((targets.strings.lengths - targets.shared).sum())
    return len(distinct) * (16 * columns + 9 * len(candidates)) / machine.integer_operations()


def alignments(inputs: Inputs, *, quick: bool) -> list[Result]:
    """Same end and dynamic time warping of a text of 2,048 target tokens."""
    count = 256 if quick else 2048
    source, target = inputs.vocabularies[SOURCE], inputs.vocabularies[TARGET]
    ends = {}
    for name in (SOURCE, TARGET):
        parts = [text[name].byte_ends for text in inputs.texts]
        ends[name] = np.concatenate([parts[0], parts[1] + parts[0][-1]]).astype(np.int32)
    target_ends = ends[TARGET][:count]
    source_ends = ends[SOURCE][: int((ends[SOURCE] <= target_ends[-1]).sum())]
    tokens = inputs.tokens(SOURCE, len(source_ends)), inputs.tokens(TARGET, count)

    _same(
        "same end",
        same_end(source_ends, target_ends),
        reference_implementation.same_end(source_ends.tolist(), target_ends.tolist()),
    )
    lists = source_ends.tolist(), target_ends.tolist()
    by_end = Result(
        f"same-end alignment of {count:,} tokens",
        "ms",
        1e3 * machine.seconds(lambda: same_end(source_ends, target_ends), repeat=101),
        1.0,
        reference=1e3 * machine.seconds(lambda: reference_implementation.same_end(*lists), repeat=21),
        roofline=1e3 * (source_ends.nbytes + 2 * target_ends.nbytes) / machine.bandwidth(),
        note="Reference: a dictionary and a loop (the published algorithm has the warping of the next line only). "
        f"Roofline: reading and writing the arrays once, at {machine.bandwidth() / 1e9:.0f} GB/s.",
    )

    nothing = np.full(len(source), -1, np.int32)
    strings = [source.tokens[i].replace(source.space, "") for i in tokens[0].tolist()]
    others = [target.tokens[i].replace(target.space, "") for i in tokens[1].tolist()]
    paths: list[list[list[int]]] = []
    reference = machine.seconds(
        lambda: paths.append(reference_implementation.warping_path(strings, others)), repeat=1, warm=False
    )

    def warp() -> np.ndarray:
        return ALIGNMENTS.get("dtw")(tokens[0], source_ends, tokens[1], target_ends, source, target, nothing)

    spaced = [respace(source.tokens[i], source.space, target.space) for i in tokens[0].tolist()]
    expected = [
        pairs[0] if len(pairs) == 1 and spaced[pairs[0]] == target.tokens[t] else -1
        for pairs, t in zip(paths[0], tokens[1].tolist(), strict=True)
    ]
    _same("dynamic time warping", warp(), expected)
    warped = Result(
        f"DTW alignment of {count:,} tokens with {len(source_ends):,}",
        "ms",
        1e3 * machine.seconds(warp, repeat=21),
        25.0,
        reference=1e3 * reference,
        roofline=1e3 * len(source_ends) * count * 9 / (2 * machine.integer_operations()),
        note="Reference: the quadratic program in Python with a compiled distance a pair, whole; the pairs are equal. "
        "Roofline: nine 32-bit operations a cell, two in the place of a 64-bit one.",
    )
    return [by_end, warped]


def fusing(inputs: Inputs, *, quick: bool) -> list[Result]:
    """Projecting and fusing a sequence of passages: everything that `fuse_sequence` does."""
    source, target = inputs.vocabularies[SOURCE], inputs.vocabularies[TARGET]
    passages = inputs.row(520 if quick else 2060)
    occurring = np.unique(np.concatenate([np.append(t[SOURCE].ids, t[SOURCE].tokens) for t in inputs.texts]))
    image = _mined(inputs, "strings", occurring)
    predictions = [{TARGET: p.predictions[TARGET], **dict.fromkeys(_TWO, p.predictions[SOURCE])} for p in passages]
    pieces = _pieces(source, target)
    sources = [Source(name, source, image, pieces) for name in _TWO]
    n_bytes = [passage.n_bytes for passage in passages]
    positions = sum(len(passage[TARGET].tokens) for passage in predictions)
    members = 1 + len(sources)

    def fuse(switches: Switches) -> np.ndarray:
        row = fuse_sequence(
            predictions, n_bytes, target=TARGET, sources=sources, target_vocabulary=target, switches=switches
        )
        dense = np.zeros((positions, len(target) + 1), np.float32)
        np.put_along_axis(dense, row.targets.ids.astype(np.int64), row.targets.p, axis=1)  # pads go to the last column
        return dense[:, :-1]

    taken = machine.seconds(
        lambda: fuse_sequence(
            predictions, n_bytes, target=TARGET, sources=sources, target_vocabulary=target, switches=Switches()
        ),
        repeat=31,
    )
    pairs = [
        reference_implementation.partners(p.predictions[SOURCE], p.predictions[TARGET], source, target, image)
        for p in passages
    ]
    aligned, images = dict.fromkeys(_TWO, pairs), dict.fromkeys(_TWO, image)
    fused = []
    reference = machine.seconds(
        lambda: fused.append(reference_implementation.fuse(predictions, aligned, images, TARGET, len(target))),
        repeat=1,
        warm=False,
    )
    ours = fuse(Switches(**PRESETS["published"]))
    if not np.allclose(ours, fused[0].numpy(), atol=1e-6):
        raise AssertionError("the fused distributions differ from those of the plain re-implementation")
    k = predictions[0][TARGET].ids.shape[1]
    return [
        Result(
            f"fusing a sequence of {positions:,} positions in {len(passages)} passages, {members} models",
            "million positions/s a source",
            positions * members / taken / 1e6,
            1.0,
            "more",
            reference=positions * members / reference / 1e6,
            roofline=machine.bandwidth() / (k * (4 + 4) * 2) / 1e6,
            note="the target and one other model's predictions given twice, as two sources; preset `corrected`, along "
            f"the text, {1e3 * taken:.1f} ms a sequence. Reference: loops over "
            f"positions, dense distributions over {len(target):,} ids and a selection among them ({reference:.1f} s a "
            "sequence), without the alignment; the preset `published` gives the same distributions to 1e-6. Roofline: "
            "copying the top ten once.",
        )
    ]


def _pieces(source: Vocabulary, target: Vocabulary) -> PieceMap:
    """What the source's tokens begin with; the longest target token, since there is no tokenizer to ask."""
    ids = {token: i for i, token in reversed(list(enumerate(target.token_bytes))) if token}

    def encode_target(texts: Sequence[str]) -> list[list[int]]:
        return [[ids.get(text.encode(), -1)] for text in texts]

    control = np.full(len(source), -1, np.int32)
    return build_piece_map("byte_prefix", control, source, target, encode_target)


def _same(what: str, ours: object, reference: object) -> None:
    if not np.array_equal(np.asarray(ours), np.asarray(reference)):
        raise AssertionError(f"{what} differs from that of the plain re-implementation")
