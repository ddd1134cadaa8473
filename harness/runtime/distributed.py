"""Several processes as one run: torchrun or deepspeed starts one for each GPU and numbers them in the environment.

All ranks walk through the same stages. What is made by one process alone (passages, maps, evaluations, records, tables)
the first rank makes, and the others sleep until it is there: they watch the file system, since no collective call is
meant to be waited in for hours. What is made together (a training) they enter together. Only the first rank speaks.
"""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from fusion.errors import UserError
from harness.runtime.memory import retain_heap

COMMAND = "torchrun --nproc_per_node N -m harness experiment run ..."
_PATIENCE = timedelta(days=7)  # a rank that is gone is noticed by the launcher; one that is busy is waited for
_POLL = 0.5  # seconds between two looks at the file system
_agreement: Any = None  # a group of the ranks that waits without spinning, as NCCL would
_GRACE = 10.0  # seconds in which a launcher has ended all other ranks after one has failed


def launched() -> bool:
    """Whether a launcher started this process, be it as the only rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """How many ranks there are."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank() -> int:
    """Which of this machine's ranks this is, and so which of its GPUs is its own."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def is_main_process() -> bool:
    """Whether this is rank 0 of all: the one that makes what is not distributed, and that speaks."""
    return not launched() or int(os.environ["RANK"]) == 0


def initialize(device: str) -> None:
    """Connects the ranks; does nothing where there is no launcher. Raises UserError for a launcher that only began."""
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


def micro_batches(global_batch_size: int, micro_batch_size: int) -> int:
    """How often a rank reads `micro_batch_size` rows in one optimiser step. Raises UserError for a remainder."""
    if global_batch_size % (world_size() * micro_batch_size):
        raise UserError(
            f"training.global_batch_size = {global_batch_size} is no multiple of {world_size()} ranks with "
            f"training.micro_batch_size = {micro_batch_size} rows each: change one of the three."
        )
    return global_batch_size // (world_size() * micro_batch_size)


def broadcast(number: int) -> int:
    """The first rank's number, on all ranks: to be called by all of them."""
    if world_size() == 1:
        return number
    import torch

    shared = torch.tensor(int(number))
    torch.distributed.broadcast(shared, src=0, group=_agreement)
    return int(shared)


def wait_until(there: Callable[[], bool]) -> None:
    """Sleeps until `there` answers yes; when that cannot come true any more, the launcher ends this rank."""
    while not there():
        time.sleep(_POLL)


def report_root_cause(understood: bool) -> None:
    """To be called by a rank that has failed, before it says so.

    Often it has failed because another has, or as all do. The rank with the better explanation says it and goes, and
    the launcher ends the rest in their sleep: the first rank that knows what is wrong, then any other that knows.
    """
    if world_size() > 1 and not (understood and is_main_process()):
        time.sleep(_GRACE if understood else 2 * _GRACE)


def usable_device(device: str, *, dry: bool) -> str:
    """The device of this process, ready to use, by the configuration's word for it. UserError where there is none."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        n, own = torch.cuda.device_count(), local_rank()
        if own >= n:
            raise UserError(f"This machine has {n} CUDA devices, but its rank {own} needs one more: start {n} ranks.")
        if n > 1 and not launched() and not dry:
            raise UserError(
                f"A process uses one GPU and {n} are visible: start one for each with {COMMAND}, or set "
                "CUDA_VISIBLE_DEVICES to one of them."
            )
        return f"cuda:{own}" if launched() else "cuda"
    if device == "cuda":
        raise UserError("device is cuda, but this machine has no CUDA device that torch can use: set device=cpu.")
    # DeepSpeed would look for an accelerator by itself and warn on standard output, where tables go.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    retain_heap()
    return "cpu"
