"""The lock of a run's folder, within one process."""

import errno
import fcntl
import json
import logging
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from dinoscope.errors import LockError
from dinoscope.train import lock as lock_module
from dinoscope.train.lock import file_system_type, run_lock

QUICK = {"decided_by": "heartbeat", "heartbeat_seconds": 0.2, "stale_seconds": 1.0}


def foreign_lock(run_dir: Path, *, seconds_old: float = 0.0, **changes: object) -> Path:
    """The lock file of a trainer elsewhere, as a client of the same server finds it."""
    values = {"host": "node17", "pid": 4242, "job": "991", "started": "2025-03-01 10:00:00+01:00"}
    values |= {"machine": "another boot/1", "by_kernel": False, "token": "theirs"}
    run_dir.mkdir(exist_ok=True)
    path = run_dir / ".lock"
    path.write_text(json.dumps(values | changes))
    touched = time.time() - seconds_old
    os.utime(path, (touched, touched))
    return path


@pytest.mark.parametrize("decided_by", ["kernel", "heartbeat"])
def test_the_file_names_its_holder_and_is_gone_at_the_end(tmp_path: Path, monkeypatch, decided_by: str) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with run_lock(tmp_path / "run", decided_by=decided_by, heartbeat_seconds=0.2) as lock:
        lock.require_held()
        held = json.loads((tmp_path / "run" / ".lock").read_text())
        assert held["pid"] == os.getpid()
        assert held["job"] == "77"
        assert held["host"] == os.uname().nodename
        with (
            pytest.raises(LockError, match=rf"process {os.getpid()} on {held['host']}, job 77, since 2\d{{3}}-"),
            run_lock(tmp_path / "run", 0.0, decided_by=decided_by),
        ):
            pass
    assert not list((tmp_path / "run").iterdir())
    with pytest.raises(ZeroDivisionError), run_lock(tmp_path / "run", decided_by=decided_by, heartbeat_seconds=0.2):
        raise ZeroDivisionError
    assert not list((tmp_path / "run").iterdir())


def test_the_heartbeat_keeps_a_lock_fresh_beyond_its_staleness(tmp_path: Path) -> None:
    with run_lock(tmp_path, **QUICK):
        time.sleep(1.5)
        with pytest.raises(LockError), run_lock(tmp_path, 0.5, **QUICK):
            pass


def test_a_lock_elsewhere_counts_until_its_heartbeat_is_old(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign_lock(tmp_path)
    named = "run .* is being trained by process 4242 on node17, job 991, since 2025-03-01 10:00:00"
    with pytest.raises(LockError, match=named), run_lock(tmp_path, 0.3, **QUICK):
        pass
    assert json.loads((tmp_path / ".lock").read_text())["token"] == "theirs"
    foreign_lock(tmp_path, seconds_old=30)
    with pytest.raises(LockError, match=named), run_lock(tmp_path, 0.3, **QUICK | {"stale_seconds": 60.0}):
        pass
    with caplog.at_level(logging.WARNING), run_lock(tmp_path, 0.3, **QUICK):
        pass
    assert "the lock of process 4242 on node17" in caplog.text
    assert "its last sign of life is 30 s old" in caplog.text


def test_one_who_waits_gets_a_stale_lock_in_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    foreign_lock(tmp_path)
    started = time.monotonic()
    with caplog.at_level(logging.INFO), run_lock(tmp_path, 10, **QUICK):
        assert 0.9 < time.monotonic() - started < 5
    waits = [record.message for record in caplog.records if record.message.startswith("waiting for run")]
    assert len(waits) == 1
    assert "up to 10 s: it is being trained by process 4242 on node17" in waits[0]


def test_a_process_that_is_gone_from_this_machine_holds_nothing(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    slow = QUICK | {"stale_seconds": 1e6}
    foreign_lock(tmp_path, pid=gone.pid)  # the same number on another machine says nothing
    with pytest.raises(LockError), run_lock(tmp_path, 0.0, **slow):
        pass
    foreign_lock(tmp_path, pid=gone.pid, machine=lock_module._machine())
    with run_lock(tmp_path, 0.0, **slow):
        pass
    foreign_lock(tmp_path, pid=os.getpid(), machine=lock_module._machine())
    with pytest.raises(LockError), run_lock(tmp_path, 0.0, **slow):
        pass
    with subprocess.Popen(["true"]) as zombie:
        time.sleep(0.3)
        foreign_lock(tmp_path, pid=zombie.pid, machine=lock_module._machine())
        with run_lock(tmp_path, 0.0, **slow):
            pass


def test_a_process_of_another_user_is_not_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert not lock_module._is_gone(2**22 + 1)  # no such process in /proc, as under hidepid


@pytest.mark.parametrize("text", ["", '{"host": "node17", "pi', "[]", '{"pid": 3}'])
def test_an_unreadable_lock_counts_while_it_is_fresh(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".lock"
    path.write_text(text)
    with pytest.raises(LockError, match="trained by another process"), run_lock(tmp_path, 0.0, **QUICK):
        pass
    os.utime(path, (0, 0))
    with run_lock(tmp_path, 0.0, **QUICK):
        pass


def test_the_kernel_decides_alone_over_what_a_killed_process_left(tmp_path: Path) -> None:
    foreign_lock(tmp_path, by_kernel=True)  # a container of another name that was killed this moment
    with run_lock(tmp_path, 0.0, decided_by="kernel"):
        pass
    foreign_lock(tmp_path)  # by heartbeat: on a client of this machine's disk
    with pytest.raises(LockError, match="node17"), run_lock(tmp_path, 0.0, decided_by="kernel"):
        pass


def test_holders_by_kernel_keep_a_heartbeat_for_those_who_mount_the_folder(tmp_path: Path, monkeypatch) -> None:
    with run_lock(tmp_path, decided_by="kernel", heartbeat_seconds=0.2):
        time.sleep(1.5)
        monkeypatch.setattr(lock_module, "_machine", lambda: "another boot/2")
        with pytest.raises(LockError), run_lock(tmp_path, 0.0, **QUICK):
            pass


def test_a_holder_whose_lock_was_taken_over_learns_it_and_leaves_the_other_alone(tmp_path: Path) -> None:
    with run_lock(tmp_path, **QUICK) as lock:
        path = foreign_lock(tmp_path, seconds_old=500)
        with pytest.raises(LockError, match="taken over by process 4242 on node17"):
            lock.require_held()
        time.sleep(0.5)
        assert path.stat().st_mtime < time.time() - 400, "it kept up a lock that is not its own"
    assert path.exists()


def test_without_flock_the_heartbeat_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    assert lock_module._what_decides(tmp_path) == "kernel"
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert lock_module._what_decides(tmp_path) == "heartbeat"
    with run_lock(tmp_path, heartbeat_seconds=0.2):
        assert json.loads((tmp_path / ".lock").read_text())["by_kernel"] is False
    monkeypatch.undo()
    monkeypatch.setattr(lock_module, "file_system_type", lambda path: "nfs4")
    assert lock_module._what_decides(tmp_path) == "heartbeat"


def test_file_system_types_are_those_that_df_tells(tmp_path: Path) -> None:
    odd = tmp_path / "with space"
    odd.mkdir()
    for folder in (odd, Path("/"), Path("/proc"), Path("/dev/shm")):
        told = subprocess.run(["stat", "-f", "-c", "%T", folder], capture_output=True, text=True, check=True).stdout
        # stat names ext2, ext3 and ext4 alike
        assert file_system_type(folder)[:3] == told.strip().replace("overlayfs", "overlay")[:3]


def test_only_one_of_many_gets_a_stale_lock(tmp_path: Path) -> None:
    foreign_lock(tmp_path, seconds_old=100)
    held, refused, most = [], [], []
    ready = threading.Barrier(6)

    def contend() -> None:
        ready.wait()
        try:
            with run_lock(tmp_path, 0.8, decided_by="heartbeat", heartbeat_seconds=0.4, stale_seconds=5.0):
                held.append(1)
                most.append(len(held))
                time.sleep(2.5)
                held.pop()
        except LockError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=contend) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]
    assert len(refused) == 5
