"""Where the reference inputs and real data lie; tests that need them say so when they are missing."""

import os
from pathlib import Path

import pytest

ROOT = Path(os.environ.get("FUSELLM_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def shared(path: str) -> Path:
    """The file or folder `path` of the reference inputs; skips the test where there are none, fails it under CI."""
    found = ROOT / path
    if not found.exists():
        message = f"{path} is not below {ROOT} (set FUSELLM_SHARED to the folder of reference inputs)"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return found
