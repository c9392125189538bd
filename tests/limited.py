"""Scripts run in a forked process with limits of time and memory: what a bad input must not exceed."""

import atexit
import functools
import importlib
import json
import os
import resource
import runpy
import signal
import subprocess
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

    It is forked from a process that has imported what scripts need already, and that has no threads as pytest may have.
    """
    with tempfile.NamedTemporaryFile() as output:
        request = {"script": str(script), "arguments": [str(argument) for argument in arguments], "output": output.name}
        server = _server()
        server.stdin.write(json.dumps(request | {"cpu_s": cpu_s, "memory_mb": memory_mb}) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return Ended(status, Path(output.name).read_text(errors="replace"))


@functools.cache
def _server() -> subprocess.Popen:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent / "workflow_scripts")])
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", "import limited; limited.serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen) -> None:
    server.stdin.close()
    server.wait()
    server.stdout.close()


def serve() -> None:
    """Forks a process for each request, and answers with how it ended."""
    for name in ("inspection", "tiling", "skipped_tiles", "skipping", "geojson", "set_options"):
        importlib.import_module(f"dinoscope.slides.{name}")
    importlib.import_module("dinoscope.visualize.overview")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            output = os.open(request.pop("output"), os.O_WRONLY)
            _run(Path(request.pop("script")), request.pop("arguments"), output, **request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


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
