"""One trainer at a time in a run folder.

`.lock` in the run's folder holds {host, pid, job, started, …} while a trainer is at work. It is removed at the end, so
that published results name no host (after a SIGKILL it stays until the next start). Two things can decide who holds it:

- On a local file system by the kernel (flock), which drops the lock when its holder ends, however that happens.
- On any other (NFS, Lustre, …), where flock may be missing or may hold for one host only, by a heartbeat: the holder
  touches the file every 10 s. A file that nobody touched for a minute, or whose process is gone from this machine, is
  stale and is taken over.

A folder may be local to one host and mounted by others, so holders of both kinds keep the heartbeat up and heed each
other's.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from dinoscope.errors import LockError
from dinoscope.processes import still_alive

__all__ = ["WITHOUT_FLOCK", "HeldLock", "file_system_type", "run_lock"]

_log = logging.getLogger(__name__)
_LOCAL_FILE_SYSTEMS = {
    *("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "jfs", "bcachefs"),
    *("overlay", "tmpfs", "ramfs"),
}
# What flock says on a file system that has none.
WITHOUT_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_open_descriptors: set[int] = set()


@dataclass(frozen=True)
class _Holder:
    """What the lock file says of the trainer at work."""

    host: str
    pid: int
    job: str | None
    started: str
    machine: str | None  # where the pid means something: this boot of this machine or container
    by_kernel: bool
    token: str

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.started}"


class HeldLock:
    """The lock while it is held."""

    def __init__(self, path: Path, holder: _Holder, descriptor: int | None, heartbeat_seconds: float) -> None:
        self._path, self._holder, self._descriptor = path, holder, descriptor
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_up, args=(heartbeat_seconds,), daemon=True)
        self._thread.start()

    def require_held(self) -> None:
        """Raises LockError when another trainer has taken the lock over, as after a minute without heartbeat."""
        holder = _read_holder(self._path)
        if holder is not None and holder.token != self._holder.token:
            raise LockError(
                f"run {self._path.parent.name} was taken over by {holder}, because this process gave no sign of life "
                "for too long; nothing more is written, end one of them"
            )

    def _keep_up(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            holder = _read_holder(self._path)
            if holder is not None and holder.token == self._holder.token:
                with contextlib.suppress(OSError):  # a server that is away for a while: the next beat may reach it
                    os.utime(self._path)

    def _release(self) -> None:
        self._ended.set()
        self._thread.join()
        holder = _read_holder(self._path)
        if holder is not None and holder.token == self._holder.token:
            self._path.unlink(missing_ok=True)
        if self._descriptor is not None:
            _close(self._descriptor)


@contextlib.contextmanager
def run_lock(
    run_dir: Path,
    wait_seconds: float | None = None,
    *,
    decided_by: Literal["kernel", "heartbeat"] | None = None,
    heartbeat_seconds: float = 10.0,
    stale_seconds: float = 60.0,
) -> Iterator[HeldLock]:
    """Holds the folder's lock while the block runs.

    Somebody who was killed a moment ago may need a little to be gone, so the lock is waited for.

    Args:
        run_dir: Folder of the run; made when it is not there.
        wait_seconds: How long to wait for another trainer before refusing; None: 30 s, and where heartbeats decide as
            long as one that was killed counts.
        decided_by: What decides who holds the lock; None: what fits the folder's file system.
        heartbeat_seconds: Time between two touches of the file.
        stale_seconds: Age of the last touch from which on a lock no longer counts.

    Raises:
        LockError: After `wait_seconds` another process still trains in this folder; names it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / ".lock"
    by_kernel = (decided_by or _what_decides(run_dir)) == "kernel"
    try_to_hold = _hold_by_kernel if by_kernel else _hold_by_heartbeat
    if wait_seconds is None:
        wait_seconds = 30.0 if by_kernel else stale_seconds + 2 * heartbeat_seconds
    started, waiting = time.monotonic(), False
    while (lock := try_to_hold(path, heartbeat_seconds, stale_seconds)) is None:
        known = _read_holder(path) or "another process"
        if time.monotonic() - started >= wait_seconds:
            raise LockError(f"run {run_dir.name} is being trained by {known}; wait for it or end it first")
        if not waiting:
            _log.info("waiting for run %s, up to %g s: it is being trained by %s", run_dir.name, wait_seconds, known)
            waiting = True
        time.sleep(0.2 if by_kernel else min(1.0, heartbeat_seconds))  # servers are asked less often
    try:
        yield lock
    finally:
        lock._release()


def file_system_type(path: Path) -> str | None:
    """Type of the file system that a folder is on, as in /proc/self/mountinfo ("ext4", "nfs4"); None if not known."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    path, longest, found = path.resolve(), -1, None
    for mount in mounts:
        place, _, source = mount.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), place.split()[4])
        if path.is_relative_to(point) and len(point) >= longest:  # of two mounts on one point the later is seen
            longest, found = len(point), source.split()[0]
    return found


def _what_decides(run_dir: Path) -> Literal["kernel", "heartbeat"]:
    if file_system_type(run_dir) not in {*_LOCAL_FILE_SYSTEMS, None}:
        return "heartbeat"
    with tempfile.TemporaryFile(dir=run_dir) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in WITHOUT_FLOCK:
                raise
            return "heartbeat"
    return "kernel"


def _hold_by_kernel(path: Path, heartbeat_seconds: float, stale_seconds: float) -> HeldLock | None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _close_in_children(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_file(descriptor, path) and not _held_by_heartbeat(path, stale_seconds):
            me = _this_process(by_kernel=True)
            os.truncate(descriptor, 0)
            os.write(descriptor, _as_text(me).encode())
            return HeldLock(path, me, descriptor, heartbeat_seconds)
    except BlockingIOError:
        pass
    except BaseException:
        _close(descriptor)
        raise
    _close(descriptor)
    return None


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether the file has still this name: its former holder removes it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _held_by_heartbeat(path: Path, stale_seconds: float) -> bool:
    holder = _read_holder(path)
    return holder is not None and not holder.by_kernel and _why_stale(path, holder, stale_seconds) is None


def _hold_by_heartbeat(path: Path, heartbeat_seconds: float, stale_seconds: float) -> HeldLock | None:
    me, seen = _this_process(by_kernel=False), _read_holder(path)
    if path.exists():
        reason = _why_stale(path, seen, stale_seconds)
        if reason is None:
            return None
        _log.warning("run %s: the lock of %s is taken over, %s", path.parent.name, seen or "another process", reason)
        temporary = path.with_name(f".lock.{me.token}")  # a process of the same number may do so on another host
        temporary.write_text(_as_text(me), encoding="utf-8")
        temporary.replace(path)
    else:
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(_as_text(me))
        except FileExistsError:
            return None
    # two may have found it stale at once: the one whose name stays has it
    time.sleep(min(1.0, heartbeat_seconds / 2))
    held = _read_holder(path) == me
    return HeldLock(path, me, None, heartbeat_seconds) if held else None


def _why_stale(path: Path, holder: _Holder | None, stale_seconds: float) -> str | None:
    """The reason why a lock file no longer counts, or None if it does."""
    if holder is not None and holder.machine is not None and holder.machine == _machine() and _is_gone(holder.pid):
        return "its process is gone"
    try:
        touched = path.stat().st_mtime
    except FileNotFoundError:
        return None
    # both times by the clock of the file system: those of two hosts may differ
    with tempfile.TemporaryFile(dir=path.parent) as probe:
        age = os.fstat(probe.fileno()).st_mtime - touched
    return f"its last sign of life is {age:.0f} s old" if age > stale_seconds else None


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user, whose processes /proc may hide
        return False
    return not still_alive(pid)


def _read_holder(path: Path) -> _Holder | None:
    """Who the lock file names; None if nobody, or not yet."""
    try:
        # opened, not only looked at: NFS then asks its server instead of a cache
        values = json.loads(path.read_text(encoding="utf-8"))
        return _Holder(**{field.name: values[field.name] for field in fields(_Holder)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _as_text(holder: _Holder) -> str:
    return json.dumps(asdict(holder))


def _this_process(by_kernel: bool) -> _Holder:
    return _Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        job=os.environ.get("SLURM_JOB_ID"),
        started=datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
        machine=_machine(),
        by_kernel=by_kernel,
        token=uuid.uuid4().hex,
    )


def _machine() -> str | None:
    """Where this process's id means something; containers of one host name have ids of their own."""
    if not sys.platform.startswith("linux"):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _close_in_children(descriptor: int) -> None:
    """A child that outlives this process, such as a loader's worker, must not keep the lock."""
    _register_at_fork()
    _open_descriptors.add(descriptor)


@functools.cache
def _register_at_fork() -> None:
    os.register_at_fork(after_in_child=lambda: [_close(descriptor) for descriptor in list(_open_descriptors)])


def _close(descriptor: int) -> None:
    _open_descriptors.discard(descriptor)
    os.close(descriptor)
