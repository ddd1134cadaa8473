"""The artifact store: folders named by what made them, complete or absent, refused when their bytes have changed.

An artifact's fingerprint covers its inputs, its parameters and its stage's VERSION. It is built in a hidden folder
beside its place and renamed into place when complete, so that whatever is found under its name is whole. What a
killed stage had finished stays in the hidden folder for the next start.
"""

import contextlib
import errno
import hashlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fusion.errors import UserError
from harness.runtime import distributed
from harness.runtime.memory import trim_heap
from harness.store.leases import Leases, in_use
from harness.store.provenance import made_by

MANIFEST = "manifest.json"
_IDENTITY = ("kind", "version", "inputs", "params")
_FULL = 1 << 20  # free bytes of a disk on which a failed write needs no other explanation


@dataclass(frozen=True)
class Spec:
    """What an artifact is made of.

    `inputs` holds fingerprints of what it is made from, `params` every parameter that can change its bytes. `info` is
    written to the manifest and is no part of the fingerprint (batch sizes, labels, the resolved configuration).
    """

    kind: str
    label: str
    version: int
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def identity(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _IDENTITY}

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identity())

    @property
    def folder_name(self) -> str:
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in self.label)
        return f"{safe}-{self.fingerprint[:16]}"


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to cost: bytes on disk, bytes of memory, seconds."""

    disk: float = 0
    memory: float = 0
    seconds: float = 0


@dataclass(frozen=True)
class Planned:
    """One line of a plan: an artifact, what is there of it, and what making it costs."""

    spec: Spec
    path: Path
    state: str  # "ready", "partial" or "missing"
    estimate: Estimate


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def plain_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """Plain JSON values (tuples become lists), as a manifest will hold them."""
    plain: dict[str, Any] = json.loads(canonical(value))
    return plain


def fingerprint(value: Any) -> str:
    """SHA-256 (hexadecimal) of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes beside `path`, syncs and renames: a reader sees the old text or the new, never a part."""
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


def whole_lines(path: Path) -> list[str]:
    """Lines of a file that is appended to; the last one may have been cut short by a kill and is left out then."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object that carries its own checksum (see `read_json`)."""
    checksum = fingerprint(json.loads(json.dumps(value)))
    write_atomically(path, json.dumps({**value, "checksum": checksum}, indent=1, ensure_ascii=False))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_json` wrote. Raises UserError, ending in `remedy`, when the file is not as it was written."""
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
    """What libraries raise when they cannot write to a full disk becomes the OSError that it is."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        said = isinstance(error, OSError) and error.errno is not None
        if said or (shutil.disk_usage(folder.parent).free >= _FULL and "No space left" not in str(error)):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


class PeakMemory:
    """The most resident memory (bytes) of this process between entering and leaving, in `bytes`; may be nested.

    Linux keeps one high-water mark a process, so that a stage after a larger one would be given the larger one's: the
    mark is set back at the start, and what it was goes to the stage around. Elsewhere it is that of the whole process.
    """

    _open: ClassVar[list["PeakMemory"]] = []

    def __enter__(self) -> "PeakMemory":
        self._note()
        self.bytes = 0
        self._open.append(self)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return self

    def __exit__(self, *_: object) -> None:
        self._note()
        self._open.remove(self)

    @classmethod
    def _note(cls) -> None:
        try:
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
        except (OSError, IndexError):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for stage in cls._open:
            stage.bytes = max(stage.bytes, peak)


class Store:
    """All artifacts below one folder. With `dry=True` nothing is made: `ensure` only notes what it would make."""

    def __init__(self, root: Path, *, dry: bool = False, info: Mapping[str, Any] | None = None) -> None:
        """`info` is written to every manifest, beside the artifact's own (the resolved configuration)."""
        self.root = root
        self._info = info or {}
        self.dry = dry
        self.planned: dict[str, Planned] = {}
        self._verified: set[Path] = set()

    def path(self, spec: Spec) -> Path:
        """Where the artifact is or will be: the label is for people, the fingerprint alone decides."""
        folder = self.root / spec.kind
        made = sorted(folder.glob(f"*-{spec.fingerprint[:16]}"))
        return made[0] if made else folder / spec.folder_name

    def _partial_folder(self, spec: Spec) -> Path:
        return self.root / spec.kind / f".{spec.fingerprint[:16]}.partial"

    def ensure(
        self,
        spec: Spec,
        build: Callable[[Path], Mapping[str, Any] | None],
        estimate: Estimate | None = None,
        *,
        make_parts: Callable[[Path, Leases], None] | None = None,
        on_all_ranks: bool = False,
    ) -> Path:
        """The artifact's folder, made by `build(folder)` when it is not there.

        `build` may find what an interrupted run left in the folder and must go on from there; what it returns is
        written to the manifest's `info`. It runs in one process (of several ranks the first), for which others wait;
        `on_all_ranks` has all ranks call it, on one folder. `make_parts(folder, leases)` goes before it and runs in all
        processes that ask, at the same time: it makes the parts that it can claim and returns when there is no other to
        wait for. Raises UserError when the artifact's bytes do not match its manifest or the folder cannot be written.
        """
        path = self.path(spec)
        state = "ready" if path.exists() else "partial" if self._partial_folder(spec).exists() else "missing"
        self.planned.setdefault(spec.fingerprint, Planned(spec, path, state, estimate or Estimate()))
        if self.dry:
            return path
        if not distributed.is_main_process():
            if make_parts is not None and not path.exists():
                self._make_parts(spec, make_parts)
            if on_all_ranks and distributed.broadcast(False):
                build(self._partial_folder(spec))
            distributed.wait_until(lambda: self.path(spec).exists())
            return self.path(spec)  # the first rank has verified it, or is about to and would end the run
        if not path.exists():
            self._make(spec, path, build, make_parts, on_all_ranks)
            path = self.path(spec)
        elif on_all_ranks:
            distributed.broadcast(False)
        self.verify(path, spec)
        return path

    def _make(
        self,
        spec: Spec,
        path: Path,
        build: Callable[[Path], Mapping[str, Any] | None],
        make_parts: Callable[[Path, Leases], None] | None,
        on_all_ranks: bool,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = self._partial_folder(spec)
        started, resumed = time.time(), folder.exists()
        trim_heap()  # this stage's memory is not to be that of the one before
        with contextlib.ExitStack() as held:
            with PeakMemory() as peak, disk_errors(folder):
                if make_parts is not None:
                    self._make_parts(spec, make_parts)
                # The first rank holds it for all.
                held.enter_context(exclusive_lock(folder.with_suffix(".lock"), f"{spec.kind} {spec.label}"))
                missing = not self.path(spec).exists()  # another process may have finished it while we waited
                if make_parts is None:
                    started, resumed = time.time(), folder.exists()
                if missing:
                    folder.mkdir(exist_ok=True)
                    for unfinished in folder.rglob(".*"):  # what a kill left of `write_atomically`
                        if unfinished.is_file():
                            unfinished.unlink()
                if on_all_ranks:
                    distributed.broadcast(missing)
                found = build(folder) if missing else None
            if missing:
                self._complete(spec, folder, path, started, resumed, peak.bytes, found or {})
            shutil.rmtree(_leases(folder), ignore_errors=True)

    def _make_parts(self, spec: Spec, make_parts: Callable[[Path, Leases], None]) -> None:
        folder = self._partial_folder(spec)
        leases = _leases(folder)
        folder.mkdir(parents=True, exist_ok=True)
        leases.mkdir(exist_ok=True)
        if self.path(spec).exists():  # completed before we had made a folder, which nobody wants now
            with contextlib.suppress(OSError):
                folder.rmdir()
            return
        try:
            with Leases(leases) as ours:
                make_parts(folder, ours)
        except FileNotFoundError:
            if not self.path(spec).exists():
                raise
            # Else another process has completed the artifact under our hands.

    def _complete(
        self,
        spec: Spec,
        folder: Path,
        path: Path,
        started: float,
        resumed: bool,
        peak_memory: int,
        found: Mapping[str, Any],
    ) -> None:
        files = {
            str(file.relative_to(folder)): {"sha256": file_sha256(file), "bytes": file.stat().st_size}
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != MANIFEST
        }
        manifest = {
            **spec.identity(),
            "label": spec.label,
            "fingerprint": spec.fingerprint,
            "info": {**self._info, **spec.info, **found},
            **made_by(),
            "files": files,
            "duration_s": round(time.time() - started, 2),
            "resumed": resumed,
            "peak_memory_bytes": peak_memory,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        }
        write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False))
        folder.replace(path)

    def verify(self, path: Path, spec: Spec | None = None) -> dict[str, Any]:
        """Checks every file against the manifest (once a process) and returns the manifest.

        Raises UserError naming the first file that is missing, added or changed.
        """
        manifest = read_manifest(path)
        if spec is not None and manifest["fingerprint"] != spec.fingerprint:
            raise UserError(f"{path} holds another artifact than its name says: remove that folder and run again.")
        if path in self._verified:
            return manifest
        remedy = "remove that artifact's folder to have it made again"
        found = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file() and f.name != MANIFEST}
        if strange := sorted(found ^ set(manifest["files"])):
            raise UserError(f"{path / strange[0]} is not as the artifact's manifest lists it: {remedy}.")
        for name, expected in manifest["files"].items():
            file = path / name
            if expected != {"bytes": file.stat().st_size, "sha256": file_sha256(file)}:
                raise UserError(f"{file} does not match its SHA-256 in the manifest: {remedy}.")
        self._verified.add(path)
        return manifest

    def artifacts(self) -> Iterator[Path]:
        """Every complete artifact's folder, in order of kind and name."""
        for manifest in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            if not manifest.parent.name.startswith("."):
                yield manifest.parent

    def leftovers(self) -> Iterator[Path]:
        """What interrupted stages and clean-ups left behind; not what a stage is working on now."""
        from filelock import FileLock, Timeout

        for folder in sorted(p for end in ("partial", "leases", "removed") for p in self.root.glob(f"*/.*.{end}")):
            if folder.suffix == ".leases" and folder.with_suffix(".partial").exists():
                continue  # they belong to it
            try:
                with FileLock(folder.with_suffix(".lock"), timeout=0):
                    pass
            except Timeout:
                continue
            if not in_use(_leases(folder)):
                yield folder


def _leases(partial: Path) -> Path:
    """Where the processes that share an unfinished artifact lay their claims."""
    return partial.with_suffix(".leases")


def read_manifest(path: Path) -> dict[str, Any]:
    """An artifact's manifest. Raises UserError when there is none or it cannot be read."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        whole = manifest["fingerprint"] == fingerprint({name: manifest[name] for name in _IDENTITY})
        whole &= {"created", "duration_s", "peak_memory_bytes"} <= manifest.keys()
        whole &= all(file.keys() == {"bytes", "sha256"} for file in manifest["files"].values())
    except FileNotFoundError:
        raise UserError(f"{path} is no complete artifact: it has no {MANIFEST}.") from None
    except (ValueError, TypeError, AttributeError, KeyError):
        whole = False
    if not whole:
        raise UserError(f"{path / MANIFEST} is damaged: remove that folder to have it made again.")
    return manifest


@contextlib.contextmanager
def exclusive_lock(lock: Path, what: str) -> Iterator[None]:
    """Waits until no other process holds `lock`, and says so when that takes a while."""
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
