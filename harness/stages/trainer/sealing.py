"""Folders that count only when they are complete: a training's checkpoints, the best one and the finished model."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion.errors import UserError
from harness.config.schema import TrainingConfig
from harness.runtime import distributed
from harness.stages.trainer.sharding import zero_stage
from harness.store.files import read_json, sync_all, write_json
from harness.store.fingerprint import file_sha256

_COMPLETE = "complete"


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Marks a folder as complete, its files as they are now, with what is known about it (such as `layout_of`)."""
    files = {str(f.relative_to(folder)): file_sha256(f) for f in sorted(folder.rglob("*")) if f.is_file()}
    sync_all(folder)
    write_json(folder / _COMPLETE, {"files": files, **about})


def layout_of(config: TrainingConfig) -> dict[str, int | None]:
    """How the files of a checkpoint are divided: the number of ranks, and the stage of ZeRO (None without)."""
    return {"ranks": distributed.world_size(), "zero": zero_stage(config.deepspeed)}


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


def last_checkpoint(folder: Path, layout: Mapping[str, int | None]) -> Path | None:
    """The newest complete checkpoint, the same on all ranks; half-written ones are removed.

    Raises UserError where it has been damaged, and when it was written under another `layout`: by another number of
    ranks, of which each has its part of it, or under another stage of ZeRO.
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
    if wrote["ranks"] != layout["ranks"]:
        raise UserError(
            f"{checkpoint} is the checkpoint of {wrote['ranks']} ranks and cannot be continued by {layout['ranks']}: "
            f"start as many as before, or {remedy}."
        )
    if wrote["zero"] != layout["zero"]:
        before, now = (f"ZeRO-{stage}" if stage else "no DeepSpeed" for stage in (wrote["zero"], layout["zero"]))
        raise UserError(
            f"{checkpoint} was written under {before} and cannot be continued under {now}: set training.deepspeed as "
            f"before, or {remedy}."
        )
    return checkpoint
