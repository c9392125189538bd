"""IoU, Dice and pixel accuracy from one confusion matrix over a whole set.

The measures of a set are not the means of its batches' measures: a class that is rare in a batch would count there as
much as one that fills it. So pixels are counted first, over all images and processes, and divided once.
"""

from typing import Any

import numpy as np
import torch

__all__ = ["IGNORED", "ConfusionMatrix"]

IGNORED = 255  # of a mask: pixels that nothing is learned from or measured at


class ConfusionMatrix:
    """How many pixels of each true class were taken for which class.

    Attributes:
        num_classes: C.
        counts: int64 (C, C), a row a true class, a column a predicted one.
    """

    def __init__(self, num_classes: int, counts: np.ndarray | None = None) -> None:
        assert 0 < num_classes <= IGNORED, num_classes
        self.num_classes = num_classes
        self.counts = np.zeros((num_classes, num_classes), np.int64)
        if counts is not None:
            self.counts += np.asarray(counts)

    def update(self, pred: np.ndarray | torch.Tensor, truth: np.ndarray | torch.Tensor) -> None:
        """Counts the pixels of one image or of a batch.

        Args:
            pred: Predicted classes 0 … C - 1, any integer kind and shape, on any device.
            truth: True classes, of the same shape; where it is 255, nothing is counted.
        """
        pred, truth = _tensor(pred), _tensor(truth)
        assert pred.shape == truth.shape, (pred.shape, truth.shape)
        counted = truth != IGNORED
        pred, truth = (each.to(truth.device)[counted].long() for each in (pred, truth))
        if len(pred):
            lowest, highest = (int(bound) for bound in torch.aminmax(torch.cat([pred, truth])))
            assert 0 <= lowest <= highest < self.num_classes, (lowest, highest, self.num_classes)
        counts = torch.bincount(truth * self.num_classes + pred, minlength=self.num_classes**2)
        self.counts += counts.cpu().numpy().reshape(self.counts.shape)

    def __add__(self, other: "ConfusionMatrix") -> "ConfusionMatrix":
        assert self.num_classes == other.num_classes, (self.num_classes, other.num_classes)
        return ConfusionMatrix(self.num_classes, self.counts + other.counts)

    def __radd__(self, zero: int) -> "ConfusionMatrix":
        """For `sum`, which begins with 0."""
        assert zero == 0, zero
        return ConfusionMatrix(self.num_classes, self.counts)

    def iou(self) -> np.ndarray:
        """Intersection over union of each class, float64 (C,); NaN where it is in neither truth nor prediction."""
        hits, truths, predictions = self._sums()
        return _ratio(hits, truths + predictions - hits)

    def dice(self) -> np.ndarray:
        """Dice coefficient (F1) of each class, float64 (C,); NaN as in `iou`."""
        hits, truths, predictions = self._sums()
        return _ratio(2 * hits, truths + predictions)

    def miou(self) -> float:
        """Mean of `iou` over the classes that are in truth or prediction; NaN when nothing was counted."""
        return _mean(self.iou())

    def mean_dice(self) -> float:
        """Mean of `dice` over the same classes."""
        return _mean(self.dice())

    def pixel_accuracy(self) -> float:
        """Share of the pixels that are of the class predicted; NaN when nothing was counted."""
        return float(_ratio(np.trace(self.counts), self.counts.sum()))

    def summary(self) -> dict[str, Any]:
        """All measures by name, plain numbers; of a class that is absent, None."""
        numbers = {"miou": self.miou(), "dice": self.mean_dice(), "pixel_accuracy": self.pixel_accuracy()}
        per_class = {"iou_per_class": self.iou().tolist(), "dice_per_class": self.dice().tolist()}
        return {name: _or_none(value) for name, value in numbers.items()} | {
            name: [_or_none(value) for value in values] for name, values in per_class.items()
        }

    def _sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return np.diagonal(self.counts), self.counts.sum(axis=1), self.counts.sum(axis=0)


def _tensor(classes: np.ndarray | torch.Tensor) -> torch.Tensor:
    if isinstance(classes, torch.Tensor):
        return classes
    return torch.from_numpy(np.array(classes, np.int64))  # a copy: torch warns of arrays that cannot be written


def _ratio(part: Any, whole: Any) -> np.ndarray:
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else value
