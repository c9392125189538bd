"""The multi-crop recipe as most training code writes it: torchvision v2 transforms on PIL images, uint8 tensors out.

What the crops of dinoscope are measured against, for speed (augmentation.py) and for their distributions (the tests).
`torchvision_on_cpu_torch` must be imported before this where torch has no CUDA.
"""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dinoscope.data.crops import Augmentation, CropSizes

__all__ = ["TorchvisionCrops"]

_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])


class StainJitter:
    """Gain and shift of haematoxylin, eosin and DAB in optical density, in numpy as torchvision has no such thing."""

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        """The changed image."""
        gain = torch.empty(3).uniform_(1 - self.sigma, 1 + self.sigma).numpy()
        shift = torch.empty(3).uniform_(-self.sigma, self.sigma).numpy()
        density = -np.log10(np.maximum(np.asarray(image, np.float32), 0.5) / 255)
        stains = density.reshape(-1, 3) @ np.linalg.inv(_HED).astype(np.float32)
        mixed = (stains * gain + shift) @ _HED.astype(np.float32)
        rgb = np.clip(np.rint(255 * 10**-mixed), 0, 255).astype(np.uint8)
        return Image.fromarray(rgb.reshape(density.shape))


class TorchvisionCrops:
    """All views of a window, drawn with torch's global random generator.

    Attributes:
        transforms: One for each view: the two global ones, then the local ones.
    """

    def __init__(self, sizes: CropSizes, augmentation: Augmentation) -> None:
        first, second, local = augmentation.blur_p
        self.transforms = [
            view_transform(sizes.global_px, sizes.global_scale, augmentation, first, 0.0),
            view_transform(sizes.global_px, sizes.global_scale, augmentation, second, augmentation.solarize_p),
            *[view_transform(sizes.local_px, sizes.local_scale, augmentation, local, 0.0)] * sizes.num_local,
        ]

    def __call__(self, window: Image.Image) -> list[torch.Tensor]:
        """The crops, (3, size, size) uint8 each."""
        return [transform(window) for transform in self.transforms]


def view_transform(
    size_px: int, scale: tuple[float, float], augmentation: Augmentation, blur_p: float, solarize_p: float
) -> v2.Compose:
    """What makes one view."""
    return v2.Compose([*geometry(size_px, scale, augmentation), *distortion(augmentation, blur_p, solarize_p)])


def geometry(size_px: int, scale: tuple[float, float], augmentation: Augmentation) -> list:
    """Random-resized crop, flips and rotations."""
    steps: list = [
        v2.RandomResizedCrop(size_px, scale, augmentation.aspect_ratio, interpolation=v2.InterpolationMode.BICUBIC)
    ]
    if augmentation.horizontal_flips:
        steps.append(v2.RandomHorizontalFlip())
    if augmentation.vertical_flips:
        steps.append(v2.RandomVerticalFlip())
    if augmentation.rotations_90:
        steps.append(v2.RandomChoice([_Rotate(quarter) for quarter in range(4)]))
    return steps


def distortion(augmentation: Augmentation, blur_p: float, solarize_p: float) -> list:
    """Colour, sharpness, and the tensor at the end."""
    jitter = v2.ColorJitter(augmentation.brightness, augmentation.contrast, augmentation.saturation, augmentation.hue)
    kernel_px, sigma = augmentation.blur_kernel_px, augmentation.blur_sigma
    steps: list = [
        v2.RandomApply([jitter], augmentation.color_jitter_p),
        v2.RandomGrayscale(augmentation.grayscale_p),
        v2.RandomApply([v2.GaussianBlur(kernel_px, sigma)], blur_p),
        v2.RandomSolarize(augmentation.solarize_threshold, solarize_p),
        v2.PILToTensor(),
    ]
    if augmentation.hed_p:
        steps.insert(0, v2.RandomApply([StainJitter(augmentation.hed_sigma)], augmentation.hed_p))
    return steps


class _Rotate:
    """A turn by a multiple of 90 degrees."""

    def __init__(self, quarters: int) -> None:
        self.quarters = quarters

    def __call__(self, image: Image.Image) -> Image.Image:
        return F.rotate(image, 90 * self.quarters) if self.quarters else image
