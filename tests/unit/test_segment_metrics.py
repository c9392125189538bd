"""Measures of segmentation, against scikit-learn and counts written out."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, jaccard_score

from dinoscope.segment.metrics import ConfusionMatrix


def drawn(num_classes, shape, seed, ignored=0.1):
    """A truth with ignored pixels, and a prediction that is right in about half of them."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes, shape)
    pred = np.where(rng.random(shape) < 0.5, truth, rng.integers(0, num_classes, shape))
    return pred, np.where(rng.random(shape) < ignored, 255, truth).astype(np.uint8)


@pytest.mark.parametrize("num_classes", [2, 5, 150])
def test_measures_are_scikit_learns(num_classes):
    pred, truth = drawn(num_classes, (3, 60, 70), num_classes)
    matrix = ConfusionMatrix(num_classes)
    for one_pred, one_truth in zip(pred, truth, strict=True):
        matrix.update(one_pred, one_truth)
    counted, labels = truth != 255, np.arange(num_classes)
    expected = truth[counted], pred[counted]
    assert np.array_equal(matrix.counts, confusion_matrix(*expected, labels=labels))
    np.testing.assert_allclose(matrix.iou(), jaccard_score(*expected, labels=labels, average=None), rtol=1e-12)
    np.testing.assert_allclose(matrix.dice(), f1_score(*expected, labels=labels, average=None), rtol=1e-12)
    assert matrix.miou() == pytest.approx(jaccard_score(*expected, labels=labels, average="macro"), rel=1e-12)
    assert matrix.mean_dice() == pytest.approx(f1_score(*expected, labels=labels, average="macro"), rel=1e-12)
    assert matrix.pixel_accuracy() == pytest.approx(accuracy_score(*expected), rel=1e-12)


def test_a_set_is_measured_at_once_and_not_by_the_mean_of_its_batches():
    # class 1: 1 of 1 pixels found in the first image, 0 of 9 in the second
    first, second = ConfusionMatrix(2), ConfusionMatrix(2)
    first.update(np.array([0] * 9 + [1]), np.array([0] * 9 + [1]))
    second.update(np.array([0] * 10), np.array([0] + [1] * 9))
    whole = sum([first, second])
    np.testing.assert_allclose(whole.iou(), [10 / 19, 1 / 10])
    assert abs((first.iou()[1] + second.iou()[1]) / 2 - whole.iou()[1]) > 0.3
    assert first.counts[1, 1] == 1  # adding changed neither


def test_a_class_that_is_nowhere_counts_for_nothing():
    matrix = ConfusionMatrix(4)
    matrix.update(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 255]))
    assert np.isnan(matrix.iou()[2:]).all() and matrix.miou() == 1
    matrix.update(np.array([3]), np.array([0]))  # predicted, though never true: 0
    np.testing.assert_allclose(matrix.iou(), [2 / 3, 1, np.nan, 0])
    assert matrix.miou() == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_nothing_counted_is_nan_without_a_warning():
    matrix = ConfusionMatrix(2)
    matrix.update(np.zeros((2, 2), int), np.full((2, 2), 255))
    assert np.isnan([matrix.miou(), matrix.mean_dice(), matrix.pixel_accuracy()]).all()
    assert matrix.summary()["miou"] is None
    assert matrix.summary()["iou_per_class"] == [None, None]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_tensors_and_arrays_are_counted_alike(dtype):
    pred, truth = drawn(7, (2, 33, 20), 0)
    of_arrays, of_tensors = ConfusionMatrix(7), ConfusionMatrix(7)
    truth.flags.writeable = False
    of_arrays.update(pred, truth)
    of_tensors.update(torch.from_numpy(pred).to(dtype), torch.from_numpy(truth.copy()))
    assert np.array_equal(of_arrays.counts, of_tensors.counts)


@pytest.mark.parametrize(("pred", "truth"), [([3], [0]), ([-1], [1]), ([0], [3]), ([0, 1], [0])])
def test_what_is_no_class_or_no_pair_is_our_own_mistake(pred, truth):
    with pytest.raises(AssertionError):
        ConfusionMatrix(3).update(np.array(pred), np.array(truth))


# of torchmetrics 1.9.0 (MulticlassJaccardIndex, MulticlassF1Score: macro; MulticlassAccuracy: micro; ignore_index 255),
# which computes in float32, on the images drawn below
TORCHMETRICS = {
    2: (0.5984984040260315, 0.7488257884979248, 0.7488257884979248),
    5: (0.43212562799453735, 0.6034674644470215, 0.6034712791442871),
    21: (0.34986916184425354, 0.5182669162750244, 0.518420934677124),
    150: (0.333571195602417, 0.49964889883995056, 0.500288724899292),
}


@pytest.mark.parametrize("num_classes", TORCHMETRICS)
def test_measures_are_torchmetrics(num_classes):
    rng = np.random.default_rng(num_classes)
    truth = rng.integers(0, num_classes, (6, 64, 80))
    pred = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(0, num_classes, truth.shape))
    truth = np.where(rng.random(truth.shape) < 0.1, 255, truth)
    matrix = ConfusionMatrix(num_classes)
    for one_pred, one_truth in zip(pred, truth, strict=True):
        matrix.update(one_pred, one_truth)
    measures = matrix.miou(), matrix.mean_dice(), matrix.pixel_accuracy()
    assert measures == pytest.approx(TORCHMETRICS[num_classes], rel=1e-6)
