"""Dense answers: a linear probe of patch features, asked about the classes of patches, counted in pixels of the mask.

Each pixel takes the answer of the patch that it lies in, so that models of different patch sizes are held to the same
pixels. A patch is learned as the class that most of its pixels have.

Shapes: N images, P patches of all of them, D width, C classes.
"""

import numpy as np

from dinoscope.errors import FeaturesError
from dinoscope.evaluate.answers import Answers
from dinoscope.evaluate.descriptive import outlier_patches
from dinoscope.evaluate.embedding import ImageFeatures, read_mask
from dinoscope.evaluate.folds import Fold, grouped_folds
from dinoscope.evaluate.measuring import Settings
from dinoscope.evaluate.probe import CLEAN, linear_probe
from dinoscope.evaluate.tile_sets import ImageSet
from dinoscope.evaluate.units import Units

__all__ = ["answer_masks", "patch_edges", "patch_labels"]

# Of one image or many: patches of an image say much the same, and it is their numbers that take the time.
_MOST_PATCHES = 10_000  # that a regression is fitted on, as equal as possible an image; all are asked
_MOST_CHOOSING = 3_000  # that scaling and penalty are chosen on
IGNORED = 255  # of masks with classes
_UNTOLD = -1  # the class of pixels that are ignored, and of patches of nothing else


def answer_masks(
    units: Units, images: ImageSet, features: ImageFeatures, instances: bool, settings: Settings
) -> Answers:
    """Confusion matrices (R, N, C, C) of the pixels of each image, one a repeat of the folds over images' groups.

    Args:
        units: The images.
        images: With their masks.
        features: Of their patches.
        instances: Mask values above 0 are instances of one class.
        settings: How.

    Raises:
        FeaturesError: A mask cannot be read, or there are fewer than two classes or four groups.
    """
    masks = [read_mask(images, index, instances) for index in range(len(images))]
    classes = sorted({int(value) for mask in masks for value in np.unique(mask)} - {IGNORED})
    if len(classes) < 2:
        found = f"only class {classes[0]}" if classes else "no class"
        raise FeaturesError(
            f"set {images.name}: its masks have {found}, and two are needed; {IGNORED} is ignored where masks hold "
            "classes, and `instances` makes one class of all values above 0"
        )
    numbered = [np.where(mask == IGNORED, _UNTOLD, np.searchsorted(classes, mask)) for mask in masks]
    patch_px = None if features.about["image_px"] else features.about["patch_size"] / features.about["enlarge"]
    sizes = features.grids.prod(axis=1)
    ends = np.cumsum(sizes)
    labels = np.concatenate(
        [patch_labels(mask, tuple(g), len(classes), patch_px) for mask, g in zip(numbered, features.grids, strict=True)]
    )
    image_of = np.repeat(np.arange(len(images)), sizes)
    test = np.flatnonzero([unit.set == "test" for unit in units.units])
    mine = np.isin(image_of, test)
    groups = units.groups
    rows, of_rows, told = features.features[mine].astype(np.float32), image_of[mine], labels[mine]
    folds = _patch_folds(groups[test], test, of_rows, told != _UNTOLD, settings)
    told = np.maximum(told, 0)  # patches that nothing is known of are asked, and never learned from
    how = {"max_rows": _MOST_PATCHES, "max_rows_choosing": _MOST_CHOOSING, "seed": settings.seed}
    probed = linear_probe(rows, told, groups[of_rows], folds, **how)
    said = probed.predictions[CLEAN].said.argmax(axis=2)
    answers = np.zeros((len(said), len(labels)), dtype=np.int64)
    answers[:, mine] = said
    confusions = np.zeros((len(said), len(images), len(classes), len(classes)), dtype=np.int64)
    for index in test:
        counts = _pixel_counts(numbered[index], tuple(features.grids[index]), len(classes), patch_px)
        of_image = answers[:, ends[index] - sizes[index] : ends[index]]
        for number in range(len(classes)):
            confusions[:, index, :, number] = (of_image == number).astype(np.int64) @ counts
    numbers = {"outlier_patches": outlier_patches(features.features[None].astype(np.float32))}
    notes = [
        f"{len(labels):,} patches, of which a regression learns from {probed.num_fitted:,} at most, as equal as "
        "possible an image; patches with a norm of more than three times the median are outliers"
    ]
    return Answers({}, np.zeros(len(units), np.int8), confusions={"dense": confusions}, numbers=numbers, notes=notes)


def patch_labels(mask: np.ndarray, grid: tuple[int, int], num_classes: int, patch_px: float | None) -> np.ndarray:
    """(h·w,) the class that most pixels of each patch have, row by row; of equal numbers the lower one.

    Args:
        mask: (H, W) class numbers; -1 where none counts, which is the answer for patches of nothing else.
        grid: (h, w).
        num_classes: C.
        patch_px: Side of a patch in pixels of the mask; None where the image was stretched to its patches.
    """
    counts = _pixel_counts(mask, grid, num_classes, patch_px)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), _UNTOLD)


def patch_edges(length: int, count: int, patch_px: float | None) -> np.ndarray:
    """(count + 1,) where the patches of a side begin and end, in pixels of the mask; the last one may be cut off."""
    side = length / count if patch_px is None else patch_px
    edges = np.minimum(np.round(np.arange(count + 1) * side), length).astype(np.int64)
    edges[-1] = length
    return edges


def _edges(shape: tuple[int, ...], grid: tuple[int, ...], patch_px: float | None) -> list[np.ndarray]:
    return [patch_edges(length, count, patch_px) for length, count in zip(shape, grid, strict=True)]


def _sums(values: np.ndarray, grid: tuple[int, int], patch_px: float | None) -> np.ndarray:
    rows, columns = _edges(values.shape, grid, patch_px)
    return np.add.reduceat(np.add.reduceat(values, rows[:-1], axis=0), columns[:-1], axis=1)


def _pixel_counts(mask: np.ndarray, grid: tuple[int, int], num_classes: int, patch_px: float | None) -> np.ndarray:
    """(h·w, C) pixels of each class in each patch, row by row; what is ignored counts nowhere."""
    counts = [_sums((mask == number).astype(np.int64), grid, patch_px) for number in range(num_classes)]
    return np.stack(counts, axis=-1).reshape(-1, num_classes)


def _patch_folds(
    groups: np.ndarray, test: np.ndarray, image_of: np.ndarray, is_told: np.ndarray, settings: Settings
) -> list[Fold]:
    """Folds of images as folds of their patches, every image asked once a repeat."""
    # images have no class to be stratified by: two labels that alternate over groups do no harm
    alternating = np.unique(groups, return_inverse=True)[1] % 2
    number = min(settings.folds, len(np.unique(groups)) // 2)
    if number < 2:
        raise FeaturesError(
            f"the images with masks are of {len(np.unique(groups))} groups, and at least four are needed, so that a "
            "probe can learn from some and be asked about others; add images, or leave the set out"
        )
    found = grouped_folds(alternating, groups, folds=number, repeats=settings.repeats, seed=settings.seed)
    return [
        Fold(
            fold.repeat,
            fold.name,
            np.flatnonzero(np.isin(image_of, test[fold.train]) & is_told),
            np.flatnonzero(np.isin(image_of, test[fold.test])),
        )
        for fold in found
    ]
