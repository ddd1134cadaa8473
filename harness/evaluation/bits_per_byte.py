"""The perplexity suite: nats and bytes of every document, from which bits per byte follow."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusion.errors import UserError
from fusion.inference.ensembles import PrefixCachedEnsemble
from fusion.inference.likelihood import document_nats, window_stride
from fusion.vocabulary.token_bytes import encode, prefix_id
from harness.config.loading import PerplexityConfig
from harness.data.corpus import Document
from harness.runtime.progress import track
from harness.store.artifacts import Spec
from harness.store.files import read_json, write_json
from harness.store.fingerprint import fingerprint

VERSION = 2
SUITE = "perplexity"
METRIC = {"rolling": "bits_per_byte", "strided": "bits_per_byte_strided"}
_PART = 32  # documents measured between two savings


def documents_fingerprint(documents: Sequence[Document]) -> str:
    """SHA-256 over the documents as they are measured: identity, domain and the text that was taken."""
    return fingerprint([[d.sha256, d.domain, d.text] for d in documents])


def measure(
    model: nn.Module | PrefixCachedEnsemble,
    tokenizer: Any,
    documents: Sequence[Document],
    section: PerplexityConfig,
    *,
    batch_tokens: int,
    progress: Callable[[float], object] | None = None,
) -> list[dict[str, Any]]:
    """One row a document: example (SHA-256), domain, nats, bytes."""
    tokens = [encode(tokenizer, d.text) for d in documents]
    try:
        nats = document_nats(
            model,
            tokens,
            prefix=prefix_id(tokenizer),
            window=section.window,
            mode=section.mode,
            stride=section.stride,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    except UserError as error:
        raise UserError(f"perplexity of {', '.join(d.name for d in documents[:3])} ...: {error}") from None
    return [
        {"example": d.sha256, "domain": d.domain, "nats": float(n), "bytes": len(d.text.encode("utf-8"))}
        for d, n in zip(documents, nats, strict=True)
    ]


def evaluation_spec(
    label: str, model: str, documents: Sequence[Document], section: PerplexityConfig, *, dtype: str, batch_tokens: int
) -> Spec:
    stride = window_stride(section.mode, section.window, section.stride)
    return Spec(
        "perplexity",
        label,
        VERSION,
        {"model": model, "documents": documents_fingerprint(documents)},
        {"window": section.window, "mode": section.mode, "stride": stride, "dtype": dtype},
        {"batch_tokens": batch_tokens},
    )


def evaluate(
    folder: Path,
    load: Callable[[], tuple[nn.Module | PrefixCachedEnsemble, Any]],
    documents: Sequence[Document],
    section: PerplexityConfig,
    *,
    label: str,
    batch_tokens: int,
) -> None:
    """Measures the documents part by part; parts that an interrupted run finished are kept."""
    parts = [documents[start : start + _PART] for start in range(0, len(documents), _PART)]
    paths = [folder / f"part-{number:05d}.json" for number in range(len(parts))]
    todo = [i for i, path in enumerate(paths) if not path.exists()]
    for path in set(paths) - {paths[i] for i in todo}:
        read_json(path, "remove that file to have it made again")
    if not todo:
        return
    model, tokenizer = load()
    context: Any = (
        model.positions
        if isinstance(model, PrefixCachedEnsemble)
        else getattr(model.config, "max_position_embeddings", None)
    )
    if context and section.window > context:
        raise UserError(f"perplexity window {section.window} exceeds the context of {label}, {context}: lower it.")
    sizes = [sum(len(d.text.encode("utf-8")) for d in part) for part in parts]
    done = sum(sizes) - sum(sizes[i] for i in todo)
    with track(f"perplexity {label}", sum(sizes), "bytes", done=done) as advance:
        for i in todo:
            with torch.inference_mode():
                rows = measure(model, tokenizer, parts[i], section, batch_tokens=batch_tokens)
            write_json(paths[i], {"rows": rows})
            advance(sizes[i])


def read_evaluation(folder: Path) -> list[dict[str, Any]]:
    """All rows of a stored evaluation, in the order of the documents."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("part-*.json")):
        rows += read_json(path, f"remove {folder} to have it made again")["rows"]
    return rows
