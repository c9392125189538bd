"""One trainer at a time."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dinoscope.errors import LockError
from dinoscope.train.lock import run_lock

HOLDER = """
import sys, time, pathlib
from dinoscope.train.lock import run_lock
with run_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    scripts = Path(__file__).resolve().parents[2] / "workflow_scripts"
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], cwd=scripts, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_trainer_is_refused_by_name(tmp_path: Path) -> None:
    with hold(tmp_path / "run") as holder:
        with (
            pytest.raises(LockError, match=rf"run run is being trained by process {holder.pid}"),
            run_lock(tmp_path / "run", wait_seconds=0.5),
        ):
            pass
        holder.kill()
    with run_lock(tmp_path / "run", wait_seconds=0.5):
        pass


def test_the_lock_of_a_killed_trainer_is_waited_for(tmp_path: Path) -> None:
    with hold(tmp_path / "run") as holder:
        threading.Timer(1.0, holder.kill).start()
        started = time.monotonic()
        with run_lock(tmp_path / "run", wait_seconds=10):
            assert 0.5 < time.monotonic() - started < 5
