"""Two-dimensional rotary position embedding (RoPE, arXiv:2104.09864, in the axial form of DINOv3, arXiv:2508.10104).

Shape suffixes: B images, N tokens, P patches, h heads, d width of a head.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["CoordsChange", "RotaryEmbedding2d", "Rotation", "rotate"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CoordsChange:
    """A training-time change of the patch coordinates: (coords + shift) · scale, each (2,) for y and x."""

    shift: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Rotation:
    """Sine and cosine of the angles of every patch, (P, d).

    Deliberately not a tuple: FSDP casts tensors that it finds in arguments to bf16, and angles must keep their dtype.
    """

    sin_Pd: Tensor
    cos_Pd: Tensor


class RotaryEmbedding2d(nn.Module):
    """Angles of the patches of an image; `periods` (d/4) is the persistent buffer that checkpoints hold."""

    def __init__(
        self,
        head_dim: int,
        *,
        base: float | None = 100.0,
        min_period: float | None = None,
        max_period: float | None = None,
        normalize_coords: str = "separate",
        dtype: str = "fp32",
    ) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"RoPE in two dimensions needs a head width that is a multiple of 4, not {head_dim}")
        self.head_dim, self.base, self.min_period, self.max_period = head_dim, base, min_period, max_period
        self.normalize_coords, self.dtype = normalize_coords, _DTYPES[dtype]
        self.register_buffer("periods", torch.empty(head_dim // 4, dtype=self.dtype))

    def reset_parameters(self) -> None:
        """Fills `periods` from the base, or geometrically between the smallest and the largest period."""
        count = self.head_dim // 4
        steps = torch.arange(count, device=self.periods.device, dtype=self.dtype)
        if self.base is not None:
            periods = self.base ** (2 * steps / (self.head_dim // 2))
        else:
            fraction = torch.linspace(0, 1, count, device=self.periods.device, dtype=self.dtype)
            periods = self.min_period * (self.max_period / self.min_period) ** fraction
        self.periods.copy_(periods)

    def forward(self, height: int, width: int, change: CoordsChange | None = None) -> Rotation:
        """Sine and cosine for a grid of height × width patches, row by row."""
        periods = self.periods.to(self.dtype)
        coords_P2 = self._coords(height, width, periods.device)
        if change is not None:
            coords_P2 = (coords_P2 + change.shift.to(coords_P2)) * change.scale.to(coords_P2)
        angles = 2 * math.pi * coords_P2[:, :, None] / periods  # (P, 2, d/4)
        angles_Pd = angles.flatten(1).tile(2)  # y angles, x angles, and both once more
        return Rotation(angles_Pd.sin(), angles_Pd.cos())

    def _coords(self, height: int, width: int, device: torch.device) -> Tensor:
        longer, shorter = max(height, width), min(height, width)
        sizes = {"separate": (height, width), "max": (longer, longer), "min": (shorter, shorter)}
        rows = (torch.arange(height, device=device, dtype=self.dtype) + 0.5) / sizes[self.normalize_coords][0]
        columns = (torch.arange(width, device=device, dtype=self.dtype) + 0.5) / sizes[self.normalize_coords][1]
        return 2 * torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1).flatten(0, 1) - 1


def rotate(tokens_BhNd: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the patch tokens, which are the last P of the N tokens; CLS and storage tokens before them stay."""
    num_prefix = tokens_BhNd.shape[-2] - rotation.sin_Pd.shape[0]
    patches = tokens_BhNd[..., num_prefix:, :].to(rotation.sin_Pd.dtype)
    first, second = patches.chunk(2, -1)
    turned = patches * rotation.cos_Pd + torch.cat((-second, first), -1) * rotation.sin_Pd
    return torch.cat((tokens_BhNd[..., :num_prefix, :], turned.to(tokens_BhNd.dtype)), -2)
