"""The lock of a run's folder between real processes, which are killed, stopped and forked."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
# answers "held", "refused: …", "lost: …" in lines of its own; holds the lock until a line comes in
CONTENDER = """
import json, logging, multiprocessing, sys, time
from pathlib import Path
from dinoscope.errors import LockError
from dinoscope.train.lock import run_lock
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
folder, wait_seconds, fork, settings = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "fork", sys.argv[4]
try:
    with run_lock(folder, wait_seconds, **json.loads(settings)) as lock:
        if fork:
            child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
            child.start()
            print(child.pid, flush=True)
        print("held", flush=True)
        sys.stdin.readline()
        lock.require_held()
        print("released", flush=True)
except LockError as error:
    print(f"refused: {error}", flush=True)
"""
KERNEL = {"decided_by": "kernel", "heartbeat_seconds": 0.2}
HEARTBEAT = {"decided_by": "heartbeat", "heartbeat_seconds": 0.4, "stale_seconds": 2.0}
KINDS = pytest.mark.parametrize("settings", [KERNEL, HEARTBEAT], ids=["kernel", "heartbeat"])


@pytest.fixture
def contend(tmp_path: Path) -> Iterator:
    with contextlib.ExitStack() as stack:

        def start(wait_seconds: float, settings: dict, fork: bool = False) -> subprocess.Popen:
            argv = [tmp_path / "run", str(wait_seconds), "fork" if fork else "-", json.dumps(settings)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", CONTENDER, *argv], cwd=SCRIPTS, **pipes)
            )
            stack.callback(process.kill)
            return process

        yield start


def answer(process: subprocess.Popen) -> str:
    return process.stdout.readline().rstrip("\n")


def let_go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()
    assert answer(process) == "released"


@KINDS
def test_of_two_that_start_at_once_one_waits_for_the_other(contend, tmp_path: Path, settings: dict) -> None:
    pair = [contend(20, settings) for _ in range(2)]
    deadline = time.monotonic() + 20
    while not (tmp_path / "run" / ".lock").exists() or not (tmp_path / "run" / ".lock").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    holder_pid = json.loads((tmp_path / "run" / ".lock").read_text())["pid"]
    first, second = sorted(pair, key=lambda process: process.pid != holder_pid)
    assert answer(first) == "held"
    let_go(first)
    assert answer(second) == "held"
    let_go(second)
    assert second.wait(5) == 0
    waits = [line for line in second.stderr.read().splitlines() if line.startswith("waiting for run run, up to 20 s")]
    assert len(waits) <= 1
    if waits:
        assert f"process {first.pid} on {os.uname().nodename}" in waits[0] or "another process" in waits[0]
    assert not list((tmp_path / "run").iterdir())


@KINDS
def test_the_second_is_refused_by_name_after_its_time(contend, settings: dict) -> None:
    holder = contend(0, settings)
    assert answer(holder) == "held"
    started = time.monotonic()
    second = contend(1.5, settings)
    refusal = answer(second)
    assert 1.4 < time.monotonic() - started < 10
    found = re.fullmatch(
        r"refused: run run is being trained by process (\d+) on (\S+), since (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S*); "
        r"wait for it or end it first",
        refusal,
    )
    assert found, refusal
    assert (int(found[1]), found[2]) == (holder.pid, os.uname().nodename)
    second.wait(5)
    assert second.stderr.read().count(f"waiting for run run, up to 1.5 s: it is being trained by process {holder.pid}")
    let_go(holder)


@KINDS
def test_a_killed_holder_frees_the_lock_although_its_child_lives_on(contend, settings: dict) -> None:
    holder = contend(0, settings, fork=True)
    child = int(answer(holder))
    try:
        assert answer(holder) == "held"
        second = contend(20, settings | {"stale_seconds": 1e6})
        line = second.stderr.readline()
        assert line.startswith("waiting for run run"), line
        holder.kill()
        killed = time.monotonic()
        assert answer(second) == "held"
        assert time.monotonic() - killed < 2.0
        os.kill(child, 0)  # still there
    finally:
        os.kill(child, signal.SIGKILL)
    let_go(second)


def test_a_holder_that_was_stopped_for_long_learns_that_it_lost_the_lock(contend, tmp_path: Path) -> None:
    holder = contend(0, HEARTBEAT)
    assert answer(holder) == "held"
    holder.send_signal(signal.SIGSTOP)
    try:
        second = contend(20, HEARTBEAT)
        assert answer(second) == "held"
    finally:
        holder.send_signal(signal.SIGCONT)
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert re.match(rf"refused: run run was taken over by process {second.pid} ", answer(holder))
    holder.wait(5)
    assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == second.pid
    let_go(second)
    assert second.wait(5) == 0
    assert re.search(
        rf"the lock of process {holder.pid} .* is taken over, its last sign of life is", second.stderr.read()
    )
    assert not list((tmp_path / "run").iterdir())


def test_a_container_of_another_name_holds_by_heartbeat_until_it_is_stale(contend, tmp_path: Path) -> None:
    """Two machines at one server, played by one: the file says another machine, and nobody keeps it up."""
    holder = contend(0, HEARTBEAT)
    assert answer(holder) == "held"
    holder.kill()
    holder.wait()
    path = tmp_path / "run" / ".lock"
    touched = path.stat().st_mtime
    path.write_text(path.read_text().replace(json.loads(path.read_text())["machine"], "another boot/1"))
    os.utime(path, (touched, touched))
    second = contend(20, HEARTBEAT)
    assert answer(second) == "held"
    assert time.time() - touched > HEARTBEAT["stale_seconds"]
    let_go(second)
