"""Programs of this machine. None is ever taken from the current folder, which may be anybody's."""

import os
import shutil
from pathlib import Path


def search_path() -> str:
    """The absolute folders of PATH: an empty entry, `.` and `bin` would depend on the current folder."""
    entries = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return os.pathsep.join(entry for entry in entries if Path(entry).is_absolute())


def which(name: str) -> str | None:
    """The path of the program that `name` starts; None where there is none."""
    return shutil.which(name, path=search_path())
