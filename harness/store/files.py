"""Small files and locks: a kill, a full disk, a power loss or a second process never leaves half a file under its name.

Data is on the disk before the name that it gets, and the name before the next step is begun.
"""

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.store.fingerprint import canonical, fingerprint

_FULL = 1 << 20  # free bytes of a disk below which a failed write that gives no reason is taken for a full disk
_NO_SPACE = ("No space left", "Disk quota exceeded")
_FAILED_WRITE = ("file write failed", "unexpected pos", "requested and")  # torch.save and numpy, which give no reason


def sync(path: Path) -> None:
    """Returns when the file, or the names in the folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def sync_all(path: Path) -> None:
    """Returns when a file, or a folder with all that is in it, is on the disk."""
    for inside in path.rglob("*") if path.is_dir() else ():
        if not inside.is_symlink():
            sync(inside)
    sync(path)


def rename_durably(beside: Path, path: Path) -> None:
    """Gives a file, or a folder with all that is in it, its final name, when its data is on the disk.

    A file that has the name is replaced.
    """
    sync_all(beside)
    beside.replace(path)
    sync(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file beside `path`, syncs it and renames it: a reader sees the old text or the new, never a part.

    Half a surrogate pair, which has no form in UTF-8, is written as a backslash escape; JSON reads it back.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        rename_durably(beside, path)
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


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises ValueError, with a reason that can be shown, for anything that Python cannot read as JSON in UTF-8.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None
    except ValueError:  # of int()
        raise ValueError("it has a number of too many digits") from None


def stamp(file: Path) -> list[int]:
    """What is another where a file's bytes are: size (bytes), time of its content and of its inode (ns), and inode.

    A file that is put in the place of one of its size and time (`cp -p`, `rsync --times`) is another inode, or its
    inode was changed later.
    """
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def remembered(record: Path, files: Iterable[Path], compute: Callable[[], str]) -> str:
    """What `compute` gives of the bytes of files; remembered in the JSON file `record` by paths and `stamp`."""
    key = fingerprint([[str(file), *stamp(file)] for file in files])
    known: dict[str, str] = {}
    with contextlib.suppress(FileNotFoundError, UserError):
        known = read_json_object(record, "it is made again")
    if key not in known:
        known[key] = compute()
        # Concurrent writers can lose each other's entries, which costs a second hashing and nothing else.
        record.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(record, canonical(known))
    return known[key]


def intact_lines(path: Path) -> list[str]:
    """The JSON objects, one a line with its end, of a file that is appended to; none where there is no file.

    A last line that a kill has cut short, and lines that a power loss has filled with other bytes, are dropped.
    """
    lines = []
    for raw in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        with contextlib.suppress(ValueError):
            if raw.endswith(b"\n") and isinstance(parse_json(raw), dict):
                lines.append(raw.decode("utf-8"))
    return lines


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError, ending in `remedy`, for anything else than a JSON object."""
    try:
        value = parse_json(path.read_bytes())
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
        value: dict[str, Any] = parse_json(path.read_bytes())
        whole = value.pop("checksum") == fingerprint(value)
    except (ValueError, TypeError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{path} is damaged or of another version: {remedy}.")
    return value


def stamps_of(folder: Path) -> dict[str, list[int]]:
    """The stamp of every file in a folder, by its name relative to it."""
    files = (Path(above, name) for above, _, names in os.walk(folder) for name in names)
    return {str(file.relative_to(folder)): stamp(file) for file in files}


def write_stamps(path: Path, stamps: Mapping[str, list[int]]) -> None:
    """Notes the stamps of files that were hashed."""
    with contextlib.suppress(OSError):  # a read-only folder: they are hashed by every process
        write_atomically(path, canonical(stamps))


def read_stamps(path: Path) -> Any:
    """The stamps that files had when they were last hashed; None where that is not known."""
    with contextlib.suppress(OSError, ValueError):
        return parse_json(path.read_bytes())
    return None


def seconds_since_change(folder: Path) -> float:
    """How long ago the last file of a folder was written; 0 where there is none."""
    last = max((changed / 1e9 for _, changed, *_ in stamps_of(folder).values()), default=time.time())
    return max(time.time() - last, 0.0)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raises OSError (ENOSPC) in place of whatever a library raises when the disk of `folder` is full.

    An error that does not speak of writing is left as it is, however full the disk.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        is_os_error = isinstance(error, OSError) and error.errno is not None
        said = f"{error} {error.__cause__ or error.__context__}"
        is_full = any(words in said for words in _NO_SPACE)
        if any(words in said for words in _FAILED_WRITE):
            is_full = shutil.disk_usage(folder.parent).free < _FULL
        if is_os_error or not is_full:
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
