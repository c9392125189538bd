"""The process group of a training run, on whatever device the machine has."""

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dinoscope.cli import record_error
from dinoscope.errors import ConfigError, DinoscopeError
from dinoscope.processes import die_with_parent
from dinoscope.train.slurm import Step

__all__ = ["NODES_VARIABLE", "World", "joined_world"]

NODES_VARIABLE = "DINOSCOPE_NODES"  # how many nodes launch.py was asked for
_LONGER_MINUTES = 5


@dataclass(frozen=True)
class World:
    """This process among all of a run. Collectives on CPU tensors go through gloo, on GPU tensors through NCCL.

    Attributes:
        rank: Number of this process.
        local_rank: Its number on its node.
        size: Number of all processes.
        device: What it computes on.
        local_size: Number of processes on its node.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks to the user."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all ranks get the same answer."""
        return bool(self.reduce(torch.tensor(int(flag)), dist.ReduceOp.MAX).item())

    def mean(self, values: Tensor) -> Tensor:
        """The mean over ranks of a CPU tensor."""
        return self.reduce(values, dist.ReduceOp.SUM) / self.size

    @staticmethod
    def reduce(values: Tensor, operation: "dist.ReduceOp.RedOpType") -> Tensor:
        """A reduced copy of `values`."""
        values = values.clone()
        dist.all_reduce(values, operation)
        return values


@contextlib.contextmanager
def joined_world(hang_minutes: float = 30.0) -> Iterator[World]:
    """Joins the process group that torchrun describes, or makes one of this process alone.

    Under torchrun this process ends with its agent.

    Args:
        hang_minutes: How long the other processes are waited for, with some minutes more for the watchdog's sentence.

    Raises:
        ConfigError: The world is not what was asked for: nodes of different numbers of processes, or a copy of many.
    """
    launched = "RANK" in os.environ
    if launched:
        die_with_parent()
        _require_the_world_that_was_asked_for()
    else:
        Step.of().require_alone()
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=_free_port())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if torch.accelerator.is_available():
        device = torch.device(torch.accelerator.current_accelerator().type, local_rank)
        torch.accelerator.set_device_index(local_rank)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=hang_minutes + _LONGER_MINUTES))
    rank = dist.get_rank()
    try:
        yield World(rank, local_rank, dist.get_world_size(), device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    except Exception as error:
        # before the group is destroyed: the others then fail too, for want of this process
        if isinstance(error, DinoscopeError):
            record_error(str(error), error.exit_status)
        else:
            record_error(f"process {rank} ended with {type(error).__name__}: {error}")
        raise
    finally:
        dist.destroy_process_group()


def _require_the_world_that_was_asked_for() -> None:
    """All nodes must run as many processes, or a batch and a rank's share of it would mean different things on each."""
    nodes, size, here = (int(os.environ.get(name, "1")) for name in (NODES_VARIABLE, "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if NODES_VARIABLE in os.environ and size != nodes * here:
        message = (
            f"there are {here} training processes on this node, but {size} on all {nodes} nodes together: each needs "
            "as many; set launch.processes to a number, or give the job nodes with as many GPUs each"
        )
        record_error(message, ConfigError.exit_status)
        raise ConfigError(message)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
