"""torchrun on one machine or one of several, started from Python so that a user's error ends in one sentence."""

import hashlib
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousConnectionError, RendezvousTimeoutError
from torch.distributed.run import parse_args, run

from dinoscope.cli import recorded_error
from dinoscope.errors import ConfigError
from dinoscope.train.distributed import NODES_VARIABLE
from dinoscope.train.slurm import Step, node_address

__all__ = ["Meeting", "num_processes", "run_torchrun"]

CPU_PROCESSES = 2
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # passed on to the processes
_FIRST_PORT, _PORTS = 29500, 2000  # one of these, by the job's number, so that two jobs that share a node do not meet
_STOP_SECONDS = "300"  # for the step under way and its checkpoint, before they are killed


@dataclass(frozen=True)
class Meeting:
    """Where the launchers of a run on several nodes find each other.

    Attributes:
        nodes: How many come.
        endpoint: HOST:PORT of the one that keeps the list.
        name: The same for all, and for no other run at this endpoint.
        is_host: Whether this one keeps the list; None: when HOST is a name of this machine.
        address: What the others reach this machine by; None: its name.
        minutes: How long the others are waited for.
    """

    nodes: int = 1
    endpoint: str = "localhost:0"
    name: str | None = None
    is_host: bool | None = None
    address: str | None = None
    minutes: float = 10.0

    @classmethod
    def of_step(cls, step: Step, minutes: float) -> "Meeting":
        """Of the tasks of a SLURM step, one a node; the first node keeps the list."""
        first = step.first_node()
        port = _FIRST_PORT + (10 * int(step.job or 0) + int(step.number or 0)) % _PORTS
        here = os.environ.get("SLURMD_NODENAME")
        address = None if here is None else node_address(here)
        name = f"job-{step.job}.{step.number}"
        return cls(step.nodes, f"{node_address(first)}:{port}", name, step.task == 0, address, minutes)

    @classmethod
    def by_hand(cls, nodes: int, command: list[str], endpoint: str, address: str | None, minutes: float) -> "Meeting":
        """Of machines on each of which the same command was given: another command there is another run's."""
        digest = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
        return cls(nodes, endpoint, f"by-hand-{digest}", address=address, minutes=minutes)

    def options(self, started: str) -> list[str]:
        """Arguments of torchrun."""
        conf = f"join_timeout={60 * self.minutes:.0f}" + (
            "" if self.is_host is None else f",is_host={int(self.is_host)}"
        )
        options = ["--nnodes", str(self.nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint]
        options += ["--rdzv-id", self.name or started, "--rdzv-conf", conf]
        return options + ([] if self.address is None else ["--local-addr", self.address])


def num_processes(wanted: str, step: Step | None = None) -> int:
    """Number of training processes on this machine for "auto", "gpu" or a number.

    Args:
        wanted: One of these.
        step: What SLURM gave, where the number of GPUs counts.

    Raises:
        ConfigError: Neither, more processes than GPUs, or other GPUs than SLURM gave.
    """
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if step is not None and wanted in ("auto", "gpu"):
        step.require_gpus(gpus)
    if wanted == "auto":
        return gpus or CPU_PROCESSES
    if wanted == "gpu":
        if not gpus:
            raise ConfigError("--processes is gpu, but torch sees none; use auto or a number")
        return gpus
    if not wanted.isdigit() or int(wanted) < 1:
        raise ConfigError(f"--processes is {wanted!r}; give auto, gpu or a number from 1")
    if gpus and int(wanted) > gpus:
        raise ConfigError(
            f"--processes is {wanted}, but torch sees only {gpus} GPUs; each process needs one of its own"
        )
    return int(wanted)


def run_torchrun(
    command: list[str], processes: int, log_dir: Path | None, error_file_variable: str, meeting: Meeting | None = None
) -> int:
    """Runs a script and its arguments in `processes` processes here, and as many on each of the other nodes that meet.

    Returns the exit status, 75 for "start it again".

    Each process writes into `log_dir`, the first one also to this process's output. The sentence of a user's error,
    which the script leaves in the file that `error_file_variable` names, is repeated as the last line.
    """
    started = time.strftime("%Y%m%d-%H%M%S")  # names the folder of this start's logs
    meeting = meeting or Meeting()
    os.environ[NODES_VARIABLE] = str(meeting.nodes)
    options = [*meeting.options(started), "--nproc-per-node", str(processes), "--signals-to-handle", _SIGNALS]
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        options += ["--log-dir", str(log_dir), "--redirects", "3", "--tee", "0:3"]
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        error_file = Path(folder) / "error.txt"
        os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", " ")  # else "[default0]:" before every line
        os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _STOP_SECONDS)
        os.environ[error_file_variable] = str(error_file)
        try:
            run(parse_args([*options, *command]))
        except ChildFailedError as error:
            recorded = recorded_error(error_file)
            if recorded is None:
                print(error, file=sys.stderr)
                return 1
            print(f"error: {recorded[0]}", file=sys.stderr)
            if log_dir is not None:
                print(
                    f"what each process printed: {log_dir}/{meeting.name or started}*/attempt_0/*/stderr.log",
                    file=sys.stderr,
                )
            return recorded[1]
        except SignalException as stopped:
            if (recorded := recorded_error(error_file)) is not None:
                print(f"error: {recorded[0]}", file=sys.stderr)
                return recorded[1]
            print(f"stopped by {stopped.sigval.name}; start it again to go on", file=sys.stderr)
            return 128 + stopped.sigval
        except (RendezvousTimeoutError, RendezvousConnectionError):
            print(
                f"error: not all {meeting.nodes} nodes met at {meeting.endpoint} within {meeting.minutes:g} minutes; "
                "start the same command on each of them, and see that the others reach that address and port",
                file=sys.stderr,
            )
            return 1
    return 0
