"""What a run will take, from its recipe alone: parameters, memory, disk space, passes over the data.

Everything is computed on the meta device; nothing is read, written or sent. How it is told to the user: outlook.py.
"""

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dinoscope.models.registry import ViTSettings
from dinoscope.resolutions import resolutions
from dinoscope.train.checkpoint import frozen_names, frozen_state
from dinoscope.train.distillation import TeacherShape
from dinoscope.train.flops import num_masked_patches, step_flops
from dinoscope.train.optimizer import multipliers
from dinoscope.train.parallelize import is_sharded
from dinoscope.train.schedule import build_schedules
from dinoscope.train.ssl_step import SSLModel, compute_dtype
from dinoscope.train.step import global_batch
from dinoscope.train.traced_memory import step_memory

if TYPE_CHECKING:
    from dinoscope.config import RunConfig

__all__ = ["Disk", "Forecast", "Memory", "Parameters", "count_parameters", "disk_use", "forecast", "memory_per_device"]

# What DCP adds (torch 2.13): every piece of a tensor is a file of torch.save, and has entries in .metadata.
_BYTES_PER_PIECE = 1576 + 200
_BYTES_PER_TENSOR = 110
_BYTES_PER_EXPORTED_TENSOR = 250
_TENSORS_OF_ADAM = 2
_MASTER_BYTES = 4
_LIBRARIES_BYTES = 400 * 2**20  # of a training process on the CPU before it has a model, measured


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of the student.

    Attributes:
        trained: Of the backbone, those that are trained.
        backbone: Of the backbone, all.
        heads: Of both heads together; they are trained always.
    """

    trained: int
    backbone: int
    heads: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the device that has most to hold.

    Attributes:
        weights: Master weights of student, teacher and gram teacher.
        gradients: Of what is trained.
        optimizer: Both moments of AdamW.
        gathered: Weights that sharding brings together for forward and backward, and what is sent between devices.
        activations: The most that the tensors of a step take besides.
        update: Intermediate results of the optimizer, when activations and gathered weights are gone.
        process: Of the program itself, where the device is a CPU.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    update: int
    process: int

    @property
    def peak(self) -> int:
        """The most at any time."""
        lasting = self.weights + self.gradients + self.optimizer + self.process
        return lasting + max(self.gathered + self.activations, self.update)


@dataclass(frozen=True)
class Disk:
    """Bytes in the folder of a run.

    Attributes:
        checkpoint: Of one checkpoint.
        num_checkpoints: The most there are at a time, one that is being written included.
        export: Of one exported teacher.
        num_exports: The most there are at a time.
        frozen: Of what is not trained, which is written once.
    """

    checkpoint: int
    num_checkpoints: int
    export: int
    num_exports: int
    frozen: int

    @property
    def total(self) -> int:
        """The most at any time."""
        return self.checkpoint * self.num_checkpoints + self.export * self.num_exports + self.frozen


@dataclass(frozen=True)
class Forecast:
    """What is known of a run before its first step.

    Attributes:
        parameters: Of the student.
        memory: Of one device.
        disk: Of the run's folder.
        iterations: Length of the run.
        num_images: Of the data.
        global_batch: Tiles of a step over all processes.
        peak_lr: The highest learning rate, scaled to the batch.
        flops_per_tile: Of forward, backward and teachers.
        world_size: Number of processes.
        local_size: Number of processes on a machine.
        device_type: What they compute on.
        num_workers: Loader processes of each.
    """

    parameters: Parameters
    memory: Memory
    disk: Disk
    iterations: int
    num_images: int
    global_batch: int
    peak_lr: float
    flops_per_tile: float
    world_size: int
    local_size: int
    device_type: str
    num_workers: int

    @property
    def passes(self) -> float:
        """How often the run sees each image, on average."""
        return self.iterations * self.global_batch / self.num_images


def forecast(
    config: "RunConfig",
    settings: ViTSettings,
    world_size: int,
    num_images: int,
    device_type: str,
    local_size: int | None = None,
    distilled: TeacherShape | None = None,
) -> Forecast:
    """All of it.

    Args:
        config: The recipe.
        settings: Of its backbone.
        world_size: Number of processes.
        num_images: Of the data.
        device_type: "cpu", "cuda", ….
        local_size: Number of processes on a machine; all of them when None.
        distilled: Of the teacher that is distilled, where there is one.
    """
    local_size = local_size or world_size
    train = config.train
    tiles, batch = train.batch_size_per_gpu * train.accumulation_steps, global_batch(config, world_size)
    schedules = build_schedules(config, batch)
    with torch.device("meta"):
        model = SSLModel(config, settings, distilled)
    return Forecast(
        parameters=count_parameters(model),
        memory=memory_per_device(model, world_size, device_type, local_size, distilled),
        disk=disk_use(model, len(schedules), world_size, local_size),
        iterations=len(schedules),
        num_images=num_images,
        global_batch=batch,
        peak_lr=float(schedules.lr.max()),
        flops_per_tile=sum(
            sizes.share
            * step_flops(config, settings, tiles, num_masked_patches(config, tiles, sizes), sizes, distilled)
            / tiles
            for sizes in resolutions(config)
        ),
        world_size=world_size,
        local_size=local_size,
        device_type=device_type,
        num_workers=train.num_workers,
    )


def count_parameters(model: SSLModel) -> Parameters:
    """Exact numbers, of a model on any device."""
    counts = {name: [(p.numel(), p.requires_grad) for p in part.parameters()] for name, part in model.student.items()}
    backbone = counts.pop("backbone")
    return Parameters(
        sum(number for number, trained in backbone if trained),
        sum(number for number, _ in backbone),
        sum(number for part in counts.values() for number, _ in part),
    )


def memory_per_device(
    model: SSLModel, world_size: int, device_type: str, local_size: int, distilled: TeacherShape | None = None
) -> Memory:
    """Bytes on the first device, which has the largest shards. Activations are traced (traced_memory.py)."""
    config, shards = model.config, _num_shards(model.config, world_size, local_size)
    networks = [model.student, *model.frozen_networks()]
    shard = functools.partial(_shard_bytes, num_shards=shards)
    trained = [p for p in model.student.parameters() if p.requires_grad]
    by_group: dict[object, list[Tensor]] = {}
    for name, parameter in model.student.named_parameters():
        if parameter.requires_grad:
            by_group.setdefault(multipliers(name, config, model.settings.depth), []).append(parameter)
    return Memory(
        weights=sum(map(shard, networks)) + sum(_bytes(network.buffers()) for network in networks),
        gradients=shard(trained),
        optimizer=_TENSORS_OF_ADAM * shard(trained),
        gathered=_gathered_bytes(model, device_type) if is_sharded(config, world_size, device_type) else 0,
        activations=step_memory(config, model.settings, device_type, distilled).peak,
        update=max(map(shard, by_group.values())),
        process=_LIBRARIES_BYTES if device_type == "cpu" else 0,
    )


def disk_use(model: SSLModel, iterations: int, world_size: int, local_size: int) -> Disk:
    """Exact sizes of tensors, and nearly exact ones of what DCP and torch.save add."""
    config, shards = model.config, _num_shards(model.config, world_size, local_size)
    left_out = {f"{network}.backbone.{name}" for network in ("student", "teacher") for name in frozen_names(model)}
    sharded = {name for name, _ in model.named_parameters()}
    frozen = frozen_state(model).get("model", {})
    stored = {k: v for k, v in model.state_dict().items() if k not in left_out and k not in frozen}
    checkpoint = sum(_stored_bytes(tensor, shards if name in sharded else 1) for name, tensor in stored.items())
    for parameter in model.student.parameters():
        if parameter.requires_grad:
            checkpoint += _TENSORS_OF_ADAM * _stored_bytes(parameter, shards) + _stored_bytes(torch.empty(()), 1)
    exported = {name: tensor for name, tensor in model.teacher.state_dict().items() if ".lora." not in name}
    return Disk(
        checkpoint=checkpoint,
        num_checkpoints=_num_checkpoints(config, iterations),
        export=_bytes(exported.values()) + _BYTES_PER_EXPORTED_TENSOR * len(exported),
        num_exports=_num_exports(config, iterations),
        frozen=sum(_stored_bytes(tensor, shards) for tensor in frozen.values()),
    )


def _num_shards(config: "RunConfig", world_size: int, local_size: int) -> int:
    return local_size if config.compute_precision.sharding_strategy == "HYBRID_SHARD" else world_size


def _shard_bytes(tensors: nn.Module | Iterable[Tensor], num_shards: int) -> int:
    """Of the first process, with float32 weights: each tensor is divided along its first dimension."""
    parameters = tensors.parameters() if isinstance(tensors, nn.Module) else tensors
    return sum(_MASTER_BYTES * math.ceil(p.shape[0] / num_shards) * (p.numel() // p.shape[0]) for p in parameters)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stored_bytes(tensor: Tensor, num_shards: int) -> int:
    """In a checkpoint: a tensor in as many pieces as processes have a part of it."""
    rows = tensor.shape[0] if tensor.dim() else 1
    pieces = math.ceil(rows / math.ceil(rows / num_shards))
    return _bytes([tensor]) + _BYTES_PER_PIECE * pieces + _BYTES_PER_TENSOR


def _gathered_bytes(model: SSLModel, device_type: str) -> int:
    """Weights kept whole between forward and backward, one group on its way and one gradient to be sent."""
    config = model.config
    element = compute_dtype(config, device_type).itemsize
    units = [unit for part in model.student.values() for unit in _sharding_units(part)]
    others = [
        unit for network in model.frozen_networks() for part in network.values() for unit in _sharding_units(part)
    ]
    keeps = config.compute_precision.sharding_strategy == "SHARD_GRAD_OP"
    kept = sum(_numel(unit) for unit in units if keeps and any(p.requires_grad for p in unit))
    largest = max(map(_numel, [*units, *others]))
    trained = max(_numel([p for p in unit if p.requires_grad]) for unit in units)
    # gathered into one buffer and copied out of it; sent from one buffer: a single process does so too
    return element * (kept + 2 * largest + trained) + _MASTER_BYTES * trained


def _sharding_units(part: nn.Module) -> list[list[Tensor]]:
    """Parameters that are gathered together: those of each block, and all others of a submodule."""
    blocks = [list(block.parameters()) for block in getattr(part, "blocks", [])]
    in_blocks = {id(p) for block in blocks for p in block}
    return [*blocks, [p for p in part.parameters() if id(p) not in in_blocks]]


def _numel(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _num_checkpoints(config: "RunConfig", iterations: int) -> int:
    """The newest ones and one in the making, or all; and those that stay for good."""
    settings = config.checkpointing
    for_good = iterations // settings.keep_every
    written = math.ceil(iterations / settings.period)
    if settings.max_to_keep is None:
        return max(written, for_good)
    in_turn = settings.max_to_keep + 1
    return for_good + (in_turn if settings.every_minutes is not None else min(in_turn, written))


def _num_exports(config: "RunConfig", iterations: int) -> int:
    """The first, the best, the newest ones and one before it is pruned, or all."""
    period, most = config.evaluation.eval_period_iterations, config.evaluation.max_to_keep
    written = math.ceil(iterations / period) if period else 1
    best = config.evaluation.best_by is not None
    return written if most is None else min(written, max(1, most) + 2 + best)
