"""Several processes as one run: torchrun or deepspeed starts one for each GPU and numbers them in the environment.

All ranks go through the same stages. What one process makes (passages, maps, evaluations, records, tables) is made by
rank 0, and the others watch the file system until it exists, since collective calls are not made to be waited in for
hours. A training is entered by all ranks together. Only rank 0 prints messages.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from fusion.errors import UserError

COMMAND = "torchrun --no-python --nproc_per_node N fusellm experiment run ..."
_PATIENCE = timedelta(days=7)  # a rank that is gone is noticed by the launcher; one that is busy is waited for
_POLL = 0.5  # seconds between two looks at the file system
_agreement: Any = None  # a group of the ranks that waits without spinning, as NCCL would
_GRACE = 10.0  # seconds in which a launcher has ended all other ranks after one has failed


def launched() -> bool:
    """True if a launcher started this process, even as the only rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """The number of ranks."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def rank() -> int:
    """The number of this rank among all."""
    return int(os.environ["RANK"]) if launched() else 0


def local_rank() -> int:
    """The number of this rank among those of this machine, and so of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def local_world_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if launched() else 1


def is_main_process() -> bool:
    """True for rank 0 of all, which makes everything that is not distributed and prints messages."""
    return rank() == 0


def initialize(device: str) -> None:
    """Connects the ranks on `device`; does nothing without a launcher.

    Raises UserError where a launcher has started several processes without numbering them.
    """
    if not launched():
        # What `accelerate launch --cpu --num_processes 2` does: one process, as if it were all.
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 or {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys():
            raise UserError(f"Several processes were asked for, but their launcher numbered none: use {COMMAND}.")
        return
    import torch

    global _agreement
    if torch.distributed.is_initialized():
        return
    if device != "cpu":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("gloo" if device == "cpu" else "nccl", timeout=_PATIENCE)
    _agreement = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    check_world(torch.distributed.get_world_size(), "torch")


def check_world(size: int, seen_by: str) -> None:
    """Raises UserError when a library works with another number of ranks than the launcher started."""
    if size != world_size():
        raise UserError(f"The launcher started {world_size()} ranks, but {seen_by} works with {size}: use {COMMAND}.")


def micro_batches(global_batch_size: int, micro_batch_size: int, section: str = "training") -> int:
    """The number of micro-batches of a rank in one optimiser step. Raises UserError for a remainder.

    section: where the configuration sets the global batch size.
    """
    if global_batch_size % (world_size() * micro_batch_size):
        raise UserError(
            f"{section}.global_batch_size = {global_batch_size} is no multiple of {world_size()} ranks with "
            f"training.micro_batch_size = {micro_batch_size} rows each: change one of the three."
        )
    return global_batch_size // (world_size() * micro_batch_size)


def broadcast(number: int) -> int:
    """Rank 0's number, on all ranks; a collective call."""
    if world_size() == 1:
        return number
    import torch

    shared = torch.tensor(int(number))
    torch.distributed.broadcast(shared, src=0, group=_agreement)
    return int(shared)


def gather(value: Any) -> list[Any]:
    """Every rank's value, in order of ranks, on all of them; a collective call, which no rank leaves before all came.

    The ranks wait without spinning, and for as long as it takes.
    """
    if world_size() == 1:
        return [value]
    import torch

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value, group=_agreement)
    return values


def limit_collectives(seconds: float) -> None:
    """Has collective operations of a training, and those of the groups that a library has made, fail after `seconds`.

    NCCL would end the process after ten minutes in a group that DeepSpeed makes. The groups in which one rank is waited
    for without limit (`broadcast`, `gather`) stay as they are.
    """
    if world_size() == 1:
        return
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        if group is not _agreement and isinstance(group, c10d.ProcessGroup):
            c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def wait_until(there: Callable[[], bool]) -> None:
    """Sleeps until the condition is true; when it cannot become true any more, the launcher ends this rank."""
    while not there():
        time.sleep(_POLL)


def report_root_cause(understood: bool) -> None:
    """Delays the error message of a failed rank, so that the launcher shows the message of the rank that failed first.

    A rank often fails because another has failed. The rank with the better explanation reports it and exits, and the
    launcher ends the others while they sleep: first rank 0 if its error is understood, then any other whose error is.
    """
    if world_size() > 1 and not (understood and is_main_process()):
        time.sleep(_GRACE if understood else 2 * _GRACE)
