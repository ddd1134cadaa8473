"""Fingerprints: SHA-256 hashes of JSON values and of files, which name artifacts and detect changed bytes."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text. ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def plain_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """The value in JSON's own types (tuples become lists), as a manifest holds it."""
    plain: dict[str, Any] = json.loads(canonical(value))
    return plain


def fingerprint(value: Any) -> str:
    """SHA-256 (hexadecimal) of a JSON value, independent of the order of keys."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
