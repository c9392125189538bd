"""launch.py on several machines, started by hand on each (here: several times on this one)."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "workflow_scripts"
SCRIPT = """
import sys, torch
from dinoscope.cli import run_script
from dinoscope.train.distributed import joined_world

def main():
    with joined_world() as world:
        total = world.reduce(torch.tensor(float(world.rank)), torch.distributed.ReduceOp.SUM)
        print(f"rank {world.rank} of {world.size}, {world.local_size} here, sum {total:g}\\n", end="", flush=True)

run_script(main)
"""


@pytest.fixture
def endpoint():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(folder, endpoint, processes, *options, arguments=()):
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(SCRIPTS / "launch.py"), "--nodes", "2", "--rendezvous", endpoint]
    command += ["--address", "127.0.0.1", "--processes", str(processes), "--threads", "1", *options, "--", "script.py"]
    command += arguments
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(SCRIPTS), "HOME": str(folder)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_two_machines_are_one_world(tmp_path, endpoint):
    both = [start(tmp_path, endpoint, 2), start(tmp_path, endpoint, 2)]
    said = [each.communicate(timeout=240)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    lines = sorted(line.strip() for text in said for line in text.splitlines() if "rank" in line)
    assert lines == [f"rank {rank} of 4, 2 here, sum 6" for rank in range(4)]
    assert all(text.count(" of 4") == 2 for text in said)


@pytest.mark.slow
def test_machines_with_different_numbers_of_processes_are_refused(tmp_path, endpoint):
    both = [start(tmp_path, endpoint, 1), start(tmp_path, endpoint, 2)]
    said = [each.communicate(timeout=240)[0] for each in both]
    assert all(each.returncode == 1 for each in both), said
    assert "rank" not in said[0].replace("ranks", "") + said[1].replace("ranks", "")
    for number, text in zip((1, 2), said, strict=True):
        assert f"there are {number} training processes on this node, but 3 on all 2 nodes together" in text


@pytest.mark.slow
def test_a_machine_that_nobody_joins_says_so(tmp_path, endpoint):
    alone = start(tmp_path, endpoint, 1, "--join-minutes", "0.1")
    said, _ = alone.communicate(timeout=120)
    assert alone.returncode == 1
    assert f"error: not all 2 nodes met at {endpoint} within 0.1 minutes" in said.splitlines()[-1]
    assert "rank 0" not in said


@pytest.mark.long
@pytest.mark.slow
def test_two_runs_that_were_given_the_same_place_are_not_one_world(tmp_path, endpoint):
    """Each would else train with the other's machine."""
    both = [start(tmp_path, endpoint, 1, "--join-minutes", "0.4", arguments=["--run-dir", run]) for run in ("a", "b")]
    said = [each.communicate(timeout=240)[0] for each in both]
    assert [each.returncode for each in both] == [1, 1], said
    for text in said:
        assert f"error: not all 2 nodes met at {endpoint} within 0.4 minutes" in text
        assert "of 2" not in text
