"""What a segmenter is trained with: cross-entropy, and a Dice term on request.

Both are returned as sums with what they are to be divided by, so that several processes come to the mean over all
pixels and images of a step, as one process with the whole batch would.

Shapes: B images, C classes, H and W pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dinoscope.segment.metrics import IGNORED

__all__ = ["LossSums", "loss_sums"]


class LossSums(NamedTuple):
    """Sums over the images of this process.

    Attributes:
        cross_entropy: Over pixels, each by the weight of its class.
        pixels: The weights of these pixels together.
        dice: Over images: one minus the mean Dice of the classes that the truth has.
        images: Number of images with a pixel that counts.
    """

    cross_entropy: Tensor
    pixels: Tensor
    dice: Tensor
    images: Tensor


def loss_sums(logits: Tensor, masks: Tensor, class_weights: Tensor | None, *, with_dice: bool) -> LossSums:
    """Sums of the losses of a batch.

    Args:
        logits: (B, C, H, W); taken in float32.
        masks: (B, H, W) int64, `IGNORED` where nothing is asked.
        class_weights: (C,), or None for equal ones.
        with_dice: Whether the Dice term is wanted; else it is zero.
    """
    logits, valid = logits.float(), masks != IGNORED
    cross_entropy = F.cross_entropy(logits, masks, class_weights, ignore_index=IGNORED, reduction="sum")
    weights = valid.float() if class_weights is None else class_weights[masks.clamp(max=len(class_weights) - 1)] * valid
    dice = _dice_losses(logits, masks, valid).sum() if with_dice else logits.new_zeros(())
    return LossSums(cross_entropy, weights.sum(), dice, valid.flatten(1).any(1).sum())


def _dice_losses(logits: Tensor, masks: Tensor, valid: Tensor) -> Tensor:
    """(B,): one minus the mean soft Dice (V-Net, arXiv:1606.04797) of the classes in each image's truth."""
    num_classes = logits.shape[1]
    truth = masks[:, None] == torch.arange(num_classes, device=masks.device)[:, None, None]  # nowhere where ignored
    said = logits.softmax(1) * valid[:, None]
    shared, sizes = (said * truth).sum((2, 3)), said.sum((2, 3)) + truth.sum((2, 3))
    present = truth.sum((2, 3)) > 0
    dice = 2 * shared / sizes.clamp(min=1e-6)
    return (present * (1 - dice)).sum(1) / present.sum(1).clamp(min=1)
