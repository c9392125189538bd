"""What the file system said when files could not be written, found under what torch makes of it."""

import errno
from pathlib import Path

import torch.distributed.checkpoint as dcp

from dinoscope.errors import CheckpointError
from dinoscope.train.run_folder import complete_checkpoints

__all__ = ["disk_error", "in_words", "not_written"]

_FROM_TORCH = ("PytorchStreamWriter", "inline_container")
_IN_WORDS = {errno.ENOSPC: "no space left on the device", errno.EDQUOT: "the disk quota is used up"}


def disk_error(error: BaseException) -> OSError | None:
    """The error of the file system that an error comes from; None if it comes from anything else.

    torch's writer raises an error of its own while it handles the system's. Where DCP gathered the errors of several
    ranks, each of them must come from the file system.
    """
    if isinstance(error, dcp.api.CheckpointException):
        found = [disk_error(failure) for failure, _ in error.failures.values()]
        return found[0] if found and None not in found else None
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    if link is None and isinstance(error, RuntimeError) and any(part in str(error) for part in _FROM_TORCH):
        return OSError(errno.EIO, " ".join(str(error).split())[:120])
    return link


def in_words(error: OSError) -> str:
    """The error without paths."""
    return _IN_WORDS.get(error.errno or 0) or error.strerror or str(error)


def not_written(run_dir: Path, what: str, cause: str) -> CheckpointError:
    """The error of a run that cannot end well because its last files cannot be written."""
    kept = list(complete_checkpoints(run_dir))
    return CheckpointError(
        f"run {run_dir.name}: {what} cannot be written ({cause}); free space and start the run again, it goes on "
        + (f"after iteration {kept[-1]}" if kept else "from its start")
    )
