"""Scripts run in a forked process with limits of time and memory: what a bad input must not exceed."""

import os
import resource
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a script ended: exit status (negative: the signal that killed it) and what it said."""

    status: int
    said: str


def run_limited(script: Path, arguments: Sequence[object], *, cpu_s: int = 20, memory_mb: int = 1500) -> Ended:
    """Runs a Python script; more processor time or further memory than that kills it or makes it fail.

    The process is forked, so that what the tests have imported already costs nothing. Do not use it with threads about.
    """
    with tempfile.TemporaryFile() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _run(script, arguments, output.fileno(), cpu_s, memory_mb)
        signal_or_status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return Ended(signal_or_status, output.read().decode(errors="replace"))


def _run(script: Path, arguments: Sequence[object], output: int, cpu_s: int, memory_mb: int) -> None:
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (memory_mb << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(10 * cpu_s)  # for what waits without computing
        sys.argv = [str(script), *map(str, arguments)]
        import logging

        logging.getLogger().handlers.clear()
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
