"""How alike the patches of an image are to each other, by one model and by another: the Gram distance.

G holds the cosines between all patches of an image. The distance of two models is the mean over images of
‖G - G'‖² / P² (Frobenius), what the gram loss measures between student and gram teacher (DINOv3, arXiv:2508.10104). It
tells how far training has moved patches against each other, not whether that was for the better.

The same few images for all models: tiles of the slides, or images with masks. Patches are kept in float16, which
changes a distance by less than 1e-6 (tests/unit/test_patch_similarity.py).

Shapes: N images, P patches of one, D width.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoscope.arrays import damage_named, document_of, read_arrays
from dinoscope.errors import FeaturesError
from dinoscope.evaluate.descriptive import gram_distance
from dinoscope.evaluate.embedding import ImageFeatures
from dinoscope.features.embedding import Embedder
from dinoscope.features.encoders import LoadedEncoder

__all__ = ["MAX_IMAGES", "MAX_PATCHES", "embed_patches", "gram_distances", "read_patches"]

MAX_IMAGES = 64
MAX_PATCHES = 1_024  # of an image, or large ones would take gigabytes for their Gram matrix
_IMAGES_AT_ONCE = 16


def embed_patches(
    encoder: LoadedEncoder, images: np.ndarray, about: dict[str, Any], device: torch.device
) -> ImageFeatures:
    """The patches of the last block of each image; a grid of 0 x 0 where the model cuts it into no whole patches.

    Args:
        encoder: The model.
        images: (N, S, S, 3) uint8.
        about: model and pooling, for the file.
        device: Where the model is.

    Raises:
        FeaturesError: A feature is not finite.
    """
    side, size = encoder.image_px or images.shape[1], encoder.model.patch_size
    about = {**about, "sha256": encoder.sha256, "patch_size": size, "images": _digest(images)}
    if size is None or side % size or not len(images):
        width = encoder.model.embed_dim
        return ImageFeatures(about, np.zeros((0, width), np.float16), np.zeros((len(images), 2), np.int32))
    embedder = Embedder(encoder.model, about["model"], "cls", device, dense=True)
    embedder.image_px = encoder.image_px
    rows = []
    for first in range(0, len(images), _IMAGES_AT_ONCE):
        patches = embedder.embed(torch.from_numpy(images[first : first + _IMAGES_AT_ONCE]))[1]
        rows.append(patches.cpu().numpy().reshape(-1, patches.shape[-1]))
    features = np.concatenate(rows)
    if not np.isfinite(features).all():
        raise FeaturesError(f"patches of model {about['model']!r} are not finite in float16; check its weights")
    return ImageFeatures(about, features, np.full((len(images), 2), side // size, np.int32))


def read_patches(path: Path) -> ImageFeatures:
    """Reads the patches of tiles, or of images with masks (embedding.py).

    Raises:
        FeaturesError: They are missing or damaged.
    """
    with damage_named(path, "patches of images", "delete it and embed again"):
        arrays = read_arrays(path)
        return ImageFeatures(document_of(arrays["about"]), arrays["features"], arrays["grids"])


def gram_distances(
    mine: ImageFeatures, others: Mapping[str, ImageFeatures], seed: int
) -> tuple[dict[str, float], list[str]]:
    """The distance of a model from each of some others, on at most `MAX_IMAGES` images, and what cannot be compared.

    Args:
        mine: Patches of the model.
        others: Name of the number -> patches of another model, of the same images.
        seed: Which images, and which patches of large ones; the same for all models.

    Returns:
        Numbers, and sentences.

    Raises:
        FeaturesError: The patches are of other images.
    """
    numbers, notes = {}, []
    images = _drawn(len(mine.grids), MAX_IMAGES, [seed])
    for name, other in others.items():
        if other.about["images"] != mine.about["images"]:
            raise FeaturesError(
                f"patches of model {mine.about['model']!r} are of other images than those of "
                f"{other.about['model']!r}; delete both files and embed again"
            )
        if not np.array_equal(mine.grids[images], other.grids[images]):
            notes.append(
                f"gram distance: {mine.about['model']} and {other.about['model']} cut images into different patches, "
                "not comparable"
            )
        elif len(images) and mine.grids[images].all():
            pairs = zip(_patches(mine, images, seed), _patches(other, images, seed), strict=True)
            numbers[name] = float(np.mean([gram_distance(one[None], its[None]) for one, its in pairs]))
    return numbers, notes


def _patches(features: ImageFeatures, images: np.ndarray, seed: int) -> list[np.ndarray]:
    """(P, D) of each image."""
    ends = np.cumsum(features.grids.prod(axis=1))
    found = []
    for index in images:
        count = int(features.grids[index].prod())
        taken = _drawn(count, MAX_PATCHES, [seed, int(index)])
        found.append(features.features[ends[index] - count : ends[index]][taken])
    return found


def _drawn(count: int, most: int, seed: list[int]) -> np.ndarray:
    return np.arange(count) if count <= most else np.sort(np.random.default_rng(seed).permutation(count)[:most])


def _digest(images: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(images)).hexdigest()[:16]
