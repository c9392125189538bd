"""What features of a backbone are worth: k nearest neighbours, a linear probe of patches, and a PCA picture.

Shapes: N images, P patches of each, D width of the features.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from dinoscope import load_backbone
from dinoscope.evaluate import scores
from dinoscope.evaluate.knn import knn_predict
from dinoscope.models.vit import DinoVisionTransformer

__all__ = [
    "cut_windows",
    "dense_features_of",
    "features_of",
    "few_labels",
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
    return lambda images: _in_batches(images, model, lambda batch: model.forward_features(batch))


def dense_features_of(path: Path, last_blocks: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """An exported backbone as a function: images -> patches of its last blocks (None: all) side by side (N, P, D)."""
    model = load_backbone(path)
    number = last_blocks or len(model.blocks)

    def of_batch(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"patches": torch.cat(model.get_intermediate_layers(batch, number), dim=-1)}

    return lambda images: _in_batches(images, model, of_batch)["patches"]


def _in_batches(
    images: np.ndarray,
    model: DinoVisionTransformer,
    of_batch: Callable[[torch.Tensor], dict[str, torch.Tensor]],
) -> dict[str, np.ndarray]:
    mean, std = (torch.tensor(values)[:, None, None] for values in (model.mean, model.std))
    found = []
    for batch in np.array_split(images, -(-images.size // _VALUES_AT_ONCE)):
        pixels = torch.from_numpy(np.ascontiguousarray(batch)).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            found.append(of_batch((pixels - mean) / std))
    return {key: torch.cat([output[key] for output in found]).numpy() for key in found[0]}


def neighbour_votes(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, bank: np.ndarray, queries: np.ndarray, k: int
) -> np.ndarray:
    """The most frequent class among the k nearest neighbours by cosine, none of them of the query's own group.

    Features are centred on the mean of the bank first: a part that is the same everywhere says nothing, and it is large
    in random networks. As `dinoscope.evaluate.knn` has it.

    Args:
        features: (N, D).
        labels: (N,) classes.
        groups: (N,) what may not be its own neighbour.
        bank: (N,) bool, the possible neighbours.
        queries: (N,) bool, what is classified; it may overlap with the bank.
        k: Number of neighbours; of classes with equal votes the one with the nearer neighbour wins.
    """
    names, group = np.unique(groups, return_inverse=True)
    classes, label = np.unique(labels, return_inverse=True)
    apart = group[queries], group[bank]
    assert (bank.sum() - np.bincount(group[bank], minlength=len(names))).min() >= k, "fewer than k of other groups"
    said = knn_predict(features[queries], features[bank], label[bank], len(classes), ks=(k,), exclude_groups=apart)
    return classes[said[k].argmax(axis=1)]


def linear_probe(
    features: np.ndarray, targets: np.ndarray, c: float, folds: int, tested: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Probability (N, P) of each patch by a logistic regression that has not seen its image.

    Args:
        features: (N, P, D) that the regressions are trained on.
        targets: (N, P) bool.
        c: Inverse strength of the regression's penalty.
        folds: Number of folds over images.
        tested: (N, P, D) of the same images, or of changed copies of them, that the same regressions are asked about.

    Returns:
        Probabilities for each of `tested`.
    """
    num_images = len(features)
    said = {name: np.empty(targets.shape) for name in tested}
    for known, asked in KFold(folds).split(np.arange(num_images)):
        probe = _fitted(features[known], targets[known], c)
        for name, of_copies in tested.items():
            said[name][asked] = _probabilities(probe, of_copies[asked])
    return said


def few_labels(
    features: np.ndarray, targets: np.ndarray, c: float, num_images: int, draws: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Probes of a few images each, asked about all others: (probabilities (M, P), numbers of those images (M,)).

    Which images are labelled is drawn by number alone, so that all features are asked the same.
    """
    rng = np.random.default_rng([0, num_images])
    found = []
    for _ in range(draws):
        order = rng.permutation(len(features))
        known, asked = order[:num_images], np.sort(order[num_images:])
        found.append((_probabilities(_fitted(features[known], targets[known], c), features[asked]), asked))
    return found


def _fitted(features: np.ndarray, targets: np.ndarray, c: float) -> Pipeline:
    """Standardised with the numbers of these patches, in float32 as the features are."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, solver="newton-cholesky", max_iter=100))
    return probe.fit(features.reshape(-1, features.shape[-1]).astype(np.float32), targets.reshape(-1))


def _probabilities(probe: Pipeline, features: np.ndarray) -> np.ndarray:
    rows = features.reshape(-1, features.shape[-1]).astype(np.float32)
    return probe.predict_proba(rows)[:, 1].reshape(features.shape[:2])


def mean_iou(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean of the IoU of foreground and of background, from one confusion matrix over all patches."""
    return float(
        scores.mean_iou(scores.confusion_matrices(targets.astype(int), (probabilities >= 0.5).astype(int), 2))[0]
    )


def interval(
    measure: Callable[[np.ndarray], np.ndarray], groups: np.ndarray, draws: int = 500
) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap intervals of measures of rows, drawn group by group with replacement: lower and upper ends.

    Args:
        measure: From row numbers to numbers.
        groups: (N,) group of each row.
        draws: Number of resamples, seeded.
    """
    rng, names = np.random.default_rng(0), np.unique(groups)
    rows = [np.flatnonzero(groups == name) for name in names]
    values = [
        measure(np.concatenate([rows[index] for index in rng.integers(len(rows), size=len(rows))]))
        for _ in range(draws)
    ]
    low, high = np.percentile(values, [2.5, 97.5], axis=0)
    return low, high


def cut_windows(images: np.ndarray, window_hw: tuple[int, int]) -> np.ndarray:
    """(N, H, W, 3) -> (N · windows, h, w, 3), image by image, row by row."""
    (num, height, width, channels), (window_height, window_width) = images.shape, window_hw
    cut = images.reshape(num, height // window_height, window_height, width // window_width, window_width, channels)
    return cut.swapaxes(2, 3).reshape(-1, window_height, window_width, channels)


def join_windows(patches: np.ndarray, windows_hw: tuple[int, int], grid_hw: tuple[int, int]) -> np.ndarray:
    """Features of the windows of `cut_windows` (N · windows, P, D) -> (N, all patches row by row, D).

    Args:
        patches: Features of each window, row by row.
        windows_hw: Windows of an image, down and across.
        grid_hw: Patches of a window, down and across.
    """
    joined = patches.reshape(-1, *windows_hw, *grid_hw, patches.shape[-1]).swapaxes(2, 3)
    return joined.reshape(len(joined), -1, patches.shape[-1])


def pca_colors(features: np.ndarray) -> np.ndarray:
    """(N, P, D) -> RGB (N, P, 3) uint8: three components of all patches, each between its 1st and 99th percentile."""
    rows = features.reshape(-1, features.shape[-1])
    scores = PCA(3, random_state=0).fit_transform(rows)
    low, high = np.percentile(scores, [1, 99], axis=0)
    return np.rint(255 * ((scores - low) / (high - low)).clip(0, 1)).astype(np.uint8).reshape(*features.shape[:2], 3)
