"""Processes: they end with the one that started them, and keep memory that they will need again."""

import ctypes
import os
import signal
import sys
from pathlib import Path

__all__ = ["die_with_parent", "keep_freed_memory", "snakemake_ancestor", "still_alive"]

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 64 << 20


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, however that died (Linux; elsewhere nothing happens).

    A SIGKILL of torchrun leaves its workers training, since each has a session of its own; with this they end at once.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def keep_freed_memory() -> None:
    """Lets this process keep up to 64 MB of freed memory for its next images (glibc; elsewhere nothing happens).

    By default every array above 128 KB is fetched from the kernel, page by page, and given back when it is freed: for
    float images of 256 × 256 px that costs several times the arithmetic.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES // 2)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


def snakemake_ancestor() -> int | None:
    """Process id of the nearest Snakemake above this process, None if there is none (or no /proc to look in)."""
    pid = os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
        except OSError:
            return None
        if any(word.rpartition(b"/")[2] == b"snakemake" for word in words[:4]):
            return pid
        pid = int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])
    return None


def still_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
