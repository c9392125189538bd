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
    settings: ViTSettings, batch_sizes: list[int], *, seed: int, step: int, rank: int, device: torch.device
) -> list[list[BlockDraws]] | None:
    """Draws for every block and group of crops, [block][group]; None when the settings need none.

    Args:
        settings: RoPE augmentation and stochastic depth are read from here.
        batch_sizes: Number of crops of each group.
        seed, step, rank: What the draws derive from.
        device: Where the tensors are wanted.
    """
    if not _has_rope_change(settings) and not settings.drop_path_rate:
        return None
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> 1))
    return [
        [
            BlockDraws(
                _coords_change(settings, generator, device),
                _kept(batch, settings.drop_path_rate, generator, device),
                _kept(batch, settings.drop_path_rate, generator, device),
            )
            for batch in batch_sizes
        ]
        for _ in range(settings.depth)
    ]


def _has_rope_change(settings: ViTSettings) -> bool:
    return any(value is not None for value in (settings.rope_shift, settings.rope_jitter, settings.rope_rescale))


def _coords_change(settings: ViTSettings, generator: torch.Generator, device: torch.device) -> CoordsChange | None:
    if not _has_rope_change(settings):
        return None
    uniform = 2 * torch.rand(5, generator=generator) - 1  # shift y x, jitter y x, rescale; each in [-1, 1)
    shift = uniform[:2] * (settings.rope_shift or 0.0)
    log_scale = uniform[2:4] * math.log(settings.rope_jitter or 1.0) + uniform[4] * math.log(
        settings.rope_rescale or 1.0
    )
    return CoordsChange(shift.to(device), log_scale.exp().to(device))


def _kept(batch: int, rate: float, generator: torch.Generator, device: torch.device) -> torch.Tensor | None:
    """Which samples keep a residual: max(int(batch · (1 - rate)), 1) of them."""
    if not rate:
        return None
    count = max(int(batch * (1 - rate)), 1)
    return torch.randperm(batch, generator=generator)[:count].to(device)
