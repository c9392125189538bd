"""One trainer at a time in a run folder."""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dinoscope.errors import LockError

__all__ = ["run_lock"]


@contextlib.contextmanager
def run_lock(run_dir: Path, wait_seconds: float = 30.0) -> Iterator[None]:
    """Holds the folder's lock while the block runs.

    The kernel drops the lock when its holder ends, however that happens. Somebody who was killed a moment ago may need
    a little to be gone, so the lock is waited for.

    Raises:
        LockError: After `wait_seconds` another process still trains in this folder; names it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise LockError(f"run {run_dir.name} is being trained by {_holder(file)}; wait for it or end it first")
            time.sleep(0.2)
        file.seek(0)
        file.truncate()
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID")}, file)
        file.flush()
        try:
            yield
        finally:
            file.seek(0)
            file.truncate()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(file: "os.PathLike[str]") -> str:
    file.seek(0)
    try:
        holder = json.load(file)
    except json.JSONDecodeError:
        return "another process"
    job = f", job {holder['job']}" if holder["job"] else ""
    return f"process {holder['pid']} on {holder['host']}{job}"
