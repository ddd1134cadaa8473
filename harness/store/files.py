"""Small files and locks: a kill, a full disk or a second process never leaves half a file under its final name."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.store.fingerprint import fingerprint

_FULL = 1 << 20  # free bytes of a disk below which a failed write is taken for a full disk


def write_atomically(path: Path, text: str) -> None:
    """Writes a file beside `path`, syncs it and renames it: a reader sees the old text or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def make_folder(folder: Path, option: str) -> None:
    """Makes a folder that the user chose by `option` (`--root`, `--out`), with those above it; it may be there already.

    Raises UserError where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({error.strerror}): choose another {option}.") from None


def whole_lines(path: Path) -> list[str]:
    """The complete lines of a file that is appended to; a last line without its end, cut short by a kill, is dropped.

    A file that does not exist has no lines.
    """
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, ending in `remedy`, for anything else than a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object in UTF-8: {remedy}.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object together with its own checksum (see `read_json`)."""
    checksum = fingerprint(json.loads(json.dumps(value)))
    write_atomically(path, json.dumps({**value, "checksum": checksum}, indent=1, ensure_ascii=False))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object that `write_json` wrote. Raises UserError, ending in `remedy`, when the file has been changed."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = value.pop("checksum") == fingerprint(value)
    except (ValueError, TypeError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged or of another version: {remedy}.")
    return value


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raises OSError (ENOSPC) in place of whatever a library raises when the disk of `folder` is full."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        is_os_error = isinstance(error, OSError) and error.errno is not None
        if is_os_error or (shutil.disk_usage(folder.parent).free >= _FULL and "No space left" not in str(error)):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


@contextlib.contextmanager
def exclusive_lock(lock: Path, what: str) -> Iterator[None]:
    """Holds the lock file, after waiting for any other process that holds it; `what` names it while waiting."""
    from filelock import FileLock, Timeout

    from harness.runtime.progress import notify

    held = FileLock(lock)
    try:
        held.acquire(timeout=1)
    except Timeout:
        notify(f"{what}: another process is at work on it, waiting for that ...")
        held.acquire()
    try:
        yield
    finally:
        held.release()
