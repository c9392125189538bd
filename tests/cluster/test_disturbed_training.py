"""Trainings on a real SLURM that are signalled, run out of time, are requeued, lose their node or the main Snakemake.

However that happens, the same command ends with what an undisturbed training gives, bit for bit; nothing that was
complete is done again, and no two processes write into one run. All are disturbed at once, to save time: each works in
a folder of its own, slowly until it is disturbed.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from cluster_runs import (
    FINAL,
    checkpoints,
    copy_untrained,
    power_off,
    processes_in,
    run_on_slurm,
    start_on_slurm,
    trained,
)
from two_nodes import run, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
# Seconds a tile, four of which an iteration waits for: until a training is disturbed, and while it must not end.
PACE, CRAWL = "0.3", "30"


class Training:
    """A training on the cluster, in its folder."""

    def __init__(self, folder: Path, cluster, *options: str) -> None:
        self.folder, self.cluster = folder, cluster
        (folder / "pace").write_text(PACE)
        self.before = self.complete()
        self.snakemake = start_on_slurm(folder, FINAL, *options)

    def complete(self) -> dict[Path, int]:
        """Files that were there before training, with their times."""
        kept = ("manifests", "models", "slides", "tiles")
        return {
            path: path.stat().st_mtime_ns
            for name in kept
            for path in (self.folder / "results" / name).rglob("*")
            if path.is_file()
        }

    def said(self) -> str:
        """What Snakemake said so far."""
        return (self.folder / "said.log").read_text()

    def job(self) -> str:
        """The number of the job that was submitted last."""
        return re.findall(r"has been submitted with SLURM jobid (\d+)", self.said())[-1]

    def node(self) -> str:
        """The node that it runs on."""
        return run("squeue", "--noheader", "--jobs", self.job(), "--format", "%N").strip()

    def trains(self) -> bool:
        """Whether it has something to lose: a checkpoint, and work after it."""
        assert self.snakemake.poll() is None, self.said()
        return bool(checkpoints(self.folder))

    def start_now(self) -> None:
        """Spares the two minutes that SLURM lets a job wait that it has requeued."""
        state = ["squeue", "--noheader", "--jobs", self.job(), "--format", "%T"]
        wait_for(lambda: run(*state).strip() == "PENDING", 60, "the job to be requeued")
        run("scontrol", "update", f"jobid={self.job()}", "StartTime=now")

    def crawl(self) -> None:
        """From now on it gets nowhere."""
        (self.folder / "pace").write_text(CRAWL)

    def hurry(self) -> None:
        """From now on it is as fast as it can be."""
        (self.folder / "pace").unlink(missing_ok=True)

    def log(self) -> str:
        """The training's own output, of its last attempt; nothing before that has begun."""
        log = self.folder / "logs/train/pretrain.log"
        return log.read_text() if log.exists() else ""


def signalled(training: Training) -> None:
    """As SLURM's warning before a preemption: saved, and given again by Snakemake's retries."""
    training.hurry()
    run("scancel", "--signal=TERM", training.job())


def out_of_time(training: Training) -> None:
    """The limit comes down to what the job has nearly used; SLURM ends it."""
    training.crawl()
    run("scontrol", "update", f"jobid={training.job()}", "TimeLimit=1")


def requeued(training: Training) -> None:
    """The same job starts anew."""
    training.hurry()
    run("scontrol", "requeue", training.job())
    training.start_now()


def abandoned(training: Training) -> None:
    """The main Snakemake is killed; its job goes on by itself."""
    training.crawl()
    os.kill(training.snakemake.pid, signal.SIGKILL)
    training.snakemake.wait()


DISTURBANCES = {each.__name__: each for each in (signalled, out_of_time, requeued, abandoned)}


@pytest.fixture(scope="module")
def disturbed(cluster, local, tmp_path_factory):
    """Name -> a training that has just been disturbed."""
    base = tmp_path_factory.mktemp("disturbed")
    trainings = {name: Training(copy_untrained(local, base / name), cluster) for name in DISTURBANCES}
    waiting = dict(trainings)
    limit = time.monotonic() + 600
    while waiting:
        assert time.monotonic() < limit, "no checkpoint within 10 minutes"
        for name in [name for name, training in waiting.items() if training.trains()]:
            training = waiting.pop(name)
            training.job_before = training.job()
            DISTURBANCES[name](training)
        time.sleep(0.3)
    yield trainings
    for training in trainings.values():
        if training.snakemake.poll() is None:
            training.snakemake.kill()
            training.snakemake.wait()
            run("scancel", training.job())


def check_end(training, local):
    """The result is that of an undisturbed training, nothing was done twice, and nobody is left."""
    assert trained(training.folder) == trained(local)
    assert training.complete() == training.before
    assert re.search(r"resumes after iteration \d+", training.log()), training.log()
    assert not (training.folder / "results/runs/pretrain/.lock").exists()
    wait_for(lambda: not processes_in(training.folder), 60, "the last process to end")


@pytest.mark.parametrize("name", ["out_of_time", "signalled", "requeued"])
def test_a_disturbed_training_ends_as_if_nothing_had_been(disturbed, local, name):
    training = disturbed[name]
    if name == "out_of_time":
        # warned at once, it saves and fails; where it cannot end its step in time, SLURM kills it
        wait_for(lambda: "Trying to restart job" in training.said(), 240, "SLURM to end the job")
        training.hurry()
    assert training.snakemake.wait(timeout=600) == 0, training.said()[-4000:]
    same_job = training.job() == training.job_before
    assert same_job == (name == "requeued")
    check_end(training, local)


def test_a_killed_snakemake_leaves_a_job_that_no_other_gets_past(disturbed, local):
    """The orphan goes on; a second one is refused, and says which job to end; after that the same command finishes."""
    training = disturbed["abandoned"]
    orphan, folder = training.job_before, training.folder
    status, said = run_on_slurm(folder, FINAL, check=False)
    assert status == 1 and "unlock" in said
    run_on_slurm(folder, "--unlock")
    status, said = run_on_slurm(folder, FINAL, "--retries", "0", check=False)
    assert status == 1
    assert re.search(rf"run pretrain is being trained by process \d+ on \S+, job {orphan}, since", said), said[-3000:]
    training.hurry()
    run("scancel", orphan)
    wait_for(lambda: not any(job == orphan for job, *_ in training.cluster.jobs()), 60, "the orphan to end")
    run_on_slurm(folder, FINAL)
    check_end(training, local)


def test_a_node_that_goes_down(cluster, local, tmp_path):
    """Its slurmd dies while its processes go on: the job starts on the other node, where the lock keeps it out."""
    training = Training(copy_untrained(local, tmp_path / "down"), cluster)
    wait_for(training.trains, 300, "a checkpoint")
    node, job = training.node(), training.job()
    training.crawl()
    cluster.kill_node(node)
    try:
        wait_for(lambda: cluster.nodes()[node].startswith("down"), 90, f"{node} to be down")
        training.start_now()
        wait_for(lambda: training.node() not in ("", node), 120, "the job to start on the other node")
        wait_for(lambda: "waiting for run pretrain" in training.log(), 120, "the second start to meet the lock")
        assert re.search(rf"it is being trained by process \d+ on \S+, job {job}", training.log())
        training.hurry()
        power_off(training.folder, node)
        assert training.snakemake.wait(timeout=600) == 0, training.said()[-4000:]
    finally:
        cluster.start_node(node)
    check_end(training, local)
