"""A SLURM cluster of two nodes on this one machine, for the tests: munge, slurmctld and two slurmd, all real.

    python tests/cluster/two_nodes.py up      # then sinfo, squeue, sbatch, … work in any shell
    python tests/cluster/two_nodes.py down

It needs root, and Debian's packages slurm-wlm and munge. SLURM reads /etc/slurm/slurm.conf in every job, whatever
SLURM_CONF says outside, so that file is written; one that somebody else wrote is never touched. Each node has 64
processors, 400 GB and four GPUs, which exist in SLURM's books only.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = ("n1", "n2")
CONFIGURATION = Path("/etc/slurm/slurm.conf")
GPUS = Path("/etc/slurm/gres.conf")
STATE = Path("/var/lib/dinoscope-two-nodes")  # in no folder that a test removes: daemons write until they have ended
# What SLURM hands out as a node's GPUs: it wants device files, and nothing is confined.
_DEVICES = "/dev/null,/dev/zero,/dev/full,/dev/random"
_MARK = "# written by dinoscope's tests/cluster/two_nodes.py"
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
_CONF = """{mark}
ClusterName=dinoscope
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={state}/controller
SlurmdSpoolDir={state}/%n
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/%n.pid
SlurmctldLogFile={state}/slurmctld.log
SlurmdLogFile={state}/%n.log
# what no machine of one's own can change: nodes are processes here, so nothing is confined
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
# a dead node is noticed within seconds, and a job that has ended is told of for a while
SlurmdTimeout=10
KillWait=10
MinJobAge=300
ReturnToService=2
MaxArraySize=1001
GresTypes=gpu
{nodes}
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=UNLIMITED State=UP OverSubscribe=NO LLN=YES
PartitionName=gpu Nodes=n1,n2 MaxTime=UNLIMITED State=UP OverSubscribe=NO LLN=YES
"""


def why_not() -> str | None:
    """The reason why no cluster can be started here, or None if one can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed: make cluster-test installs slurm-wlm and munge where it may"
    if os.geteuid() != 0:
        return "SLURM's daemons need root to start jobs"
    if CONFIGURATION.exists() and _MARK not in CONFIGURATION.read_text(encoding="utf-8"):
        return f"{CONFIGURATION} is of another cluster, which is left alone"
    return None


class TwoNodes:
    """The cluster while it runs."""

    def __init__(self) -> None:
        self._munge: subprocess.Popen | None = None

    def start(self) -> None:
        """Starts all daemons and waits until both nodes are idle.

        Raises:
            TimeoutError: They do not become so.
        """
        self.stop()
        shutil.rmtree(STATE, ignore_errors=True)
        for name in ("controller", *NODES):
            (STATE / name).mkdir(parents=True)
        _write_configuration()
        self._start_munge()
        subprocess.run(["slurmctld"], check=True)
        for node in NODES:
            self.start_node(node)
        wait_for(lambda: set(self.nodes().values()) == {"idle"}, 60, "both nodes to be idle")

    def stop(self) -> None:
        """Ends whatever of it runs; jobs first."""
        if answers():
            subprocess.run(["scancel", "--user", "root"], check=False, capture_output=True)
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: not self.jobs(), 30, "jobs to end")
        for name in (*NODES, "slurmctld", "munged"):
            _end(STATE / f"{name}.pid")
        for path in (CONFIGURATION, GPUS):
            if path.exists() and _MARK in path.read_text(encoding="utf-8"):
                path.unlink()

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd, and has the node taken into service."""
        subprocess.run(["slurmd", "-N", node], check=True)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: self.nodes()[node].rstrip("*") in ("idle", "mixed", "allocated"), 10, f"{node} to be up")
        if self.nodes()[node].rstrip("*") not in ("idle", "mixed", "allocated"):
            run("scontrol", "update", f"nodename={node}", "state=resume")

    def kill_node(self, node: str) -> None:
        """Kills a node's slurmd, as a crash does; what it had started goes on, as behind a broken network."""
        os.kill(int((STATE / f"{node}.pid").read_text()), signal.SIGKILL)

    def nodes(self) -> dict[str, str]:
        """Node -> state, such as idle, mixed or down*."""
        return dict(
            line.split() for line in run("sinfo", "--noheader", "--Node", "-o", "%N %T", "-p", "cpu").splitlines()
        )

    def jobs(self, form: str = "%i %T %N %k") -> list[list[str]]:
        """squeue's lines, split at blanks: by default job, state, nodes and the comment, which names the rule."""
        return [line.split() for line in run("squeue", "--noheader", "-o", form).splitlines()]

    def _start_munge(self) -> None:
        folder = STATE / "munge"
        folder.mkdir()
        for path in (STATE, folder, Path("/run/munge")):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        if (
            Path("/run/munge/munge.socket.2").exists()
            and subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0
        ):
            return  # one runs already
        options = [
            "--force",
            f"--pid-file={STATE}/munged.pid",
            f"--log-file={folder}/log",
            f"--seed-file={folder}/seed",
        ]
        subprocess.run(["munged", f"--key-file={_key(folder)}", *options], check=True)


def _key(folder: Path) -> Path:
    key = folder / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(128))
    return key


def _write_configuration() -> None:
    host = socket.gethostname()
    shape = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs=64 RealMemory=400000 Gres=gpu:4"
    nodes = "\n".join(f"NodeName={node} Port={16818 + index} {shape}" for index, node in enumerate(NODES))
    CONFIGURATION.parent.mkdir(parents=True, exist_ok=True)
    CONFIGURATION.write_text(_CONF.format(mark=_MARK, host=host, state=STATE, nodes=nodes), encoding="utf-8")
    gpus = [f"NodeName={node} Name=gpu File={_DEVICES}" for node in NODES]
    GPUS.write_text("\n".join([_MARK, *gpus, ""]), encoding="utf-8")


def run(*command: str) -> str:
    """What a command prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def answers() -> bool:
    """Whether a controller of ours answers."""
    if why_not() is not None or not CONFIGURATION.exists():
        return False
    return subprocess.run(["squeue"], capture_output=True, check=False, timeout=60).returncode == 0


def wait_for(condition: Callable[[], object], seconds: float, what: str, every: float = 0.2) -> None:
    """Raises TimeoutError when the condition is not met in time."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(every)


def _end(pid_file: Path) -> None:
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), 20, f"process {pid} to end")
    except (FileNotFoundError, ValueError, ProcessLookupError):
        pass
    pid_file.unlink(missing_ok=True)


@contextlib.contextmanager
def two_nodes() -> Iterator[TwoNodes]:
    """The cluster, up within and down afterwards; one that is up already is taken, and left up."""
    cluster = TwoNodes()
    if answers():
        yield cluster
        return
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


if __name__ == "__main__":
    reason = why_not()
    if reason is not None or sys.argv[1:] not in (["up"], ["down"]):
        sys.exit(reason or __doc__)
    TwoNodes().start() if sys.argv[1] == "up" else TwoNodes().stop()
