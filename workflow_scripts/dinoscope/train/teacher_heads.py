"""Heads for a teacher that comes without, as published backbones do, made from its own features.

A head must say which features are alike, and say it differently for those that are not. Here it centres and whitens
the tokens that the teacher makes of the run's first images, and compares them with random directions that stay fixed:
SwAV (arXiv:2006.09882) trains nearly as well on random prototypes as on learnt ones.

Shape suffixes: N tokens, D width of the teacher, K prototypes.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dinoscope.data.collate import Batch
from dinoscope.models.heads import HeadShape
from dinoscope.train.checkpoint import fill_from_full_state
from dinoscope.train.ssl_step import SSLModel

if TYPE_CHECKING:
    from dinoscope.config import RunConfig
    from dinoscope.train.distributed import World

__all__ = ["Moments", "made_head", "make_heads"]

_SHRINKAGE = 0.01  # of the mean variance, added to all: directions in which hardly anything varies are noise
_TOKENS_PER_VALUE = 8  # CLS tokens for each value of theirs, for a covariance to be made of them


@torch.no_grad()
def make_heads(model: SSLModel, made: Sequence[str], batches: Iterable[Batch], world: "World", seed: int) -> int:
    """Fills heads of the distilled teacher that its file lacks, from its features of some batches.

    All ranks call it together.

    Args:
        model: With the teacher's backbone filled.
        made: Names of those heads.
        batches: Of this rank, on the device; read until there are tokens enough, or to their end.
        world: The ranks.
        seed: Of the prototypes.

    Returns:
        The number of CLS tokens, over all ranks.
    """
    teacher, width = model.distilled_teacher, model.distilled_teacher["backbone"].embed_dim
    moments = {"dino_head": Moments(width), "ibot_head": Moments(width)}
    for batch in batches:
        (output,) = teacher["backbone"].forward_crops([model.normalised(batch.global_crops)])
        moments["dino_head"].add(output.cls_BD)
        moments["ibot_head"].add(output.patches_BPD.flatten(0, 1))
        if moments["dino_head"].count * world.size >= _TOKENS_PER_VALUE * width:
            break
    temperature = _teacher_temperature(model.config)
    for number, name in enumerate(made):
        mean, covariance = moments[name].mean_and_covariance(world)
        state = made_head(mean, covariance, model.distilled.heads[name], temperature, seed + number)
        fill_from_full_state(teacher[name], state if world.is_main else None)
    return moments["dino_head"].count * world.size


class Moments:
    """Mean and covariance of tokens that come batch by batch, in float64."""

    def __init__(self, width: int) -> None:
        """Starts with none, of `width` values each."""
        self.sums = torch.zeros(width + 1, width, dtype=torch.float64)  # a row of sums, then the sums of products
        self.count = 0

    def add(self, tokens_ND: Tensor) -> None:
        """Adds tokens; their products are summed on their device."""
        tokens_ND = tokens_ND.float()
        self.sums += torch.cat([tokens_ND.sum(0)[None], tokens_ND.T @ tokens_ND]).cpu().double()
        self.count += len(tokens_ND)

    def mean_and_covariance(self, world: "World") -> tuple[Tensor, Tensor]:
        """Over the tokens of all processes; all call it together."""
        sums = world.reduce(self.sums, dist.ReduceOp.SUM)
        count = int(world.reduce(torch.tensor(self.count), dist.ReduceOp.SUM))
        mean = sums[0] / count
        return mean, sums[1:] / count - mean[:, None] * mean


def made_head(mean: Tensor, covariance: Tensor, shape: HeadShape, temperature: float, seed: int) -> dict[str, Tensor]:
    """A head of one layer, from the mean (D,) and covariance (D, D) of a backbone's tokens.

    The layer centres and whitens along the directions of most variance, the prototypes are random directions. Their
    length T·√(d ln K), with d directions, gives logits/T of whitened tokens a variance of ln K, so that a target has
    between half (d in the hundreds) and three quarters (d = 8) of the entropy of an even one, whatever K and T.

    Args:
        mean, covariance: Of the tokens.
        shape: Of the head, with one layer.
        temperature: T, of the teacher after its warm-up.
        seed: Of the prototypes.
    """
    assert shape.num_layers == 1, shape
    variances, directions = torch.linalg.eigh(covariance)
    number = min(shape.bottleneck_dim, len(mean))
    variances, directions = variances[-number:].clamp(min=0), directions[:, -number:]
    scale = (variances + _SHRINKAGE * covariance.diagonal().mean()).rsqrt()
    weight = torch.zeros(shape.bottleneck_dim, len(mean), dtype=torch.float64)
    weight[:number] = scale[:, None] * directions.T
    drawn = torch.randn(shape.num_prototypes, number, generator=torch.Generator().manual_seed(seed))
    prototypes = torch.zeros(shape.num_prototypes, shape.bottleneck_dim)
    length = temperature * math.sqrt(number * math.log(shape.num_prototypes))
    prototypes[:, :number] = length * functional.normalize(drawn, dim=1)
    return {
        "mlp.0.weight": weight.float(),
        "mlp.0.bias": -(weight @ mean).float(),
        "last_layer.weight": prototypes,
    }


def _teacher_temperature(config: "RunConfig") -> float:
    """After its warm-up."""
    return config.teacher.teacher_temp if config.schedules is None else config.schedules.teacher_temp.peak
