"""torchrun on one machine, started from Python so that a user's error ends in one sentence."""

import logging
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from dinoscope.cli import recorded_error
from dinoscope.errors import ConfigError

__all__ = ["num_processes", "run_torchrun"]

CPU_PROCESSES = 2
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # passed on to the processes
_STOP_SECONDS = "300"  # for the step under way and its checkpoint, before they are killed


def num_processes(wanted: str) -> int:
    """Number of training processes for "auto", "gpu" or a number.

    Raises:
        ConfigError: Neither, or more processes than GPUs.
    """
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
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


def run_torchrun(command: list[str], processes: int, log_dir: Path | None, error_file_variable: str) -> int:
    """Runs a script and its arguments in `processes` processes; returns the exit status, 75 for "start it again".

    Each process writes into `log_dir`, the first one also to this process's output. The sentence of a user's error,
    which the script leaves in the file that `error_file_variable` names, is repeated as the last line.
    """
    started = time.strftime("%Y%m%d-%H%M%S")  # names the folder of this start's logs
    options = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--rdzv-id", started]
    options += ["--nproc-per-node", str(processes), "--signals-to-handle", _SIGNALS]
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
                print(f"what each process printed: {log_dir}/{started}*/attempt_0/*/stderr.log", file=sys.stderr)
            return recorded[1]
        except SignalException as stopped:
            if (recorded := recorded_error(error_file)) is not None:
                print(f"error: {recorded[0]}", file=sys.stderr)
                return recorded[1]
            print(f"stopped by {stopped.sigval.name}; start it again to go on", file=sys.stderr)
            return 128 + stopped.sigval
    return 0
