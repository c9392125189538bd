"""Which GPU a process takes where several extract at once; Snakemake counts GPUs, but tells no job which is its."""

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["take_free_gpu"]


def take_free_gpu(names: Sequence[str], folder: Path | None = None) -> int:
    """Index of a GPU that no other process of this kind has taken on this machine; it is free again when we end.

    Where all are taken, processes are spread over them evenly as far as chance does so.

    Args:
        names: What tells the GPUs apart whatever a process sees of them, such as their UUIDs.
        folder: Where the locks lie; by default the machine's folder for temporary files.
    """
    folder = folder or Path(tempfile.gettempdir())
    for index, name in enumerate(names):
        # never closed: the lock lasts until this process ends
        lock = os.open(
            folder / f"dinoscope-{os.getuid()}-gpu-{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
        else:
            return index
    return os.getpid() % len(names)
