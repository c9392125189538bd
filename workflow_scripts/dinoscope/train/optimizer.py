"""AdamW with a multiplier a parameter, clipping a submodule, and the EMA teacher."""

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dinoscope.models.lora import is_adapter

if TYPE_CHECKING:
    from dinoscope.config import RunConfig
    from dinoscope.train.schedule import ScheduleValues

__all__ = [
    "Multipliers",
    "apply_schedule",
    "build_optimizer",
    "clip_gradients",
    "copy_state",
    "multipliers",
    "update_ema",
]


class Multipliers(NamedTuple):
    """What the scheduled learning rate and weight decay of a parameter are multiplied by."""

    lr: float
    weight_decay: float
    is_last_layer: bool
    is_head: bool


def multipliers(name: str, config: "RunConfig", depth: int) -> Multipliers:
    """Multipliers of one parameter of the student by its name, e.g. "backbone.blocks.3.attn.qkv.weight".

    Layer-wise decay: decay^(depth + 1 - layer), tokens and patch embedding being layer 0, block i layer i + 1, the rest
    of the backbone and the heads undecayed (BEiT, arXiv:2106.08254). No weight decay for biases, norms and gammas.
    Adapters have neither: they start from nothing in every block alike.
    """
    optim = config.optim
    is_head = not name.startswith("backbone.")
    if is_adapter(name):
        return Multipliers(1.0, 0.0, False, is_head)
    lr = 1.0
    if not is_head:
        lr = optim.layerwise_decay ** (depth + 1 - _layer(name, depth))
    if ".patch_embed." in name:
        lr *= optim.patch_embed_lr_mult
    weight_decay = 1.0
    if name.endswith(("bias", "gamma")) or "norm" in name:
        weight_decay = 0.0
    elif name.startswith("dino_head."):
        weight_decay = optim.dino_head_wd_multiplier
    return Multipliers(lr, weight_decay, "last_layer" in name, is_head)


def _layer(name: str, depth: int) -> int:
    if block := re.search(r"\.blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    if any(part in name for part in ("_token", "patch_embed")):
        return 0
    return depth + 1


def build_optimizer(student: nn.ModuleDict, config: "RunConfig", depth: int) -> torch.optim.AdamW:
    """AdamW over the trained parameters, those with equal multipliers in one group."""
    groups: dict[Multipliers, list[Any]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups[multipliers(name, config, depth)].append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "multipliers": key} for key, parameters in groups.items()],
        lr=0.0,
        betas=(config.optim.adamw_beta1, config.optim.adamw_beta2),
        foreach=True,
    )


def apply_schedule(optimizer: torch.optim.Optimizer, values: "ScheduleValues") -> None:
    """Sets learning rate and weight decay of every group to the scheduled values times its multipliers."""
    for group in optimizer.param_groups:
        factors = group["multipliers"]
        group["lr"] = _scheduled_lr(values, factors) * factors.lr
        group["weight_decay"] = values.weight_decay * factors.weight_decay


def _scheduled_lr(values: "ScheduleValues", factors: Multipliers) -> float:
    if factors.is_last_layer:
        return values.last_layer_lr
    return values.head_lr if factors.is_head and values.head_lr is not None else values.lr


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients of one submodule to a norm of at most `max_norm`; returns the global norm before that.

    It is 0 where nothing has a gradient (a backbone while the heads alone are trained).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device)
    norm = torch.nn.utils.get_total_norm(gradients)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum · teacher + (1 - momentum) · student, for each parameter that the student trains.

    Works on local shards. What is not trained is the same in both, and stays so bit for bit.
    """
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    trained = [(_local(target), _local(source)) for target, source in pairs if source.requires_grad]
    if not trained:
        return
    targets, sources = (list(side) for side in zip(*trained, strict=True))
    torch._foreach_mul_(targets, momentum)
    torch._foreach_add_(targets, sources, alpha=1 - momentum)


@torch.no_grad()
def copy_state(target: nn.Module, source: nn.Module) -> None:
    """Makes all parameters and buffers of `target` equal to those of `source` (local shards alone)."""
    targets, sources = (list(map(_local, module.state_dict().values())) for module in (target, source))
    torch._foreach_copy_(targets, sources)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
