"""Where the reference inputs and real data lie; tests that need them, or a tool, say so when they are missing."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("FUSELLM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """The file or folder `path` of the reference inputs; skips the test where there are none, fails it under CI."""
    found = ROOT / path
    needed(
        None if found.exists() else f"{path} is not below {ROOT} (set FUSELLM_SHARED to the folder of reference inputs)"
    )
    return found


def needed(refusal: str | None) -> None:
    """Skips the test where something that it needs is refused, and fails it under CI."""
    if refusal is not None:
        if os.environ.get("CI") == "true":
            pytest.fail(refusal)
        pytest.skip(refusal)
