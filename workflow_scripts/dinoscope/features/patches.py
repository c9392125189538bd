"""Features of single images, for a notebook: no file, no loader, no slide."""

from dataclasses import dataclass

import numpy as np
import torch

from dinoscope.errors import FeaturesError
from dinoscope.models.vit import DinoVisionTransformer

__all__ = ["PatchFeatures", "patch_features"]


@dataclass(frozen=True)
class PatchFeatures:
    """What a backbone makes of one image, on the CPU.

    Attributes:
        image: (H, W, 3) uint8, the part of the image that was looked at.
        cls: (D,) float32, of the image as a whole.
        storage: (R, D) float32.
        patches: (h, w, D) float32; row h runs down, column w to the right.
        patch_px: Side of a patch.
    """

    image: np.ndarray
    cls: np.ndarray
    storage: np.ndarray
    patches: np.ndarray
    patch_px: int


def patch_features(model: DinoVisionTransformer, image: np.ndarray) -> PatchFeatures:
    """Features of an image at the size it has; what exceeds a whole number of patches is left out right and below.

    Args:
        model: A backbone in evaluation mode (see `dinoscope.load_backbone`), on whatever device.
        image: (H, W, 3) uint8, RGB, at the micrometres a pixel that the model was trained on.

    Raises:
        FeaturesError: No such image, or one that is smaller than a patch.
    """
    patch = model.patch_size
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise FeaturesError(
            f"an image of shape {image.shape} and type {image.dtype} is given, wanted is (height, width, 3) uint8 in "
            'RGB; a picture is read so by numpy.asarray(PIL.Image.open(path).convert("RGB"))'
        )
    rows, columns = image.shape[0] // patch, image.shape[1] // patch
    if not rows or not columns:
        raise FeaturesError(
            f"the image is {image.shape[1]} × {image.shape[0]} px, smaller than one patch of {patch} px: take a larger "
            "one"
        )
    image = image[: rows * patch, : columns * patch]
    device = next(model.parameters()).device
    with torch.inference_mode():
        pixels = torch.tensor(image, device=device).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (model.mean, model.std))
        out = model.forward_features(((pixels - mean) / std)[None])
        cls, storage, patches = (out[name][0].float().cpu().numpy() for name in ("cls", "storage", "patches"))
    return PatchFeatures(image, cls, storage, patches.reshape(rows, columns, -1), patch)
