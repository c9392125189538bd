"""The segmentation losses against torch's means and formulas written out."""

import pytest
import torch
import torch.nn.functional as F

from dinoscope.segment.losses import loss_sums

IGNORED = 255


def batch(seed=0, images=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, classes, 6, 7, generator=generator)
    masks = torch.randint(0, classes, (images, 6, 7), generator=generator)
    masks[0, :3] = IGNORED
    masks[1] = IGNORED
    return logits, masks


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 0.2, 3.0, 0.0])])
def test_cross_entropy_is_torchs_mean(weights):
    logits, masks = batch()
    sums = loss_sums(logits, masks, weights, with_dice=False)
    expected = F.cross_entropy(logits, masks, weights, ignore_index=IGNORED)
    torch.testing.assert_close(sums.cross_entropy / sums.pixels, expected)
    assert sums.dice == 0


def test_dice_is_the_formula_of_each_image():
    logits, masks = batch()
    sums = loss_sums(logits, masks, None, with_dice=True)
    losses = []
    for scores, truth in zip(logits.double(), masks, strict=True):
        valid = truth != IGNORED
        if not valid.any():
            continue
        said = scores.softmax(0)[:, valid]
        dices = []
        for index in truth[valid].unique():
            true = (truth[valid] == index).double()
            dices.append(2 * (said[index] * true).sum() / (said[index].sum() + true.sum()))
        losses.append(1 - torch.stack(dices).mean())
    assert sums.images == len(losses) == 4
    torch.testing.assert_close(sums.dice.double(), torch.stack(losses).sum(), rtol=1e-6, atol=1e-6)


def test_sums_of_parts_are_the_sums_of_the_whole():
    logits, masks = batch()
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    whole = loss_sums(logits, masks, weights, with_dice=True)
    parts = [loss_sums(logits[part], masks[part], weights, with_dice=True) for part in (slice(2), slice(2, None))]
    for total, *pieces in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(pieces), total)


def test_ignored_pixels_have_no_gradient():
    logits, masks = batch()
    logits.requires_grad_()
    sums = loss_sums(logits, masks, None, with_dice=True)
    (sums.cross_entropy + sums.dice).backward()
    assert not logits.grad[:, :, :][masks[:, None].expand_as(logits) == IGNORED].any()
    assert logits.grad[2].all()
