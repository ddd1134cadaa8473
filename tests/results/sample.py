"""Records as a small run would leave them."""

from collections.abc import Sequence

import numpy as np

from results.records import Record

DOCUMENTS = {"code": 24, "news": 30}


def final(
    method: str,
    seeds: tuple[int, ...] = (0,),
    shift: float = 0.0,
    documents: dict[str, int] = DOCUMENTS,
    profile: str = "small",
    noise: float = 0.02,
) -> list[Record]:
    """Final evaluations; size and difficulty are the document's, `shift` (nats per byte) and noise the method's."""
    records = []
    for task, n in documents.items():
        data = np.random.default_rng(sum(task.encode()))
        size, rate = data.integers(200, 1000, n), data.normal(0.7, 0.1, n)
        for seed in seeds:
            own = np.random.default_rng([sum(method.encode()), seed + 1, n]).normal(0, noise, n)
            records += [
                Record(
                    "main", profile, method, seed, "perplexity", task, f"doc{i:03}", "bits_per_byte",
                    float(size[i] * (rate[i] + shift + own[i])), float(size[i]),
                )
                for i in range(n)
            ]  # fmt: skip
    return records


def curve(method: str, nats: dict[int, float], seed: int = 0, tasks: tuple[str, ...] = ("a", "b")) -> list[Record]:
    """Evaluations along a training: nats per byte by training tokens, over two documents a domain."""
    return [
        Record(
            "main", "small", method, seed, "perplexity", task, f"doc{i}", "bits_per_byte", 100 * rate, 100.0, tokens=at
        )
        for at, rate in nats.items()
        for task in tasks
        for i in range(2)
    ]


def scores(
    method: str,
    task: str,
    values: Sequence[float],
    seed: int = 0,
    suite: str = "commonsense",
    metric: str = "acc",
    of: float = 1.0,
    experiment: str = "main",
) -> list[Record]:
    """One score an example: `values` out of `of`."""
    return [
        Record(experiment, "small", method, seed, suite, task, f"{i:04}", metric, float(value), of)
        for i, value in enumerate(values)
    ]
