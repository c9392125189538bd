"""The images of learned_features.py: cells and tissue, halved by parent image, and what colour alone says of them."""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from feature_probes import cut_windows

from dinoscope.data.color import jitter, shift_stains
from dinoscope.evaluate.baselines import color_histogram, thumbnail

__all__ = [
    *("PATCH_PX", "Cells", "Tissue", "grey", "histograms", "mean_colors", "pixels", "read_cells", "read_tissue"),
    *("rebrightened", "restained", "standardised_pixels", "thumbnails", "tiles_of", "write_training_images"),
]

PATCH_PX = 16
ENLARGED = 2  # nuclei are about 20 px wide
TRAINING_PX = 144  # of the images that training cuts its crops from
STAIN_SPREAD, STAIN_OFFSET = 0.25, 0.05  # of the shifted copies: gains of 1 ± this, optical densities of ± this
DARKER, BRIGHTER = 0.75, 1.2


@dataclass(frozen=True)
class Cells:
    """RGB images (N, 96, 96, 3), class and parent image of each, and whether its parent is one to train on."""

    images: np.ndarray
    labels: np.ndarray
    parents: np.ndarray
    training: np.ndarray


@dataclass(frozen=True)
class Tissue:
    """Enlarged RGB images (N, H, W, 3), nuclei (N, patches) of each, and whether it is one to train on."""

    images: np.ndarray
    nuclei: np.ndarray
    training: np.ndarray


def read_cells(folder: Path, split: int) -> Cells:
    """All cells; a file's name is its parent image's and a number."""
    files = sorted(folder.glob("*/*.jpg"))
    parents = np.array([file.stem.rpartition("_")[0] for file in files])
    return Cells(
        np.stack([cv2.imread(str(file))[..., ::-1] for file in files]),
        np.array([file.parent.name for file in files]),
        parents,
        np.isin(parents, _half(np.unique(parents), split)),
    )


def read_tissue(folder: Path, split: int) -> Tissue:
    """All tissue images; a patch is nucleus where at least half of its pixels are."""
    files = sorted(folder.glob("images/*.png"))
    masks = np.stack([cv2.imread(str(folder / "masks" / file.name), cv2.IMREAD_UNCHANGED) > 0 for file in files])
    side = PATCH_PX // ENLARGED
    share = masks.reshape(len(files), masks.shape[1] // side, side, -1, side).mean((2, 4))
    images = [cv2.imread(str(file))[..., ::-1] for file in files]
    enlarged = [cv2.resize(image, None, fx=ENLARGED, fy=ENLARGED, interpolation=cv2.INTER_CUBIC) for image in images]
    names = np.array([file.name for file in files])
    return Tissue(np.stack(enlarged), (share >= 0.5).reshape(len(files), -1), np.isin(names, _half(names, split)))


def _half(names: np.ndarray, split: int) -> np.ndarray:
    return np.random.default_rng(split).permutation(names)[: len(names) // 2]


def tiles_of(images: np.ndarray) -> np.ndarray:
    """Squares that cover each image evenly, with small overlaps."""
    tops, lefts = (
        np.linspace(0, size - TRAINING_PX, -(-size // TRAINING_PX)).astype(int) for size in images.shape[1:3]
    )
    squares = [images[:, top : top + TRAINING_PX, left : left + TRAINING_PX] for top in tops for left in lefts]
    return np.concatenate(squares)


def write_training_images(images: np.ndarray, folder: Path) -> None:
    """One PNG an image, enlarged where it is smaller than the training's."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        shown = cv2.resize(image, (TRAINING_PX, TRAINING_PX), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f"{index:04d}.png"), shown[..., ::-1])


def grey(images: np.ndarray) -> np.ndarray:
    """Grey copies, of three equal channels."""
    return np.stack([cv2.cvtColor(cv2.cvtColor(i, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB) for i in images])


def restained(images: np.ndarray) -> np.ndarray:
    """Copies as another laboratory might have stained them: each with stain amounts of its own, drawn by its number."""
    copies = []
    for index, image in enumerate(images):
        rng = np.random.default_rng([0, index])
        gains, offsets = rng.uniform(1 - STAIN_SPREAD, 1 + STAIN_SPREAD, 3), rng.uniform(-1, 1, 3) * STAIN_OFFSET
        copies.append(shift_stains(image, gains, offsets))
    return np.stack(copies)


def rebrightened(images: np.ndarray) -> np.ndarray:
    """Copies that are darker and, every other one, brighter."""
    return np.stack(jitter(images, [[("brightness", (DARKER, BRIGHTER)[index % 2])] for index in range(len(images))]))


def histograms(images: np.ndarray) -> np.ndarray:
    """16 bins each of hue, saturation and value."""
    return np.stack([color_histogram(image) for image in images])


def thumbnails(images: np.ndarray) -> np.ndarray:
    """Each image shrunk to 8×8 px."""
    return np.stack([thumbnail(image) for image in images])


def pixels(images: np.ndarray) -> np.ndarray:
    """Values of each patch's pixels, as many as the image had before it was enlarged."""
    small = np.stack([cv2.resize(i, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for i in images])
    side = PATCH_PX // ENLARGED
    return cut_windows(small, (side, side)).reshape(len(images), -1, 3 * side**2)


def mean_colors(images: np.ndarray) -> np.ndarray:
    """Mean RGB of each patch."""
    return pixels(images).reshape(len(images), -1, (PATCH_PX // ENLARGED) ** 2, 3).mean(axis=2)


def standardised_pixels(images: np.ndarray) -> np.ndarray:
    """The pixels, and beside them the patch's mean colour by mean and deviation of its image's patches."""
    colors = mean_colors(images)
    relative = (colors - colors.mean(axis=1, keepdims=True)) / colors.std(axis=1, keepdims=True)
    return np.concatenate([pixels(images), relative], axis=2)
