"""Room for files: what the file system has, what quota and limits leave, and what is there already."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Space", "disk_use", "free_space"]

_QUOTA_UNIT = 1024  # blocks of quota(1)


@dataclass(frozen=True)
class Space:
    """What may still be written.

    Attributes:
        bytes: Of all files together.
        files: Number of files; None where the file system sets no limit.
        limited_by: What sets `bytes`, in words: the disk or a quota.
        largest: Bytes that one file may have (ulimit -f); None for any.
    """

    bytes: int
    files: int | None
    limited_by: str
    largest: int | None


def free_space(folder: Path) -> Space:
    """What the user may still write to a folder, which need not exist."""
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    told = os.statvfs(there)
    room, limited_by = told.f_bavail * told.f_frsize, "on its disk"
    for left in _quotas_left(there):
        if left < room:
            room, limited_by = left, "within the user's quota"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    files = told.f_favail if told.f_files else None  # btrfs and some network file systems count none
    return Space(room, files, limited_by, None if limit == resource.RLIM_INFINITY else limit)


def disk_use(path: Path) -> tuple[int, int]:
    """Bytes and number of files at or below a path, links to the same file counted once."""
    files, seen, total = [path] if path.is_file() else path.rglob("*"), set(), 0
    for file in files:
        try:
            told = file.lstat()
        except OSError:  # gone meanwhile
            continue
        if file.is_file() and (told.st_dev, told.st_ino) not in seen:
            seen.add((told.st_dev, told.st_ino))
            total += told.st_size
    return total, len(seen)


def _quotas_left(folder: Path) -> Iterator[int]:
    """Bytes that quotas of user and groups leave on the folder's file system; nothing without quota(1)."""
    if shutil.which("quota") is None:
        return
    try:
        done = subprocess.run(
            ["quota", "-u", "-g", "-w", "-p"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return
    source = _source(folder)
    for line in done.stdout.splitlines():
        cells = line.split()
        if len(cells) >= 4 and cells[0] == source:
            used, soft, hard = (int(cell.rstrip("*")) for cell in cells[1:4] if cell.rstrip("*").isdigit())
            limits = [limit for limit in (soft, hard) if limit]
            if limits:
                yield max(0, min(limits) - used) * _QUOTA_UNIT


def _source(folder: Path) -> str | None:
    """What is mounted where the folder lies, as quota(1) names it."""
    found = None
    try:
        lines = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    resolved = folder.resolve()
    for line in lines:
        source, point = line.split()[:2]
        point = point.replace("\\040", " ")
        if resolved.is_relative_to(point) and (found is None or len(point) >= len(found[1])):
            found = (source, point)
    return found and found[0]
