"""Starts a training script in one process a GPU, or in a few on the CPU (torchrun), on one machine or on several.

one machine:     python workflow_scripts/launch.py -- workflow_scripts/pretrain.py --config …
a SLURM job:     python workflow_scripts/launch.py --nodes 2 -- …     (starts itself by srun, one task a node)
without SLURM:   python workflow_scripts/launch.py --nodes 2 --rendezvous HOST:29500 -- …     (the same on each machine)

What each process prints is kept under --log-dir; the first one's is shown as well. When this program is ended, however
that happens, its training processes end too.
"""

import argparse
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from dinoscope.cli import ERROR_FILE_VARIABLE, HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.processes import snakemake_ancestor, still_alive
from dinoscope.train.slurm import Step, job_end, srun_command

# Snakemake gives each of these all threads of the job, and MKL heeds its own before OpenMP's.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def main() -> None:
    """Runs torchrun in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--processes", default="auto", help="auto (one a GPU, else 2) | gpu (one a GPU) | a number")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that train together")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="without SLURM: where they meet, one of them")
    parser.add_argument("--address", help="without SLURM: what the others reach this machine by, if not its name")
    parser.add_argument("--join-minutes", type=float, default=10.0, metavar="M", help="how long others are waited for")
    parser.add_argument("--cpus-per-node", type=int, metavar="N", help="processors that srun gives each node's task")
    parser.add_argument("--threads", type=int, help="CPU threads for a node's processes together (default: all cores)")
    parser.add_argument("--log-dir", type=Path, help="folder for the output of each process, kept over restarts")
    parser.add_argument("--stop-with-snakemake", action="store_true", help="end when the Snakemake above it is gone")
    parser.add_argument("script", help="training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    arguments = parser.parse_args()
    if arguments.stop_with_snakemake and (ancestor := snakemake_ancestor()) is not None:
        threading.Thread(target=_end_with, args=(ancestor,), daemon=True).start()
    sys.exit(_launch(arguments))


def _launch(arguments: argparse.Namespace) -> int:
    if not Path(arguments.script).is_file():
        raise ConfigError(f"script {arguments.script} does not exist")
    step = Step.of()
    _require_what_was_asked(step, arguments)
    if arguments.nodes > 1 and arguments.rendezvous is None and step.number is None:
        command = srun_command(arguments.nodes, arguments.cpus_per_node, [sys.executable, *sys.argv])
        sys.stdout.flush()
        os.execvp(command[0], command)
    if (end := job_end()) is not None:
        os.environ["SLURM_JOB_END_TIME"] = end
    if arguments.nodes > 1:  # when the one that keeps the list ends first, the others' goodbyes are no cause for alarm
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from dinoscope.train.launching import Meeting, num_processes, run_torchrun

    processes = num_processes(arguments.processes, step)
    threads = arguments.threads or os.cpu_count() or 1
    os.environ.update(dict.fromkeys(_THREADS, str(max(1, threads // processes))))
    command = [arguments.script, *arguments.arguments]
    if arguments.nodes == 1:
        meeting = Meeting()
    elif arguments.rendezvous is None:
        meeting = Meeting.of_step(step, arguments.join_minutes)
    else:
        where = (arguments.rendezvous, arguments.address, arguments.join_minutes)
        meeting = Meeting.by_hand(arguments.nodes, command, *where)
    return run_torchrun(command, processes, arguments.log_dir, ERROR_FILE_VARIABLE, meeting)


def _require_what_was_asked(step: Step, arguments: argparse.Namespace) -> None:
    """The nodes and tasks that there are must be those that were asked for; else the same training would run twice."""
    if arguments.nodes < 1:
        raise ConfigError(f"--nodes is {arguments.nodes}; give a number from 1")
    if arguments.nodes == 1:
        if arguments.rendezvous is not None:
            raise ConfigError("--rendezvous is for several machines; say how many with --nodes")
        step.require_one_node()
    elif arguments.rendezvous is not None:
        step.require_alone()
        if not re.fullmatch(r"[^:]+:[0-9]+|\[[^]]+\]:[0-9]+", arguments.rendezvous):
            raise ConfigError(f"--rendezvous is {arguments.rendezvous!r}; give HOST:PORT of one of the machines")
    elif step.job is None:
        raise ConfigError(
            f"--nodes is {arguments.nodes}, but this is no SLURM job; start the same command on each machine, with "
            "--rendezvous HOST:29500, where HOST is one of them"
        )
    elif step.number is not None:
        step.require_task_of(arguments.nodes)
    elif step.job_nodes is not None and step.job_nodes != arguments.nodes:
        raise ConfigError(
            f"--nodes is {arguments.nodes}, but job {step.job} has {step.job_nodes} nodes; the two must agree"
        )


def _end_with(ancestor: int) -> None:
    """A killed Snakemake leaves its jobs running; this one then asks itself to stop, which saves the training."""
    while still_alive(ancestor):
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run_script(main)
