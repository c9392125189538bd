"""Features of images from elsewhere: a row an image of a tile set, a grid of patches an image with a mask.

Shapes: N images, D width, h x w patches.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinoscope.arrays import damage_named, document_in, document_of, read_arrays, write_arrays
from dinoscope.data.images import read_image
from dinoscope.errors import FeaturesError, WeightsError
from dinoscope.evaluate.samples import SampledTiles
from dinoscope.evaluate.shifts import shifted
from dinoscope.evaluate.tile_sets import ImageSet
from dinoscope.evaluate.units import digest_of
from dinoscope.features.embedding import Embedder
from dinoscope.features.encoders import LoadedEncoder
from dinoscope.progress import progress

__all__ = [
    "ImageFeatures",
    "embed_masked",
    "embed_tiles",
    "read_image_features",
    "read_mask",
    "read_sampled_features",
    "tile",
    "write_features",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFeatures:
    """Features of a set's images by one model.

    Attributes:
        about: model, sha256, kind, width, pooling, digest of the images' names.
        features: (N, D) float32 of tiles; of images with masks (P, D) float16, all patches one image after another.
        grids: (N, 2) rows and columns of patches; empty for tiles.
        shifted: Kind of change -> (N, D) float32 of changed copies of the tiles (shifts.py).
    """

    about: dict[str, Any]
    features: np.ndarray
    grids: np.ndarray
    shifted: dict[str, np.ndarray] = field(default_factory=dict)


def embed_tiles(
    encoder: LoadedEncoder,
    images: ImageSet | SampledTiles,
    about: dict[str, Any],
    *,
    tile_px: int,
    grey: bool,
    device: torch.device,
    shifts: Sequence[str] = (),
) -> ImageFeatures:
    """A row for each tile, brought to `tile_px` x `tile_px`, and one for each changed copy of it.

    Raises:
        DinoscopeError: An image cannot be read, the side is no multiple of the patch size, a feature is not finite.
    """
    embedder = Embedder(encoder.model, about["model"], about["pooling"], device)
    embedder.image_px = encoder.image_px
    embedder.patch_shape(tile_px, images.name)
    rows: dict[str, list[np.ndarray]] = {kind: [] for kind in ("", *shifts)}
    with progress(f"features of {images.name} by {about['model']}", len(images), unit="images") as shown:
        for first in range(0, len(images), 64):
            places = range(first, min(first + 64, len(images)))
            batch = np.stack([tile(images.pixels(place), tile_px, grey) for place in places])
            for kind, of_kind in rows.items():
                changed = [shifted(one, kind, first + place) if kind else one for place, one in enumerate(batch)]
                of_kind.append(embedder.embed(torch.from_numpy(np.stack(changed)))[0].cpu().numpy())
            shown.advance(len(places))
    found = {kind: np.concatenate(of_kind) for kind, of_kind in rows.items()}
    for features in found.values():
        _require_finite(features, images, about)
    none = np.zeros((0, 2), dtype=np.int32)
    return ImageFeatures(_complete(about, encoder, images), found.pop(""), none, found)


def embed_masked(
    encoder: LoadedEncoder, images: ImageSet, about: dict[str, Any], *, enlarge: float, grey: bool, device: torch.device
) -> ImageFeatures:
    """The patches of the last block of each image, filled up by reflection to whole patches.

    An encoder with an input of fixed size sees each image stretched to it.

    Raises:
        DinoscopeError: An image cannot be read, or the encoder gives no patches.
    """
    model = encoder.model
    if model.patch_size is None:
        raise WeightsError(f"model {about['model']!r} gives no patch tokens, which a dense measure needs; leave it out")
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (model.mean, model.std))
    rows, grids = [], []
    with progress(f"patches of {images.name} by {about['model']}", len(images), unit="images") as shown:
        for pixels in _enlarged(images, enlarge, grey):
            batch = _fitted(torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div_(255).to(device), encoder)
            with torch.inference_mode():
                patches = model.forward_features((batch - mean) / std)["patches"][0]
            grids.append((batch.shape[2] // model.patch_size, batch.shape[3] // model.patch_size))
            rows.append(patches.float().cpu().numpy())
            shown.advance(1)
    features = np.concatenate(rows)
    _require_finite(features, images, about)
    grid = np.array(grids, dtype=np.int32)
    about = {**about, "enlarge": enlarge}
    return ImageFeatures(_complete(about, encoder, images), features.astype(np.float16), grid)


def read_mask(images: ImageSet, index: int, instances: bool) -> np.ndarray:
    """(H, W) int64 classes of an image's mask; 0 and 1 where all values above 0 are instances of one class.

    Raises:
        FeaturesError: It cannot be read, is not of one channel, or not of its image's size.
    """
    mask = cv2.imread(str(images.masks[index]), cv2.IMREAD_UNCHANGED)
    if mask is None or mask.ndim != 2:
        shape = "unreadable" if mask is None else f"of shape {mask.shape}"
        raise FeaturesError(f"set {images.name}: the mask of image {index} is {shape}, but must be of one channel")
    height, width = images.pixels(index).shape[:2]
    if mask.shape != (height, width):
        raise FeaturesError(
            f"set {images.name}: the mask of image {index} has {mask.shape[1]} x {mask.shape[0]} px, but the image "
            f"{width} x {height}; each mask must be of its image's size"
        )
    return (mask > 0).astype(np.int64) if instances else mask.astype(np.int64)


def tile(pixels: np.ndarray, tile_px: int, grey: bool) -> np.ndarray:
    """An image (H, W, 3) uint8 as a square tile; grey, of equal channels."""
    if grey:
        pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if pixels.shape[:2] == (tile_px, tile_px):
        return pixels
    shrinks = tile_px < max(pixels.shape[:2])
    return cv2.resize(pixels, (tile_px, tile_px), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def write_features(path: Path, found: ImageFeatures) -> None:
    """Writes the features of a set, by rename."""
    shifts = {f"shifted/{kind}": rows for kind, rows in found.shifted.items()}
    write_arrays(path, about=document_in(found.about), features=found.features, grids=found.grids, **shifts)


def read_image_features(path: Path, digest: str) -> ImageFeatures:
    """Reads them.

    Raises:
        FeaturesError: They are missing or damaged, or of other images than those that the task numbers.
    """
    found = read_sampled_features(path)
    if found.about["images"] != digest:
        raise FeaturesError(f"{path}: features of other images than those of the task now; delete it and embed again")
    return found


def read_sampled_features(path: Path) -> ImageFeatures:
    """Reads those of sampled tiles, whose slides stand in the file itself.

    Raises:
        FeaturesError: They are missing or damaged.
    """
    with damage_named(path, "features of images", "delete it and embed again"):
        arrays = read_arrays(path)
        shifts = {name.partition("/")[2]: rows for name, rows in arrays.items() if name.startswith("shifted/")}
        return ImageFeatures(document_of(arrays["about"]), arrays["features"], arrays["grids"], shifts)


def _enlarged(images: ImageSet, enlarge: float, grey: bool) -> Iterator[np.ndarray]:
    for file in images.files:
        pixels = read_image(images.folder, file)
        if grey:
            pixels = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        if enlarge != 1:
            how = cv2.INTER_AREA if enlarge < 1 else cv2.INTER_CUBIC
            pixels = cv2.resize(pixels, None, fx=enlarge, fy=enlarge, interpolation=how)
        yield pixels


def _fitted(batch: Tensor, encoder: LoadedEncoder) -> Tensor:
    """Whole patches: filled up on the right and below, or stretched to a fixed input."""
    if encoder.image_px is not None:
        size = (encoder.image_px, encoder.image_px)
        return F.interpolate(batch, size, mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
    size = encoder.model.patch_size
    right, below = -batch.shape[3] % size, -batch.shape[2] % size
    mode = "reflect" if right < batch.shape[3] and below < batch.shape[2] else "replicate"
    return F.pad(batch, (0, right, 0, below), mode=mode)


def _complete(about: dict[str, Any], encoder: LoadedEncoder, images: ImageSet | SampledTiles) -> dict[str, Any]:
    own = {"sha256": encoder.sha256, "kind": encoder.kind, "width": int(encoder.model.embed_dim)}
    own |= {"mean": list(encoder.model.mean), "std": list(encoder.model.std), "image_px": encoder.image_px}
    return {**about, **own, "patch_size": encoder.model.patch_size, "images": digest_of(images)}


def _require_finite(features: np.ndarray, images: ImageSet | SampledTiles, about: dict[str, Any]) -> None:
    if not np.isfinite(features).all():
        raise FeaturesError(
            f"set {images.name}: features of model {about['model']!r} are not finite; check its weights"
        )
