"""A negative control: predictions whose knowledge of the text is destroyed."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np

from fusion.types import Predictions


def shuffled(predictions: Predictions, vocabulary_size: int) -> Predictions:
    """The same predictions in a random order within their passage, where one on average stays in its place.

    What remains is how the model's tokens are distributed on the whole; what it knows of the text is gone, so that
    nothing can be learnt of it. The order follows from the passage's tokens. The true next token has the probability
    that the distribution now at its position gives it, an equal share of the tail where it is not one of the k entries;
    the masses of all tokens that begin like it are unknown.
    """
    m = len(predictions.tokens)
    if predictions.skipped or m < 2:
        return predictions
    order = np.random.default_rng(zlib.crc32(predictions.tokens.tobytes())).permutation(m - 1)
    order = np.append(order, m - 1)  # what follows the passage's last token is not part of it
    ids, log_p, tail = predictions.ids[order], predictions.log_p[order], predictions.tail[order]
    true = ids[:-1] == predictions.tokens[1:, None]
    rest = tail[:-1] / max(vocabulary_size - ids.shape[1], 1)
    p = np.where(true.any(axis=1), np.exp(np.where(true, log_p[:-1], -np.inf)).sum(axis=1), rest)
    nats = np.append(-np.log(np.maximum(p, np.finfo(np.float32).tiny)), 0).astype(np.float32)
    return replace(predictions, ids=ids, log_p=log_p, tail=tail, nll=nats, prefix_nll=None)
