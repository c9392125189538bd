"""launch.py under a real srun: worlds of two nodes, and what would train twice or with less than was asked."""

import re
import subprocess
import sys
import time

import pytest

from snakemake_runs import REPOSITORY

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
LAUNCH = f"{sys.executable} {REPOSITORY}/workflow_scripts/launch.py"
SCRIPT = """
import os, sys, torch
from dinoscope.cli import run_script
from dinoscope.train.distributed import joined_world

def main():
    with joined_world() as world:
        total = world.reduce(torch.tensor(float(world.rank)), torch.distributed.ReduceOp.SUM)
        end, node = os.environ.get("SLURM_JOB_END_TIME"), os.environ["SLURMD_NODENAME"]
        print(f"rank {world.rank} of {world.size}, sum {total:g}, {node}, ends {end}", flush=True)
        if "fail" in sys.argv[1:] and world.rank == 1:
            sys.exit(3)
        if "fail" in sys.argv[1:]:
            world.any(False)

run_script(main)
"""
REFUSED = [
    # what SLURM is asked for, what the launcher is asked for, what it says, and how often
    ("srun --mem=1000 --ntasks=2 --nodes=1", "", "of the 2 that srun started in job", 2),
    ("srun --mem=1000 --ntasks=2 --nodes=2", "", "of the 2 that srun started in job", 2),
    ("srun --mem=1000 --ntasks=1 --nodes=1", "--nodes 2", "but srun started 1 task on 1 node in job", 1),
    ("srun --mem=1000 --ntasks=2 --nodes=1", "--nodes 2", "but srun started 2 tasks on 1 node in job", 2),
    ("salloc --mem=1000 --nodes=2", "", "has 2 nodes, but training was asked to run on one", 1),
    ("salloc --mem=1000 --nodes=2", "--nodes 3", "--nodes is 3, but job", 1),
    ("srun --mem=1000 --ntasks=1 --gpus=4", "", "4 GPUs on this node, but torch sees 0", 1),
]


@pytest.fixture
def folder(cluster, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "workflow_scripts"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def shell(folder, command):
    """Exit status, and all that was said."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
    )
    return done.returncode, done.stdout


@pytest.mark.parametrize(("slurm", "launcher", "sentence", "times"), REFUSED)
def test_what_would_train_twice_or_with_less_is_refused(folder, slurm, launcher, sentence, times):
    status, said = shell(folder, f"{slurm} {LAUNCH} {launcher} -- script.py")
    assert status != 0
    assert said.count(sentence) == times, said
    assert "rank" not in said


# The second as many sites have it, whose salloc opens its shell on a node (LaunchParameters=use_interactive_step).
@pytest.mark.parametrize("shell_of_salloc", ["", "srun --interactive --overlap --nodes=1 --ntasks=1 "])
def test_a_job_of_two_nodes_is_one_world(folder, shell_of_salloc):
    """As from a batch script: the launcher starts itself by srun on each node."""
    launch = f"{shell_of_salloc}{LAUNCH} --nodes 2 --processes 1 -- script.py"
    status, said = shell(folder, f"salloc --mem=1000 --nodes=2 {launch}")
    assert status == 0, said
    assert sorted(re.findall(r"rank (\d) of (\d), sum (\d)", said)) == [("0", "2", "1"), ("1", "2", "1")]
    assert set(re.findall(r", (n\d), ends", said)) == {"n1", "n2"}


def test_nodes_of_different_sizes_are_refused(folder):
    launch = f"{LAUNCH} --nodes 2 --processes $((SLURM_PROCID + 1)) -- script.py"
    status, said = shell(folder, f"srun --mem=1000 --nodes=2 --ntasks=2 bash -c '{launch}'")
    assert status != 0
    assert "but 3 on all 2 nodes together: each needs as many" in said, said
    assert not re.search(r"rank \d of", said)


def test_when_one_node_fails_the_others_end(folder):
    started = time.monotonic()
    status, said = shell(folder, f"salloc --mem=1000 --nodes=2 {LAUNCH} --nodes 2 --processes 1 -- script.py fail")
    assert status != 0, said
    assert len(re.findall(r"rank \d of 2", said)) == 2
    assert time.monotonic() - started < 240


def test_training_is_told_when_its_job_ends(folder):
    before = time.time()
    status, said = shell(folder, f"srun --mem=1000 --ntasks=1 --time=7 {LAUNCH} --processes 1 -- script.py")
    assert status == 0, said
    end = int(re.search(r"ends (\d+)", said).group(1))
    assert before + 60 < end <= time.time() + 7 * 60 + 60
