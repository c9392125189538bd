"""What SLURM says of this process: its job, its step, and whether they are what training was asked to run on.

SLURM starts as many copies of a command as a step has tasks. A training that did not know of the others would run
twice, each copy with a world of its own on one GPU; whatever does not match what was asked is therefore refused.
"""

import datetime
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from dinoscope.errors import ConfigError

__all__ = ["Step", "job_end", "node_address", "srun_command"]

_JOB_END = "SLURM_JOB_END_TIME"
_ASK_SECONDS = 30
# Steps that no srun of the user's started: the shell that salloc opens on a node, and the batch script.
_SHELLS = ("4294967290", "4294967291")


@dataclass(frozen=True)
class Step:
    """The job and the step that a process runs in, as its environment tells.

    Attributes:
        job: Number of the job; None outside of SLURM.
        job_nodes: Nodes of the job; None when not told: within Snakemake's jobs most of SLURM's variables are gone.
        number: Number of the step that srun started; None in a batch script, in salloc's shell, and in Snakemake's jobs
            that start srun.
        tasks: Tasks of the step.
        nodes: Nodes of the step.
        task: Number of this task.
        node_list: Nodes of the step, in SLURM's notation.
        gpus: GPUs on this node; None when none were asked for.
    """

    job: str | None = None
    job_nodes: int | None = None
    number: str | None = None
    tasks: int = 1
    nodes: int = 1
    task: int = 0
    node_list: str | None = None
    gpus: int | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Of this process."""
        job, tasks = environment.get("SLURM_JOB_ID"), environment.get("SLURM_STEP_NUM_TASKS", "")
        if job is None:
            return cls()
        nodes, gpus = _number(environment.get("SLURM_JOB_NUM_NODES")), _number(environment.get("SLURM_GPUS_ON_NODE"))
        if not tasks.isdigit() or environment.get("SLURM_STEP_ID") in _SHELLS:
            return cls(job, nodes, gpus=gpus)
        return cls(
            job,
            nodes,
            number=environment.get("SLURM_STEP_ID", "0"),
            tasks=int(tasks),
            nodes=int(environment.get("SLURM_STEP_NUM_NODES", "1")),
            task=int(environment.get("SLURM_PROCID", "0")),
            node_list=environment.get("SLURM_STEP_NODELIST"),
            gpus=gpus,
        )

    def require_alone(self) -> None:
        """Raises ConfigError unless this is the only copy of what srun started."""
        if self.number is not None and self.tasks > 1:
            raise ConfigError(
                f"this is task {self.task} of the {self.tasks} that srun started in job {self.job}, and each of them "
                "would train a world of its own; start one task (srun --ntasks=1), or one a node and launch.py --nodes "
                "N (profiles/slurm-multinode does)"
            )

    def require_one_node(self) -> None:
        """Raises ConfigError unless this is the only copy, on a job whose nodes are all used.

        A step of one node within a larger job was asked for by whoever started it.
        """
        self.require_alone()
        if self.number is None and (self.job_nodes or 1) > 1:
            raise ConfigError(
                f"job {self.job} has {self.job_nodes} nodes, but training was asked to run on one, and the others "
                f"would idle; give launch.py --nodes {self.job_nodes}, or start it by srun --nodes=1 --ntasks=1"
            )

    def require_task_of(self, nodes: int) -> None:
        """Raises ConfigError unless the step has one task on each of so many nodes."""
        if (self.nodes, self.tasks) == (nodes, nodes):
            return
        what = f"{self.tasks} task{'s' * (self.tasks > 1)} on {self.nodes} node{'s' * (self.nodes > 1)}"
        raise ConfigError(
            f"training was asked to run on {nodes} nodes with one task each, but srun started {what} in job "
            f"{self.job}; srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 would fit; under Snakemake the "
            f"rule needs the resources nodes={nodes}, tasks={nodes} and mpi=srun, as in profiles/slurm-multinode"
        )

    def require_gpus(self, seen: int) -> None:
        """Raises ConfigError when torch sees another number of GPUs than SLURM gave this process."""
        if self.gpus is not None and self.gpus != seen:
            raise ConfigError(
                f"SLURM gave job {self.job} {self.gpus} GPUs on this node, but torch sees {seen}; "
                f"set launch.processes to a number of processes if that is meant, else look at nvidia-smi on the node"
            )

    def first_node(self) -> str:
        """Name of the node that task 0 runs on.

        Raises:
            ConfigError: scontrol does not tell.
        """
        names = (_ask("scontrol", "show", "hostnames", self.node_list or "") or "").split()
        if not names:
            raise ConfigError(f"scontrol does not say which nodes {self.node_list!r} of job {self.job} are")
        return names[0]


def node_address(name: str) -> str:
    """What other nodes reach a node by: SLURM's NodeAddr, else its name."""
    words = (_ask("scontrol", "--oneliner", "show", "node", name) or "").split()
    told = [word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")]
    return told[0] if told else name


def srun_command(nodes: int, cpus: int | None, command: list[str]) -> list[str]:
    """Starts a command once on each of a job's nodes; when one of them fails, the others are ended.

    Args:
        nodes: Their number.
        cpus: Processors of each; None: whatever the job has there.
        command: Program and arguments.
    """
    processors = "--cpu-bind=none" if cpus is None else f"--cpus-per-task={cpus}"
    shape = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", processors]
    return ["srun", *shape, "--kill-on-bad-exit=1", *command]


def job_end(environment: Mapping[str, str] = os.environ) -> str | None:
    """When the job ends by its time limit, in seconds since 1970 as text; None without job or limit.

    SLURM's own variable for it came with version 23 and does not reach what Snakemake starts.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None or _JOB_END in environment:
        return environment.get(_JOB_END)
    told = (_ask("squeue", "--noheader", "--jobs", job, "--format", "%e") or "").split()
    try:
        return str(int(datetime.datetime.fromisoformat(told[0]).timestamp()))
    except (IndexError, ValueError):  # not known, or N/A
        return None


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_ASK_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdigit() else None
