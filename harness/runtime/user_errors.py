"""The sentence about an error that the user can correct, whether a package or the operating system raised it."""

import errno
import sys

from fusion.errors import UserError, unknown_name
from harness.runtime.extras import missing_extra
from results import errors as results_errors

_REFUSALS = {
    errno.EACCES: "cannot be read or written: change its permissions or choose another folder",
    errno.EROFS: "lies on a read-only file system: choose another folder",
    errno.ENOSPC: "does not fit on the disk: free space and run again; what is finished is kept",
    errno.EDQUOT: "exceeds your quota on the disk: free space and run again; what is finished is kept",
    errno.ENOTDIR: "is no folder, or lies below a file: choose another folder",
    errno.EEXIST: "is a file where a folder is needed: choose another folder",
}


def sentence_about(error: BaseException) -> str | None:
    """What is wrong and what to do, with the nearest spelling of an unknown name; None for our own mistakes."""
    if isinstance(error, results_errors.UnknownName):
        return unknown_name(error.noun, error.name, error.known)
    if isinstance(error, UserError | results_errors.UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        return f"{error.filename or 'A file'} {_REFUSALS[error.errno]}."
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return (
            "The memory of the GPU is full: lower training.micro_batch_size or a role's batch_tokens, or set "
            "training.gradient_checkpointing=true, training.deepspeed=zero3 or training.fsdp2=true, and run again; "
            "what is finished is kept."
        )
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        return f"{error.object!r} has bytes that are not UTF-8, which a library here does not take: rename that path."
    return missing_extra(error)
