"""The random numbers that the student's forward pass needs, drawn outside the model from (seed, step, rank).

Passing them in keeps a step the same under activation checkpointing, compilation and restarts.
"""

import math

import numpy as np
import torch

from dinoscope.models.layers import BlockDraws
from dinoscope.models.registry import ViTSettings
from dinoscope.models.rope import CoordsChange

__all__ = ["step_draws"]


def step_draws(
    settings: ViTSettings,
    batch_sizes: list[int],
    *,
    seed: int,
    step: int,
    rank: int,
    device: torch.device,
    part: int = 0,
) -> list[list[BlockDraws]] | None:
    """Draws for every block and group of crops, [block][group]; None when the settings need none.

    Args:
        settings: RoPE augmentation and stochastic depth are read from here.
        batch_sizes: Number of crops of each group.
        seed, step, rank: What the draws derive from.
        device: Where the tensors are wanted; everything is copied there at once.
        part: Which of the parts that a step forwards one after the other.
    """
    if not _has_rope_change(settings) and not settings.drop_path_rate:
        return None
    # coordinates change alike for all parts, as they would for the undivided batch
    of_batch, of_part = _generator([seed, step, rank]), _generator([seed, step, rank, 1 + part])
    groups = [
        (
            _coords_change(settings, of_batch),
            _kept(batch, settings.drop_path_rate, of_part),
            _kept(batch, settings.drop_path_rate, of_part),
        )
        for _ in range(settings.depth)
        for batch in batch_sizes
    ]
    changes, attn, ffn = (_moved(list(column), device) for column in zip(*groups, strict=True))
    draws = [
        BlockDraws(None if change is None else CoordsChange(change[:2], change[2:]), kept_attn, kept_ffn)
        for change, kept_attn, kept_ffn in zip(changes, attn, ffn, strict=True)
    ]
    return [draws[first : first + len(batch_sizes)] for first in range(0, len(draws), len(batch_sizes))]


def _generator(key: list[int]) -> torch.Generator:
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


def _moved(tensors: list[torch.Tensor | None], device: torch.device) -> list[torch.Tensor | None]:
    """Vectors copied to a device as one."""
    if tensors[0] is None:
        return tensors
    return list(torch.cat(tensors).to(device, non_blocking=True).split([len(tensor) for tensor in tensors]))


def _has_rope_change(settings: ViTSettings) -> bool:
    return any(value is not None for value in (settings.rope_shift, settings.rope_jitter, settings.rope_rescale))


def _coords_change(settings: ViTSettings, generator: torch.Generator) -> torch.Tensor | None:
    """Shift (y, x) and scale (y, x) of the patch coordinates."""
    if not _has_rope_change(settings):
        return None
    uniform = 2 * torch.rand(5, generator=generator) - 1  # shift y x, jitter y x, rescale; each in [-1, 1)
    shift = uniform[:2] * (settings.rope_shift or 0.0)
    log_scale = uniform[2:4] * math.log(settings.rope_jitter or 1.0) + uniform[4] * math.log(
        settings.rope_rescale or 1.0
    )
    return torch.cat([shift, log_scale.exp()])


def _kept(batch: int, rate: float, generator: torch.Generator) -> torch.Tensor | None:
    """Which samples keep a residual: max(int(batch · (1 - rate)), 1) of them."""
    if not rate:
        return None
    count = max(int(batch * (1 - rate)), 1)
    return torch.randperm(batch, generator=generator)[:count]
