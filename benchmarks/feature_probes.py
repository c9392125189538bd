"""What features of a backbone are worth: k nearest neighbours, a linear probe of patches, and a PCA picture.

Shapes: N images, P patches of each, D width of the features.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinoscope import load_backbone

__all__ = [
    "cut_windows",
    "features_of",
    "interval",
    "join_windows",
    "linear_probe",
    "mean_iou",
    "neighbour_votes",
    "pca_colors",
]

_VALUES_AT_ONCE = 2**21  # a few tissue images, or 75 cells
Features = Callable[[np.ndarray], dict[str, np.ndarray]]


def features_of(path: Path) -> Features:
    """An exported backbone as a function: RGB images (N, H, W, 3) -> "cls" (N, D) and "patches" (N, P, D)."""
    model = load_backbone(path)
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))

    def extract(images: np.ndarray) -> dict[str, np.ndarray]:
        found = []
        for batch in np.array_split(images, -(-images.size // _VALUES_AT_ONCE)):
            pixels = torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float() / 255
            with torch.inference_mode():
                found.append(model.forward_features((pixels - mean) / std))
        return {key: torch.cat([output[key] for output in found]).numpy() for key in ("cls", "patches")}

    return extract


def neighbour_votes(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, bank: np.ndarray, queries: np.ndarray, k: int
) -> np.ndarray:
    """The most frequent class among the k nearest neighbours by cosine, none of them of the query's own group.

    Features are centred on the mean of the bank first: a part that is the same everywhere says nothing, and it is large
    in random networks.

    Args:
        features: (N, D).
        labels: (N,) classes.
        groups: (N,) what may not be its own neighbour.
        bank: (N,) bool, the possible neighbours.
        queries: (N,) bool, what is classified; it may overlap with the bank.
        k: Number of neighbours; of classes with equal votes the one with the nearest neighbour wins.
    """
    centred = features - features[bank].mean(axis=0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    cosines = np.where(groups[queries][:, None] == groups[bank], -np.inf, unit[queries] @ unit[bank].T)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    assert np.isfinite(np.take_along_axis(cosines, nearest, axis=1)).all(), "fewer than k neighbours of other groups"
    classes = np.unique(labels)
    votes = (labels[bank][nearest][..., None] == classes).sum(axis=1).astype(float)
    first = (labels[bank][nearest[:, :1]] == classes) * 0.5
    return classes[np.argmax(votes + first, axis=1)]


def linear_probe(features: np.ndarray, targets: np.ndarray, c: float, folds: int) -> np.ndarray:
    """Probability (N, P) of each patch by a logistic regression that has not seen its image.

    Args:
        features: (N, P, D); standardised with the numbers of the training folds.
        targets: (N, P) bool.
        c: Inverse strength of the regression's penalty.
        folds: Number of folds over images.
    """
    num_images, num_patches, width = features.shape
    rows, flags = features.reshape(-1, width).astype(np.float64), targets.reshape(-1)
    images = np.repeat(np.arange(num_images), num_patches)
    probabilities = np.empty(len(rows))
    for train, test in GroupKFold(folds).split(rows, flags, images):
        assert not set(images[train]) & set(images[test])
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, solver="newton-cholesky", max_iter=100))
        probabilities[test] = probe.fit(rows[train], flags[train]).predict_proba(rows[test])[:, 1]
    return probabilities.reshape(num_images, num_patches)


def mean_iou(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean of the IoU of foreground and of background, from one confusion matrix over all patches."""
    said = probabilities >= 0.5
    ious = [(a & b).sum() / (a | b).sum() for a, b in ((said, targets), (~said, ~targets))]
    return float(np.mean(ious))


def interval(measure: Callable[[np.ndarray], float], groups: np.ndarray, draws: int = 1000) -> tuple[float, float]:
    """95 % bootstrap interval of a measure of rows, drawn group by group with replacement.

    Args:
        measure: From row numbers to a number.
        groups: (N,) group of each row.
        draws: Number of resamples, seeded.
    """
    rng, names = np.random.default_rng(0), np.unique(groups)
    rows = [np.flatnonzero(groups == name) for name in names]
    values = [
        measure(np.concatenate([rows[index] for index in rng.integers(len(rows), size=len(rows))]))
        for _ in range(draws)
    ]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def cut_windows(images: np.ndarray, window_px: int) -> np.ndarray:
    """(N, H, W, 3) -> (N · windows, window, window, 3), image by image, row by row."""
    num, height, width, channels = images.shape
    cut = images.reshape(num, height // window_px, window_px, width // window_px, window_px, channels)
    return cut.swapaxes(2, 3).reshape(-1, window_px, window_px, channels)


def join_windows(patches: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Features of the windows of `cut_windows` (N · windows, P, D) -> (N, all patches row by row, D).

    Args:
        patches: Features of each window, row by row.
        grid: Windows of an image, down and across.
    """
    side = round(patches.shape[1] ** 0.5)
    joined = patches.reshape(-1, *grid, side, side, patches.shape[-1]).swapaxes(2, 3)
    return joined.reshape(len(joined), -1, patches.shape[-1])


def pca_colors(features: np.ndarray) -> np.ndarray:
    """(N, P, D) -> RGB (N, P, 3) uint8: three components of all patches, each between its 1st and 99th percentile."""
    rows = features.reshape(-1, features.shape[-1])
    scores = PCA(3, random_state=0).fit_transform(rows)
    low, high = np.percentile(scores, [1, 99], axis=0)
    return np.rint(255 * ((scores - low) / (high - low)).clip(0, 1)).astype(np.uint8).reshape(*features.shape[:2], 3)
