"""The artifact store: folders named by a fingerprint of what they are made of, complete or absent, checked when read.

An artifact's fingerprint covers its kind, its inputs, its parameters and its stage's VERSION. It is built in a hidden
folder beside its place and renamed when complete, so that a folder under its final name is always whole. The parts that
a killed stage had finished stay in the hidden folder, and the next start goes on from them.
"""

import contextlib
import copy
import glob
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from fusion.errors import UserError
from harness.runtime import distributed
from harness.runtime.memory import PeakMemory, release_memory
from harness.runtime.progress import stage
from harness.store.files import (
    disk_errors,
    exclusive_lock,
    make_folder,
    read_json,
    read_stamps,
    rename_durably,
    seconds_since_change,
    stamp,
    stamps_of,
    write_json,
    write_stamps,
)
from harness.store.fingerprint import canonical, file_sha256, fingerprint
from harness.store.leases import InUse, Leases, MakeParts, names_in_use
from harness.store.paths import HASHES, IN_USE, MANIFEST, MODELS, place_of_artifact, safe_name
from harness.store.provenance import made_by
from harness.store.run_files import note_artifacts

_IDENTITY = ("kind", "version", "inputs", "params")
_KEY_DIGITS = 16  # of the fingerprint, in names of folders


@dataclass(frozen=True)
class Spec:
    """What an artifact is made of.

    `inputs` holds the fingerprints of what it is made from, `params` every parameter that can change its bytes. `info`
    is written to the manifest and is no part of the fingerprint (batch sizes, labels, the resolved configuration).
    """

    kind: str
    label: str
    version: int
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def identity(self) -> dict[str, Any]:
        """The fields that the fingerprint covers."""
        return {name: getattr(self, name) for name in _IDENTITY}

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the identity."""
        return fingerprint(self.identity())

    @property
    def folder_name(self) -> str:
        """`label-fingerprint`, with what a file name should not hold replaced by hyphens."""
        return f"{safe_name(self.label)}-{self.fingerprint[:_KEY_DIGITS]}"


@dataclass(frozen=True)
class Estimate:
    """The expected cost of a stage: bytes on disk, bytes of memory, seconds."""

    disk: float = 0
    memory: float = 0
    seconds: float = 0


@dataclass(frozen=True)
class Planned:
    """One line of a plan: an artifact, how much of it exists, and what making it costs."""

    spec: Spec
    path: Path
    state: Literal["ready", "partial", "missing"]
    estimate: Estimate


@dataclass
class _Work:
    """What this process has done for an artifact: since when (seconds), whether it resumed it, its peak of memory."""

    started: float
    resumed: bool
    peak_memory: int = 0


class Store:
    """All artifacts below one folder. With `dry=True` nothing is made: `ensure` only adds to `planned`."""

    def __init__(self, root: Path, *, dry: bool = False, info: Mapping[str, Any] | None = None) -> None:
        """`info` (the resolved configuration) is written to every manifest, beside the artifact's own."""
        self.root = root
        self._info = info or {}
        self.dry = dry
        self.planned: dict[str, Planned] = {}
        self.shares_only = False
        """True if `ensure` makes parts without waiting for those of other processes, and completes no artifact."""
        self._begun: dict[str, _Work] = {}
        self._verified: set[Path] = set()
        self._in_use: InUse | None = None
        self._plan: Path | None = None

    @property
    def hashes(self) -> Path:
        """The file that remembers the hashes of what artifacts are made from (see `remembered`)."""
        return self.root.parent / MODELS / HASHES

    @property
    def deferred(self) -> bool:
        """True if `ensure` may give the folder of an artifact that is not there yet."""
        return self.dry or self.shares_only

    def sharing(self) -> Self:
        """The same store, whose `ensure` makes parts that no other process makes and leaves the rest to a later call.

        So several ranks divide the parts of many artifacts without waiting for one another at the end of each.
        """
        shared = copy.copy(self)
        shared.shares_only = True
        return shared

    @contextlib.contextmanager
    def in_use(self, plan: Path | None = None) -> Iterator[None]:
        """A context in which no clean-up of another process removes what `ensure` gives.

        plan: a folder of runs whose plan lists these artifacts, so that they are spared afterwards, too. Default: the
        caller lists them.
        """
        folder = self.root.parent / IN_USE
        make_folder(folder, "--root")
        with contextlib.ExitStack() as stack:
            try:
                self._in_use = stack.enter_context(InUse(folder))
            except OSError as error:
                raise UserError(
                    f"{self.root.parent} cannot be written ({error.strerror}): choose another --root."
                ) from None
            self._plan = plan
            try:
                yield
            finally:
                self._in_use = self._plan = None

    def list_in(self, plan: Path) -> None:
        """Has the plan in a folder of runs list what `ensure` gives until the context of `in_use` ends.

        For what could not be planned, such as a training whose settings are chosen meanwhile.
        """
        self._plan = plan

    def names_in_use(self) -> set[str]:
        """The keys (see `key_of`) of what running processes use."""
        return names_in_use(self.root.parent / IN_USE)

    def clean_up_lock(self) -> contextlib.AbstractContextManager[None]:
        """A context in which no process can begin to use an artifact."""
        folder = self.root.parent / IN_USE
        folder.mkdir(parents=True, exist_ok=True)
        return exclusive_lock(folder / "lock", "clean-up")

    def path(self, spec: Spec) -> Path:
        """The artifact's folder, whether it exists or not. It is found by fingerprint, under whatever label."""
        folder = self.root / spec.kind
        existing = sorted(folder.glob(f"*-{spec.fingerprint[:_KEY_DIGITS]}"))
        return existing[0] if existing else folder / spec.folder_name

    def _partial_folder(self, spec: Spec) -> Path:
        return self.root / spec.kind / f".{spec.fingerprint[:_KEY_DIGITS]}.partial"

    def ensure(
        self,
        spec: Spec,
        build: Callable[[Path], Mapping[str, Any] | None],
        estimate: Estimate | None = None,
        *,
        make_parts: MakeParts | None = None,
        on_all_ranks: bool = False,
    ) -> Path:
        """Returns the artifact's folder, which `build(folder)` makes when it does not exist; a dry store only plans.

        Args:
            spec: What the artifact is made of.
            build: Fills the folder. It must go on from what an interrupted run left there; the mapping that it returns
                is added to the manifest's `info`. It runs in one process (rank 0), and the others wait for it.
            estimate: The expected cost, for plans.
            make_parts: `make_parts(folder, leases)` runs before `build`, concurrently in every process that asks for
                this artifact: it makes each part whose lease it gets and returns when all parts exist, or, where
                `leases.wait` is False, when others are at work on the rest.
            on_all_ranks: `build` runs on all ranks, on one folder.

        Raises:
            UserError: The artifact's bytes do not match its manifest.
            OSError: The folder cannot be written.
        """
        if self._in_use is not None:
            with self.clean_up_lock():
                self._in_use.add(key_of(self._partial_folder(spec)))
                if self._plan is not None and distributed.is_main_process():
                    note_artifacts(self._plan, [place_of_artifact(self.path(spec))])
        path = self.path(spec)
        state: Literal["ready", "partial", "missing"] = (
            "ready" if path.exists() else "partial" if self._partial_folder(spec).exists() else "missing"
        )
        self.planned.setdefault(spec.fingerprint, Planned(spec, path, state, estimate or Estimate()))
        if self.dry:
            return path
        if self.shares_only:
            if make_parts is not None and not path.exists():
                with stage(spec.fingerprint, f"{spec.kind} {spec.label}"):
                    self._make_parts(spec, make_parts, wait=False)
            return path
        if not distributed.is_main_process():
            if make_parts is not None and not path.exists():
                self._make_parts(spec, make_parts)
            if on_all_ranks and distributed.broadcast(False):
                build(self._partial_folder(spec))
            release_memory()  # as rank 0 does before it makes the next
            distributed.wait_until(lambda: self.path(spec).exists())
            return self.path(spec)  # rank 0 has verified it, or is about to and would end the run
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
        make_parts: MakeParts | None,
        on_all_ranks: bool,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = self._partial_folder(spec)
        release_memory()  # the memory of the stage before is not charged to this one
        with stage(spec.fingerprint, f"{spec.kind} {spec.label}"), contextlib.ExitStack() as held:
            if make_parts is not None:
                self._make_parts(spec, make_parts)
            with PeakMemory() as peak, disk_errors(folder):
                # Rank 0 holds the lock for all ranks.
                held.enter_context(exclusive_lock(folder.with_suffix(".lock"), f"{spec.kind} {spec.label}"))
                missing = not self.path(spec).exists()  # another process may have finished it while we waited
                work = self._begun.pop(spec.fingerprint, None) or _Work(time.time(), folder.exists())
                idle = seconds_since_change(folder) if make_parts is not None else 0.0
                if missing:
                    folder.mkdir(exist_ok=True)
                    for unfinished in folder.rglob(".*"):  # temporary files of a killed `write_atomically`
                        if unfinished.is_file():
                            unfinished.unlink()
                if on_all_ranks:
                    distributed.broadcast(missing)
                info = build(folder) if missing else None
            if missing:
                work.peak_memory = max(work.peak_memory, peak.bytes)
                self._complete(spec, folder, path, work, idle, info or {})
            shutil.rmtree(leases_of(folder), ignore_errors=True)

    def _make_parts(self, spec: Spec, make_parts: MakeParts, *, wait: bool = True) -> None:
        folder = self._partial_folder(spec)
        leases = leases_of(folder)
        work = self._begun.setdefault(spec.fingerprint, _Work(time.time(), folder.exists()))
        folder.mkdir(parents=True, exist_ok=True)
        leases.mkdir(exist_ok=True)
        if self.path(spec).exists():  # completed before our folder was created, which is superfluous now
            with contextlib.suppress(OSError):
                folder.rmdir()
            return
        try:
            with PeakMemory() as peak, disk_errors(folder), Leases(leases, wait=wait) as own_leases:
                make_parts(folder, own_leases)
            work.peak_memory = max(work.peak_memory, peak.bytes)
        except FileNotFoundError:
            if not self.path(spec).exists():
                raise
            # Otherwise another process completed the artifact, and renamed its folder, in the meantime.

    def _complete(
        self,
        spec: Spec,
        folder: Path,
        path: Path,
        work: _Work,
        idle: float,
        info: Mapping[str, Any],
    ) -> None:
        """Writes the manifest and gives the folder its final name; its files need not be hashed again.

        idle: seconds for which nobody worked on it.
        """
        stamps = {name: found for name, found in stamps_of(folder).items() if name != MANIFEST}
        files = {name: {"sha256": file_sha256(folder / name), "bytes": stamps[name][0]} for name in sorted(stamps)}
        manifest = {
            **spec.identity(),
            "label": spec.label,
            "fingerprint": spec.fingerprint,
            "info": {**self._info, **spec.info, **info},
            **made_by(),
            "files": files,
            "duration_s": round(max(time.time() - work.started - idle, 0.0), 2),
            "resumed": work.resumed,
            "peak_memory_bytes": work.peak_memory,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(work.started)),
        }
        write_json(folder / MANIFEST, dict(sorted(manifest.items())))
        stamps[MANIFEST] = stamp(folder / MANIFEST)
        rename_durably(folder, path)
        write_stamps(_beside(path, "verified"), stamps)

    def verify(self, path: Path, spec: Spec | None = None, *, anew: bool = False) -> dict[str, Any]:
        """Checks every file of the artifact against its manifest, which it returns.

        Files are hashed once, and again when their `stamp` is another than it was then; `anew` hashes them in any case.
        Raises UserError naming the first file that is missing, superfluous or changed.
        """
        manifest = read_manifest(path)
        if spec is not None and manifest["fingerprint"] != spec.fingerprint:
            raise UserError(f"{path} holds another artifact than its name states: remove that folder and run again.")
        if path in self._verified and not anew:
            return manifest
        remedy = "remove that artifact's folder to have it made again"
        stamps = stamps_of(path)
        if different := sorted(stamps.keys() ^ {MANIFEST, *manifest["files"]}):
            raise UserError(f"{path / different[0]} is not as the artifact's manifest lists it: {remedy}.")
        if anew or stamps != read_stamps(_beside(path, "verified")):
            for name, expected in manifest["files"].items():
                file = path / name
                if expected != {"bytes": stamps[name][0], "sha256": file_sha256(file)}:
                    raise UserError(f"{file} does not match its SHA-256 in the manifest: {remedy}.")
            write_stamps(_beside(path, "verified"), stamps)
        self._verified.add(path)
        return manifest

    def variants(self, spec: Spec, *params: str) -> list[Path]:
        """Complete artifacts of the spec's label that differ from it in these parameters at most."""
        found = []
        for path in sorted((self.root / spec.kind).glob(f"{glob.escape(safe_name(spec.label))}-*")):
            with contextlib.suppress(UserError):  # damaged, or removed meanwhile
                manifest = read_manifest(path)
                identities = [
                    canonical({**each, "params": {k: v for k, v in each["params"].items() if k not in params}})
                    for each in (spec.identity(), {name: manifest[name] for name in _IDENTITY})
                ]
                if identities[0] == identities[1]:
                    found.append(path)
        return found

    def artifacts(self) -> Iterator[Path]:
        """The folder of every complete artifact, in order of kind and name."""
        for manifest in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            if not manifest.parent.name.startswith("."):
                yield manifest.parent


def key_of(folder: Path) -> str:
    """What identifies an artifact below the store: its kind and the beginning of its fingerprint.

    The same for the folder of the artifact and for those of its unfinished state and its leases.
    """
    name = folder.stem.removeprefix(".") if folder.name.startswith(".") else folder.name
    return f"{folder.parent.name}/{name[-_KEY_DIGITS:]}"


def _beside(path: Path, what: str) -> Path:
    """The hidden file or folder of an artifact that holds `what`."""
    return path.with_name(f".{key_of(path).partition('/')[2]}.{what}")


def leases_of(partial: Path) -> Path:
    """The folder of the leases by which several processes divide the parts of an unfinished artifact."""
    return partial.with_suffix(".leases")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the artifact in `path`. Raises UserError when there is none or it has been changed."""
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is no complete artifact: it has no {MANIFEST}.")
    return read_json(path / MANIFEST, "remove that folder to have it made again")
