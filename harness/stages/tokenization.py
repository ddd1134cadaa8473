"""The tokens stage: every passage encoded once for each tokenizer, by all processes that share the store."""

import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fusion.vocabulary.token_bytes import Vocabulary
from harness.data.passages import Passages
from harness.data.tokens import complete_tokens, part_members, part_path, write_part
from harness.runtime.progress import notify, track
from harness.store.artifacts import Estimate, Spec, Store
from harness.store.costs import BYTES_PER_TOKEN
from harness.store.leases import Leases

VERSION = 1
_POLL_S = 1.0
_BYTES_PER_SECOND = 1e6  # of text that one core encodes


def tokens_spec(label: str, passages: Spec, tokenizer: Mapping[str, Any]) -> Spec:
    """The key of the tokens of passages; `tokenizer` names what the tokenizer is read from (no weights, no prefix)."""
    return Spec("tokens", label, VERSION, {"passages": passages.fingerprint, "tokenizer": tokenizer}, {})


def make_tokens(
    store: Store, spec: Spec, passages_folder: Path, load_tokenizer: Callable[[], Any], *, n_bytes: float
) -> Path:
    """The artifact of all passages' tokens, which `harness.data.tokens.Tokens` reads.

    Any number of processes that share a file system can work on it, each on the parts whose leases it gets; the bytes
    do not depend on their number. `load_tokenizer` is called only where parts are missing. `n_bytes` of
    the passages are for the estimate.
    """

    def make_parts(folder: Path, leases: Leases) -> None:
        _make_parts(spec.label, folder, leases, Passages(passages_folder), load_tokenizer)

    def build(folder: Path) -> dict[str, Any]:
        return {"tokens": complete_tokens(folder, len(part_members(Passages(passages_folder))))}

    estimate = Estimate(
        disk=5 * n_bytes / BYTES_PER_TOKEN,
        memory=5e8,
        seconds=n_bytes / _BYTES_PER_SECOND / len(os.sched_getaffinity(0)),
    )
    return store.ensure(spec, build, estimate, make_parts=make_parts)


def _make_parts(
    label: str, folder: Path, leases: Leases, passages: Passages, load_tokenizer: Callable[[], Any]
) -> None:
    """Makes every part that no other process makes, and returns when all exist."""
    parts = part_members(passages)
    n_bytes = [int(passages.n_bytes[members.start : members.stop].sum()) for members in parts]
    missing = [index for index in range(len(parts)) if not part_path(folder, index).exists()]
    if not missing:
        return
    tokenizer = load_tokenizer()
    vocabulary = Vocabulary.from_tokenizer(tokenizer)
    waiting = False
    done = sum(n_bytes) - sum(n_bytes[index] for index in missing)
    with track(f"tokenise {label}", sum(n_bytes), "bytes", done=done) as advance:
        while missing:
            left = []
            for index in missing:
                path = part_path(folder, index)
                # Taken anew where the process that made it has given its leases back.
                if not path.exists() and leases.take(f"part-{index:06d}") and not path.exists():
                    write_part(path, leases.folder / uuid.uuid4().hex, passages, parts[index], tokenizer, vocabulary)
                if path.exists():
                    advance(n_bytes[index])
                else:
                    left.append(index)
            if len(left) == len(missing):
                if not waiting:
                    notify(f"{label}: other processes are encoding what is left; waiting for them.")
                    waiting = True
                time.sleep(_POLL_S)
            missing = left
