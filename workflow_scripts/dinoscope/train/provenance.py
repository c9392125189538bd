"""Who made a run: provenance.json in its folder, an entry for each time that it was started or went on.

An entry has the commit of the code and whether files were changed since, versions of packages, the command line, the
digest of config.yaml beside it (the resolved recipe), and for each machine its GPUs and its host: a digest that tells
hosts of a run apart, or its name where names may be told (privacy: hosts). Results are passed on; the names of a
hospital's machines are nobody's business. Absolute paths are cut down to the names of files for the same reason.
"""

import datetime
import hashlib
import logging
import os
import platform
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dinoscope
from dinoscope.errors import DinoscopeError
from dinoscope.files import read_json, sha256_file, write_json
from dinoscope.train.distributed import World

__all__ = ["PROVENANCE_NAME", "code_version", "without_folders", "write_provenance"]

_log = logging.getLogger(__name__)
PROVENANCE_NAME = "provenance.json"
_PACKAGES = ("torch", "numpy", "opencv-python-headless", "openslide-bin", "pyarrow", "omegaconf", "snakemake")
_ABSOLUTE = re.compile(r"(?:[A-Za-z]:)?[/\\](?:[^=,:]*[/\\])?(?=[^/\\]*$)")
_GIT_SECONDS = 20
_COMMIT = "DINOSCOPE_COMMIT"  # set in containers (containers/Dockerfile)


def write_provenance(run_dir: Path, world: World, first_iteration: int, *, name_hosts: bool) -> None:
    """Adds an entry for a start; all processes call it together, the main one writes.

    Args:
        run_dir: Folder of the run, with its config.yaml.
        world: The processes.
        first_iteration: The first one that this start does.
        name_hosts: Whether hosts are named.
    """
    mine = (socket.gethostname(), _device_name(world.device))
    gathered: list[Any] = [None] * world.size
    if world.size > 1 or dist.is_initialized():
        dist.all_gather_object(gathered, mine)
    else:
        gathered = [mine]
    if not world.is_main:
        return
    config = run_dir / "config.yaml"
    entry = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "first_iteration": first_iteration,
        "code": code_version(Path(dinoscope.__file__).parent),
        "versions": _versions(),
        "command": [without_folders(argument) for argument in sys.argv],
        "config_sha256": sha256_file(config) if config.is_file() else None,
        "machines": _machines(gathered, salt=run_dir.name, name_hosts=name_hosts),
    }
    try:
        write_json(run_dir / PROVENANCE_NAME, {"starts": [*_starts_before(run_dir), entry]})
    except OSError as error:  # a full disk costs an entry, never the run
        _log.warning("run %s: %s cannot be written: %s", run_dir.name, PROVENANCE_NAME, error)


def _starts_before(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return list(read_json(run_dir / PROVENANCE_NAME)["starts"])
    except (DinoscopeError, OSError, KeyError, TypeError):  # none yet, or one that a full disk has spoilt
        return []


def code_version(folder: Path) -> dict[str, Any]:
    """Commit that a folder is checked out at, and whether tracked files differ from it; None where there is no git.

    In a container, which has no .git, the commit is what the image was said to be built of.
    """
    commit, changes = (_git(folder, *command) for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno")))
    dirty = None if commit is None or changes is None else bool(changes)
    commit = commit or os.environ.get(_COMMIT) or None
    return {"dinoscope": dinoscope.__version__, "git_commit": commit, "git_dirty": dirty}


def without_folders(argument: str) -> str:
    """An argument of a command line with absolute paths cut down to the last name; relative ones stay."""
    key, equals, value = argument.partition("=")
    quote = '"' if value.startswith('"') else ""  # a text as JSON has it
    if equals and _ABSOLUTE.match(value.removeprefix(quote)):
        return f"{key}={quote}{_ABSOLUTE.sub('', value.removeprefix(quote))}"
    return _ABSOLUTE.sub("", argument) if _ABSOLUTE.match(argument) else argument


def _git(folder: Path, *command: str) -> str | None:
    """What git says of a folder, also where it belongs to another user, as a lab's shared copy does."""
    try:
        done = subprocess.run(
            ["git", "-c", "safe.directory=*", "-C", str(folder), *command],
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"CPU {next(models, platform.machine())}"


def _machines(gathered: Sequence[tuple[str, str]], salt: str, *, name_hosts: bool) -> list[dict[str, Any]]:
    """Hosts in the order of their first process, with the number of processes on each kind of device."""
    machines = []
    for host in dict.fromkeys(host for host, _ in gathered):
        shown = host if name_hosts else hashlib.sha256(f"{salt}\n{host}".encode()).hexdigest()[:12]
        devices = Counter(device for other, device in gathered if other == host)
        machines.append({"host": shown, "devices": dict(devices)})
    return machines
