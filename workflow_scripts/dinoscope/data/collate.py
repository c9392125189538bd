"""Crops of several tiles to the tensors of one training step, and the masks for them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.utils.data
from torch import Tensor

from dinoscope.data.crops import Crops
from dinoscope.data.masking import sample_masks
from dinoscope.errors import DinoscopeError

__all__ = ["Batch", "Collate"]

_MASK_STREAM = 1 << 63  # keeps the draws of masks apart from those of samples, which are keyed by their number


@dataclass
class Batch:
    """What one rank trains on in one step; B tiles, P patches a global crop, M masked patches.

    Crops are crop-major: crop 0 of all tiles, then crop 1 of all tiles, …
    """

    samples: list[int]
    global_crops: Tensor  # (2B, S, S, 3) uint8
    local_crops: Tensor  # (N·B, s, s, 3) uint8
    gram_crops: Tensor | None  # (2B, G, G, 3) uint8
    masks: Tensor  # (2B, P) bool
    mask_indices: Tensor  # (M,) int64, into the flattened masks
    mask_weights: Tensor  # (M,) float32, 1 / (masked patches of the crop)

    def to(self, device: torch.device) -> "Batch":
        """A copy on another device."""
        moved = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return Batch(**moved)

    def split(self, parts: int) -> list["Batch"]:
        """As many batches of consecutive tiles, with the masks that their crops have here."""
        if parts == 1:
            return [self]
        tiles = len(self.samples) // parts
        assert tiles * parts == len(self.samples), f"{len(self.samples)} tiles do not make {parts} equal batches"
        masks = _tiles_of(self.masks, len(self.samples), tiles)
        return [
            Batch(
                samples=self.samples[part * tiles : (part + 1) * tiles],
                global_crops=global_crops,
                local_crops=local_crops,
                gram_crops=gram_crops,
                **mask_tensors(masks[part]),
            )
            for part, (global_crops, local_crops, gram_crops) in enumerate(
                zip(
                    _tiles_of(self.global_crops, len(self.samples), tiles),
                    _tiles_of(self.local_crops, len(self.samples), tiles),
                    [None] * parts if self.gram_crops is None else _tiles_of(self.gram_crops, len(self.samples), tiles),
                    strict=True,
                )
            )
        ]


def _tiles_of(crops: Tensor, num_tiles: int, at_once: int) -> list[Tensor]:
    """Crop-major crops of all tiles -> crop-major crops of so many tiles each."""
    return [part.flatten(0, 1) for part in crops.unflatten(0, (-1, num_tiles)).split(at_once, dim=1)]


class Collate:
    """Turns the samples of one rank and step into a Batch; masks derive from (seed, first sample number)."""

    def __init__(
        self,
        batch_size: int,
        patch_px: int,
        mask_probability: float,
        mask_ratios: tuple[float, float],
        mask_shift: bool,
        seed: int,
    ) -> None:
        self.batch_size, self.patch_px, self.seed = batch_size, patch_px, seed
        self.mask_probability, self.mask_ratios, self.mask_shift = mask_probability, mask_ratios, mask_shift

    def __call__(self, samples: list[tuple[int, Crops] | DinoscopeError]) -> Batch | DinoscopeError:
        """Samples as the data set gives them -> one batch, or the first error among them."""
        failed = next((sample for sample in samples if isinstance(sample, DinoscopeError)), None)
        if failed is not None:
            return failed
        numbers = [number for number, _ in samples]
        crops = [crop for _, crop in samples]
        has_gram = crops[0].gram_crops is not None
        return Batch(
            samples=numbers,
            global_crops=_crop_major([crop.global_crops for crop in crops]),
            local_crops=_crop_major([crop.local_crops for crop in crops]),
            gram_crops=_crop_major([crop.gram_crops for crop in crops]) if has_gram else None,
            **mask_tensors(self._masks(numbers[0], 2 * len(crops), crops[0].global_crops.shape[1] // self.patch_px)),
        )

    def _masks(self, first: int, num_crops: int, grid_side: int) -> Tensor:
        key = np.array([self.seed, _MASK_STREAM | first], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        masks = sample_masks(
            num_crops,
            (grid_side, grid_side),
            self.mask_probability,
            self.mask_ratios,
            rng,
            random_circular_shift=self.mask_shift,
        )
        return torch.from_numpy(masks)


def mask_tensors(masks_BP: Tensor) -> dict[str, Tensor]:
    """Masks, the indices of masked patches, and their weights in the iBOT loss."""
    counts_B1 = masks_BP.sum(-1, keepdim=True).clamp(min=1)
    weights_BP = (1.0 / counts_B1).expand_as(masks_BP)
    indices = masks_BP.flatten().nonzero().flatten()
    return {"masks": masks_BP, "mask_indices": indices, "mask_weights": weights_BP.flatten()[indices]}


def _crop_major(crops: list[np.ndarray]) -> Tensor:
    num_crops, *shape = crops[0].shape
    stacked = _empty((num_crops, len(crops), *shape))
    np.stack(crops, axis=1, out=stacked.numpy())
    return stacked.flatten(0, 1)


def _empty(shape: tuple[int, ...]) -> Tensor:
    """Bytes to be filled; in a loader process in the memory that the trainer shares, which spares a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    shared = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
    return torch.empty(0, dtype=torch.uint8).set_(shared, 0, shape)
