"""Folders that count only when they are complete: a training's checkpoints, the best one and the finished model."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.config.schema import TrainingConfig
from harness.runtime import distributed
from harness.stages.trainer.sharding import zero_stage
from harness.store.files import read_json, sync, sync_all, write_json
from harness.store.fingerprint import file_sha256

Layout = dict[str, int | str]
_COMPLETE = "complete"


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Marks a folder as complete, its files as they are now, with what is known about it (such as `layout_of`).

    Called by all ranks when each has written its files: they share the reading, so that none waits for hours while
    another reads terabytes. Raises OSError on all of them where a file cannot be read or written.
    """
    distributed.gather(None)
    files = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: (-f.stat().st_size, str(f)))
    own: dict[str, str] = {}
    failure: OSError | None = None
    try:
        for file in distributed.gather(files)[0][distributed.rank() :: distributed.world_size()]:
            sync(file)
            own[str(file.relative_to(folder))] = file_sha256(file)
    except OSError as error:
        failure = error
    parts = distributed.gather((own, failure))
    for _, failed in parts:
        if failed is not None:
            raise failed
    if distributed.is_main_process():
        sync_all(folder)
        hashes = {name: sha256 for part, _ in parts for name, sha256 in part.items()}
        write_json(folder / _COMPLETE, {"files": dict(sorted(hashes.items())), **about})


def layout_of(config: TrainingConfig) -> Layout:
    """How the files of a checkpoint are divided: the number of ranks, and by what (`sharding`)."""
    stage = zero_stage(config.deepspeed)
    sharding = "FSDP2" if config.fsdp2 else f"ZeRO-{stage}" if stage else "no sharding"
    return {"ranks": distributed.world_size(), "sharding": sharding}


def is_sealed(folder: Path) -> bool:
    """Whether the folder is there and complete."""
    return (folder / _COMPLETE).exists()


def read_seal(folder: Path, remedy: str) -> dict[str, Any]:
    """What was said about a complete folder. Raises UserError, ending in `remedy`, where that cannot be read."""
    return read_json(folder / _COMPLETE, remedy)


def check_seal(folder: Path, remedy: str) -> None:
    """Raises UserError, ending in `remedy`, where a file of a complete folder is not as it was."""
    for name, sha256 in read_seal(folder, remedy)["files"].items():
        if not (folder / name).exists() or file_sha256(folder / name) != sha256:
            raise UserError(f"{folder / name} is damaged: {remedy}.")


def last_checkpoint(folder: Path, layout: Layout) -> Path | None:
    """The newest complete checkpoint, the same on all ranks; half-written ones are removed.

    Raises UserError where it has been damaged, and when it was written under another `layout`: under another way of
    sharding, or by another number of ranks, of which each has its part of it. FSDP2's parts fit any number.
    """
    step = 0
    if distributed.is_main_process():
        for path in folder.glob("checkpoint-*"):
            if is_sealed(path):
                step = max(step, int(path.name.split("-")[1]))
            else:
                shutil.rmtree(path)
        if step:
            last = folder / f"checkpoint-{step}"
            check_seal(last, f"remove {last} to go on from the checkpoint before it")
    step = distributed.broadcast(step)
    if not step:
        return None
    checkpoint = folder / f"checkpoint-{step}"
    remedy = f"remove {folder} to begin the training again"
    wrote = read_seal(checkpoint, remedy)
    if wrote["sharding"] != layout["sharding"]:
        raise UserError(
            f"{checkpoint} was written under {wrote['sharding']} and cannot be continued under {layout['sharding']}: "
            f"set training.deepspeed and training.fsdp2 as before, or {remedy}."
        )
    if wrote["ranks"] != layout["ranks"] and layout["sharding"] != "FSDP2":
        raise UserError(
            f"{checkpoint} is the checkpoint of {wrote['ranks']} ranks and cannot be continued by {layout['ranks']}: "
            f"start as many as before, or {remedy}."
        )
    return checkpoint
