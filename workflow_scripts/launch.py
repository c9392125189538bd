"""Starts a training script in one process a GPU, or in a few processes on the CPU (torchrun on one machine).

    python workflow_scripts/launch.py --processes auto -- workflow_scripts/pretrain.py --config …

What each process prints is kept under --log-dir; the first one's is shown as well. When this program is ended, however
that happens, its training processes end too.
"""

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

from dinoscope.cli import ERROR_FILE_VARIABLE, HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.processes import snakemake_ancestor, still_alive


def main() -> None:
    """Runs torchrun in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--processes", default="auto", help="auto (one a GPU, else 2) | gpu (one a GPU) | a number")
    parser.add_argument("--threads", type=int, help="CPU threads for all processes together (default: all cores)")
    parser.add_argument("--log-dir", type=Path, help="folder for the output of each process, kept over restarts")
    parser.add_argument("--stop-with-snakemake", action="store_true", help="end when the Snakemake above it is gone")
    parser.add_argument("script", help="training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    arguments = parser.parse_args()
    if arguments.stop_with_snakemake and (ancestor := snakemake_ancestor()) is not None:
        threading.Thread(target=_end_with, args=(ancestor,), daemon=True).start()
    sys.exit(_launch(arguments))


def _launch(arguments: argparse.Namespace) -> int:
    from dinoscope.train.launching import num_processes, run_torchrun

    processes = num_processes(arguments.processes)
    threads = arguments.threads or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // processes))
    if not Path(arguments.script).is_file():
        raise ConfigError(f"script {arguments.script} does not exist")
    command = [arguments.script, *arguments.arguments]
    return run_torchrun(command, processes, arguments.log_dir, ERROR_FILE_VARIABLE)


def _end_with(ancestor: int) -> None:
    """A killed Snakemake leaves its jobs running; this one then asks itself to stop, which saves the training."""
    while still_alive(ancestor):
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run_script(main)
