"""How the networks are laid over devices (FSDP2).

Order of wrapping: activation checkpointing of a block, then its compilation, then sharding of block by block and last
of the whole submodule. Parameters stay float32 in the shards; forward and backward run in
`compute_precision.param_dtype` on GPUs, gradients are averaged over ranks in `reduce_dtype`. Teachers are sharded like
the student. HYBRID_SHARD shards within each node and keeps a copy a node, so that only gradients travel between nodes.
A single process that computes in float32 has nothing to shard and nothing to cast: it is spared the copies.
"""

import contextlib
import logging
import shutil
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from dinoscope.train.ssl_step import SSLModel, compute_dtype

if TYPE_CHECKING:
    from dinoscope.config import RunConfig
    from dinoscope.train.distributed import World

__all__ = ["checkpoint_activations", "is_sharded", "parallelize"]

_log = logging.getLogger(__name__)
_ATEN = torch.ops.aten
_PRODUCTS = (
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
)


def parallelize(model: SSLModel, world: "World") -> None:
    """Checkpoints, compiles and shards student, teacher and gram teacher in place.

    The model must be on the meta device; its weights are allocated and filled with NaN, for others to fill.
    """
    # outputs are views of the tokens; FSDP warns of in-place operations on them, of which there are none
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = _mesh(model.config, world) if is_sharded(model.config, world.size, world.device.type) else None
    checkpoint_activations(model.student["backbone"].blocks, model.config)
    for network in (model.student, *model.frozen_networks()):
        for block in network["backbone"].blocks:
            if _compiles(model.config, world.device.type):
                block.compile()
        trained = network is model.student
        for part in network.values() if mesh is not None else ():
            _shard(part, mesh, model.config, trained)
    model.to_empty(device=world.device)
    for tensor in model.state_dict().values():
        tensor.fill_(float("nan"))


def is_sharded(config: "RunConfig", world_size: int, device_type: str) -> bool:
    """Whether FSDP is in between."""
    return world_size > 1 or compute_dtype(config, device_type) != torch.float32


def _mesh(config: "RunConfig", world: "World") -> DeviceMesh:
    if config.compute_precision.sharding_strategy != "HYBRID_SHARD":
        return init_device_mesh(world.device.type, (world.size,))
    assert world.size % world.local_size == 0, f"{world.size} processes on nodes of {world.local_size}"
    shape = (world.size // world.local_size, world.local_size)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def checkpoint_activations(blocks: nn.ModuleList, config: "RunConfig") -> None:
    """Recomputes, in the backward, whole blocks (checkpointing_full) or all but their matrix products."""
    if not (config.train.checkpointing or config.train.checkpointing_full):
        return
    options = {} if config.train.checkpointing_full else {"context_fn": _keeping_products}
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block, preserve_rng_state=False, **options)


def _keeping_products() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return create_selective_checkpoint_contexts(list(_PRODUCTS))


def _compiles(config: "RunConfig", device_type: str) -> bool:
    """Whether blocks are compiled: on GPUs as configured; on CPUs it would need a C++ compiler at the user's."""
    if not config.train.compile or device_type == "cpu":
        return False
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if headers.is_file() and (shutil.which("cc") or shutil.which("gcc")):
        return True
    _log.warning(
        "train.compile needs a C compiler and Python's headers (gcc, python3-dev): training goes on without it"
    )
    return False


def _shard(part: nn.Module, mesh: DeviceMesh, config: "RunConfig", trained: bool) -> None:
    precision = config.compute_precision
    # activations are cast once, where images are normalised; casting at every block would also cast the RoPE angles
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(config, mesh.device_type),
        reduce_dtype=torch.bfloat16 if precision.reduce_dtype == "bf16" else torch.float32,
        cast_forward_inputs=False,
    )
    # without a backward nothing would give gathered weights of a teacher back
    keep_gathered = trained and precision.sharding_strategy == "SHARD_GRAD_OP"
    for block in getattr(part, "blocks", []):
        # a block of which nothing is trained need not wait for a backward
        has_backward = any(parameter.requires_grad for parameter in block.parameters())
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=not (keep_gathered and has_backward))
    fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)
    if hasattr(part, "forward_crops"):
        register_fsdp_forward_method(part, "forward_crops")
