"""Windows over images: what they cover, and that a model without context says the same however they lie."""

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from dinoscope.segment.inference import Inference, predict_logits, window_starts, window_weights

CPU = torch.device("cpu")


class Pointwise(nn.Module):
    """Stands for a segmenter that looks at one pixel at a time; counts its windows."""

    def __init__(self):
        super().__init__()
        self.map = nn.Conv2d(3, 4, 1)
        self.seen = []

    def normalised(self, images):
        return images.permute(0, 3, 1, 2).float() / 255

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return self.map(images)


def image_of(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("stride", [1, 8, 12, 16])
@pytest.mark.parametrize("length", [10, 16, 17, 31, 32, 33, 100])
def test_windows_cover_a_side_with_the_overlap(length, stride):
    starts = window_starts(length, 16, stride)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - 16)
    steps = np.diff(starts)
    assert (steps > 0).all()
    assert (steps <= stride).all()
    assert len(starts) == -(-max(0, length - 16) // stride) + 1


@pytest.mark.parametrize("size", [(16, 24), (41, 50), (16, 70), (9, 13), (5, 90)])
def test_windows_give_what_the_whole_image_gives(size):
    model, image = Pointwise(), image_of(*size)
    with torch.no_grad():
        expected = model.map(model.normalised(torch.from_numpy(image)[None]))[0]
    model.seen.clear()
    logits = predict_logits(model, image, Inference((16, 24), overlap=0.3, batch_size=3), CPU)
    torch.testing.assert_close(logits, expected)
    assert {shape[-2:] for shape in model.seen} == {(16, 24)}
    assert max(shape[0] for shape in model.seen) <= 3


def test_weights_are_one_in_the_middle_and_never_zero():
    weights = window_weights((16, 12), (4, 6))
    assert weights.shape == (16, 12)
    assert weights.min() > 0
    assert (weights[4:-4, 5:7] > 0.9).all()
    assert np.array_equal(weights, weights[::-1])
    assert np.array_equal(weights, weights[:, ::-1])
    column = window_weights((16, 12), (4, 0))[:, 3]
    assert column[-4:] + column[:4] == pytest.approx(1)  # the ramps of two neighbours add to one
    assert (window_weights((8, 8), (0, 0)) == 1).all()


def test_overlapping_windows_are_averaged_by_their_weights():
    class Numbered(Pointwise):
        def forward(self, images):
            values = torch.arange(1.0, 1 + len(images))
            return values[:, None, None, None].expand(-1, 2, *images.shape[-2:])

    logits = predict_logits(Numbered(), image_of(8, 12), Inference((8, 8), overlap=0.5), CPU)
    np.testing.assert_allclose(logits[0, 0].numpy(), [1] * 4 + [1.125, 1.375, 1.625, 1.875] + [2] * 4)


def test_resizing_is_there_and_back():
    model, image = Pointwise(), image_of(40, 60)
    logits = predict_logits(model, image, Inference((16, 16), mode="resize"), CPU)
    assert model.seen == [(1, 3, 16, 16)]
    small = cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA)
    with torch.no_grad():
        there = model.map(model.normalised(torch.from_numpy(small)[None]))
    back = torch.nn.functional.interpolate(there, (40, 60), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(logits, back)
