"""What models see inside an image: the features of its patches as colours, and how alike patches are.

Any encoder will do that gives features of patches: `PatchEncoder` is all that is asked of it.

Shapes: H × W pixels, h × w patches, D feature dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from dinoscope.errors import FeaturesError
from dinoscope.visualize.color_basis import ColorBasis, fit_colors

__all__ = [
    "PatchEncoder",
    "TorchPatchEncoder",
    "agreeing_with",
    "cosine_similarity",
    "dense_features",
    "fit_patch_colors",
    "load_patch_encoder",
]

MAX_PATCHES = 100_000  # that a basis is fitted on
PATCHES_HINT = (
    "take a larger region or image (--size-px) that shows more than one thing and has at least 4 patches, or "
    "check the weights of this model"
)


class PatchEncoder(Protocol):
    """What gives the features of the patches of images."""

    name: str
    patch_px: int
    window_px: int | None  # side of the one size of images that it takes, a multiple of the patch; None, any size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features (B, h, w, D) float32 of images (B, H, W, 3) uint8; H and W are multiples of `patch_px`."""
        ...


@dataclass
class TorchPatchEncoder:
    """A torch module as a `PatchEncoder`.

    Attributes:
        name: For titles.
        model: In evaluation mode, on its device, with `forward_features`, `patch_size`, `mean` and `std` as our
            backbones have them.
        window_px: Side of the images that it takes, where it takes one size only.
    """

    name: str
    model: Any
    window_px: int | None = None

    @property
    def gives_patches(self) -> bool:
        """Whether there is anything to see inside an image."""
        return bool(self.model.patch_size)

    @property
    def patch_px(self) -> int:
        """Side of a patch; raises FeaturesError where the model has none."""
        if not self.gives_patches:
            raise FeaturesError(f"model {self.name!r} gives no features of patches, so there is nothing to show inside")
        return self.model.patch_size

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `PatchEncoder`."""
        import torch

        device = next(self.model.parameters()).device
        mean, std = (torch.tensor(each, device=device).view(1, 3, 1, 1) for each in (self.model.mean, self.model.std))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")
        with torch.inference_mode(), autocast:
            pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255
            patches = self.model.forward_features((pixels - mean) / std)["patches"].float()
        return patches.unflatten(1, (images.shape[1] // self.patch_px, -1)).cpu().numpy()


def load_patch_encoder(
    name: str, source: str | Path, device: str = "auto", architecture: str | None = None
) -> TorchPatchEncoder:
    """Loads an encoder of any kind that features can be taken with (features/encoders.py).

    Args:
        name: For titles.
        source: The weights, or module:function.
        device: "auto", "cpu", "cuda:1" …
        architecture: timm's name of the model, for a timm checkpoint that does not tell it.

    Raises:
        WeightsError: It cannot be loaded.
    """
    from dinoscope.features.encoders import load_encoder
    from dinoscope.features.extract import choose_device

    loaded = load_encoder(source, architecture=architecture, device=choose_device(device))
    # DINOv2 interpolates its positions to images of any size, as it was trained to in the end
    takes_any_size = loaded.kind.startswith("Hugging Face dinov2")
    return TorchPatchEncoder(name, loaded.model, None if takes_any_size else loaded.image_px)


def dense_features(encoder: PatchEncoder, image: np.ndarray) -> np.ndarray:
    """Features of all patches of one image.

    An image whose sides are no multiples of the patch is brought to the nearest size that is. For models that take
    images of one size only it is cut into windows of that size, which see nothing of each other.

    Args:
        encoder: The model.
        image: (H, W, 3) uint8.

    Returns:
        (h, w, D) float32.

    Raises:
        FeaturesError: Features that are not finite, or no features of patches.
    """
    patch = encoder.patch_px
    if encoder.window_px is None:
        sides = [max(patch, round(side / patch) * patch) for side in image.shape[:2]]
        features = encoder(_resized(image, *sides)[None])[0]
    else:
        features = _in_windows(encoder, image, encoder.window_px)
    if not np.isfinite(features).all():
        raise FeaturesError(f"model {encoder.name!r} gives patch features that are not finite; check its weights")
    return features.astype(np.float32)


def fit_patch_colors(
    features: Sequence[np.ndarray], name: str, *, background: str = "keep", seed: int = 0
) -> ColorBasis:
    """One colour space for the patches of one or several images by one model.

    Args:
        features: (h, w, D) each.
        name: The model's.
        background: As for `fit_colors`.
        seed: Of the sample, where there are more than 100,000 patches.

    Raises:
        FeaturesError: The patches differ in fewer than three directions.
    """
    rows = np.concatenate([each.reshape(-1, each.shape[-1]) for each in features])
    if len(rows) > MAX_PATCHES:
        rows = rows[np.sort(np.random.default_rng(seed).choice(len(rows), MAX_PATCHES, replace=False))]
    what = f"model {name!r} ({len(rows)} patch{'' if len(rows) == 1 else 'es'})"
    return fit_colors(rows.astype(np.float32, copy=True), what, background=background, hint=PATCHES_HINT)


def agreeing_with(basis: ColorBasis, own: np.ndarray, reference: np.ndarray) -> ColorBasis:
    """The same three components in the order and with the signs that agree best with those of another model.

    So that like places have like hues by both, as far as the models see alike. Nothing is rotated: red, green and blue
    still are one component each.

    Args:
        basis: Of the model.
        own: (N, 3) coordinates of patches on its first three components.
        reference: (N, 3) coordinates of the same patches on the other model's.
    """
    correlation = np.corrcoef(own.T, reference.T)[:3, 3:]
    orders = list(product(permutations(range(3)), product((1, -1), repeat=3)))
    agreement = [sum(sign * correlation[order[n], n] for n, sign in enumerate(signs)) for order, signs in orders]
    order, signs = orders[int(np.argmax(agreement))]
    order, signs = list(order), np.array(signs, np.float32)
    components = basis.components.copy()
    components[:3] = components[order] * signs[:, None]
    low, high = basis.low[order] * signs, basis.high[order] * signs
    ratios = basis.info["explained_variance_ratio"]
    info = basis.info | {
        "explained_variance_ratio": [ratios[n] for n in order] + ratios[3:],
        "order": [n + 1 for n in order],  # by variance, of red, green and blue
    }
    return replace(basis, components=components, low=np.minimum(low, high), high=np.maximum(low, high), info=info)


def cosine_similarity(features: np.ndarray, row: int, column: int) -> np.ndarray:
    """Cosine of every patch with one of them, (h, w) float32.

    Args:
        features: (h, w, D).
        row, column: The patch.
    """
    directions = features / np.maximum(np.linalg.norm(features, axis=2, keepdims=True), 1e-12)
    return directions @ directions[row, column]


def _in_windows(encoder: PatchEncoder, image: np.ndarray, window_px: int) -> np.ndarray:
    counts = [max(1, round(side / window_px)) for side in image.shape[:2]]
    image = _resized(image, *(count * window_px for count in counts))
    windows = image.reshape(counts[0], window_px, counts[1], window_px, 3).swapaxes(1, 2)
    rows = [np.concatenate([encoder(window[None])[0] for window in row], axis=1) for row in windows]
    return np.concatenate(rows)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
