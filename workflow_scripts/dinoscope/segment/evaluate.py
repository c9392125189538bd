"""How good a segmenter is on a set of images, as they are or changed: one confusion matrix over the whole set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from dinoscope.errors import MasksError
from dinoscope.progress import progress
from dinoscope.segment.inference import Inference, predict_logits
from dinoscope.segment.masks import first_few
from dinoscope.segment.metrics import ConfusionMatrix

if TYPE_CHECKING:
    from dinoscope.segment.datasets import MaskDataset
    from dinoscope.segment.model import Segmenter
    from dinoscope.train.distributed import World

__all__ = ["Measured", "interval", "measure", "predict_classes", "validate"]

Change = Callable[[np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Measured:
    """What was counted.

    Attributes:
        names: Of the images.
        groups: Case or parent image of each.
        per_image: int64 (images, classes, 3): pixels that truth and prediction share, and pixels of either.
        matrix: Over all images.
    """

    names: list[str]
    groups: list[str]
    per_image: np.ndarray
    matrix: ConfusionMatrix

    def image_miou(self) -> np.ndarray:
        """Mean IoU of each image, over the classes that are in its truth or prediction; NaN where nothing counts."""
        return np.array([_miou(counts) for counts in self.per_image])

    def summary(self, classes: Sequence[str], *, draws: int = 1000, seed: int = 0) -> dict[str, Any]:
        """All measures by name, with a 95 % interval of the mIoU from a bootstrap over groups."""
        return {
            "images": len(self.names),
            "classes": list(classes),
            **self.matrix.summary(),
            "miou_interval": interval(self.per_image, self.groups, draws=draws, seed=seed),
        }


def predict_classes(model: "Segmenter", image: np.ndarray, how: Inference, device: torch.device) -> np.ndarray:
    """The class of every pixel of an image, uint8 (H, W)."""
    return predict_logits(model, image, how, device).argmax(0).to(torch.uint8).cpu().numpy()


def measure(
    model: "Segmenter",
    dataset: "MaskDataset",
    how: Inference,
    device: torch.device,
    *,
    change: Change | None = None,
    description: str = "measuring",
) -> Measured:
    """Predicts every image and counts.

    Args:
        model: In evaluation mode, on the device.
        dataset: Images and true classes.
        how: How images are looked at.
        device: Where the model is.
        change: What is done to an image before, by its number, such as a corruption.
        description: For the progress bar.

    Raises:
        MasksError: No pixel of any mask counts, or an image or a mask cannot be used.
    """
    counts, matrix = [], ConfusionMatrix(len(dataset.classes))
    with progress(description, len(dataset), unit="images") as shown:
        for index in range(len(dataset)):
            one = _count(model, dataset, index, how, device, change)
            counts.append(_shared_and_sizes(one))
            matrix += one
            shown.advance(note=f"mIoU {matrix.miou():.3f}")
    if not matrix.counts.any():
        raise MasksError(
            f"all pixels of the {len(dataset)} masks are ignored ({first_few(dataset.names)}): there is nothing to "
            "measure; name another split, or what is ignored"
        )
    return Measured(list(dataset.names), [str(group) for group in dataset.groups], np.stack(counts), matrix)


def validate(model: "Segmenter", dataset: "MaskDataset", how: Inference, world: "World") -> ConfusionMatrix:
    """The confusion matrix over all images, each process having looked at its share."""
    matrix = ConfusionMatrix(len(dataset.classes))
    for index in range(world.rank, len(dataset), world.size):
        matrix += _count(model, dataset, index, how, world.device, None)
    if world.size == 1:
        return matrix
    summed = world.reduce(torch.from_numpy(matrix.counts), dist.ReduceOp.SUM)
    return ConfusionMatrix(matrix.num_classes, summed.numpy())


def interval(per_image: np.ndarray, groups: Sequence[str], *, draws: int, seed: int) -> list[float] | None:
    """95 % interval of the mIoU by drawing groups with replacement; None where there are fewer than three.

    Args:
        per_image: As `Measured.per_image`.
        groups: Group of each image; all images of a group are drawn together.
        draws: Number of bootstrap samples.
        seed: Of the draws.
    """
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    if len(names) < 3:
        return None
    per_group = np.zeros((len(names), *per_image.shape[1:]), np.int64)
    np.add.at(per_group, members, per_image)
    rng = np.random.default_rng(seed)
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=draws)
    flat = (times @ per_group.reshape(len(names), -1)).reshape(draws, *per_image.shape[1:])
    mious = np.array([_miou(counts) for counts in flat])
    return [float(bound) for bound in np.nanpercentile(mious, [2.5, 97.5])]


def _count(
    model: "Segmenter",
    dataset: "MaskDataset",
    index: int,
    how: Inference,
    device: torch.device,
    change: Change | None,
) -> ConfusionMatrix:
    sample, matrix = dataset[index], ConfusionMatrix(len(dataset.classes))
    image = sample.image if change is None else change(sample.image, index)
    matrix.update(predict_classes(model, image, how, device), sample.mask)
    return matrix


def _shared_and_sizes(matrix: ConfusionMatrix) -> np.ndarray:
    """(C, 3): the diagonal, pixels of the truth, pixels of the prediction."""
    counts = matrix.counts
    return np.stack([np.diagonal(counts), counts.sum(axis=1), counts.sum(axis=0)], axis=1)


def _miou(counts: np.ndarray) -> float:
    shared, truth, said = counts.T.astype(float)
    union = truth + said - shared
    return float(np.mean(shared[union > 0] / union[union > 0])) if (union > 0).any() else float("nan")
