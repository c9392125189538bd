"""What a step sees, its rate, its optimizer, its class weights."""

from collections import Counter

import numpy as np
import pytest
import torch

from dinoscope.errors import ConfigError, MasksError
from dinoscope.segment.datasets import open_dataset
from dinoscope.segment.engine import (
    TrainingViews,
    class_weights_of,
    images_of_step,
    learning_rate_factor,
    make_loader,
    make_optimizer,
    num_steps_of_epoch,
    view_settings,
)
from dinoscope.segment.robustness import drop_of, means_of
from dinoscope.segment.runs import _like
from dinoscope.segment.settings import TrainSettings
from dinoscope.segment.transforms import VIEWS
from dinoscope.train.distributed import World
from segmentation_samples import ALONE, OPTIONS, QUICK, fresh_segmenter, write_discs


@pytest.mark.parametrize(("images", "batch"), [(10, 4), (3, 8), (7, 7), (1, 2)])
def test_each_pass_takes_every_image_once(images, batch):
    passes = 8
    drawn = [each for step in range(passes * images // batch) for each in images_of_step(step, images, batch, 5)]
    complete = Counter(number for number, _ in drawn)
    for number, count in complete.items():
        if count == images:
            assert sorted(index for n, index in drawn if n == number) == list(range(images))
    assert sum(count == images for count in complete.values()) >= passes - 2
    orders = [tuple(index for n, index in drawn if n == number) for number in range(passes - 2)]
    assert images < 4 or len(set(orders)) > 1
    assert images_of_step(3, images, batch, 5) == images_of_step(3, images, batch, 5)


@pytest.mark.parametrize(("images", "batch", "steps"), [(16, 4, 4), (10, 4, 2), (3, 8, 1), (11, 4, 3)])
def test_an_epoch_is_a_pass_rounded(images, batch, steps):
    assert num_steps_of_epoch(images, batch) == steps


def test_the_rate_rises_and_falls_along_a_cosine():
    factors = [learning_rate_factor(step, 100, 10, 0.1) for step in range(100)]
    np.testing.assert_allclose(factors[:10], np.arange(1, 11) / 10)
    expected = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(90) / 90)) / 2
    np.testing.assert_allclose(factors[10:], expected)
    assert learning_rate_factor(0, 10, 0, 0.0) == 1.0


def test_processes_share_what_one_sees(tmp_path):
    data = open_dataset("folder", write_discs(tmp_path / "discs"), "train", **OPTIONS)
    settings = TrainSettings(**QUICK)
    views = TrainingViews(data, settings)

    def batches(rank, size, workers=0, steps=range(3)):
        world = World(rank, rank, size, torch.device("cpu"))
        return list(make_loader(views, steps, len(data), settings, world, workers))

    whole = batches(0, 1)
    for images, masks in whole:
        assert images.shape == (4, 48, 64, 3)
        assert images.dtype == torch.uint8
        assert masks.dtype == torch.int64
    halves = batches(0, 2), batches(1, 2)
    for kind in (0, 1):
        for step in range(3):
            joined = torch.empty_like(whole[step][kind])
            joined[0::2], joined[1::2] = halves[0][step][kind], halves[1][step][kind]
            assert torch.equal(joined, whole[step][kind])
    again = batches(0, 1, workers=2, steps=range(1, 3))
    assert all(
        torch.equal(a, b) for one, two in zip(whole[1:], again, strict=True) for a, b in zip(one, two, strict=True)
    )
    assert not torch.equal(whole[0][0], whole[1][0])


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    data = open_dataset("folder", write_discs(tmp_path / "discs"), "train", **OPTIONS)
    settings = TrainSettings(**QUICK)
    with pytest.raises(ConfigError, match=r"batch_size 4 .* cannot be shared by 3 processes; give a multiple of 3"):
        next(make_loader(TrainingViews(data, settings), range(1), 6, settings, World(0, 0, 3, torch.device("cpu")), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, workers):
    root = write_discs(tmp_path / "discs")
    (root / "images" / "d03.png").write_bytes(b"nothing")
    data, settings = open_dataset("folder", root, "train", **OPTIONS), TrainSettings(**QUICK)
    with pytest.raises(MasksError, match=r"d03\.png"):
        list(make_loader(TrainingViews(data, settings), range(2), len(data), settings, ALONE, workers))


def test_decoder_and_vectors_have_rates_and_decay_of_their_own(tmp_path):
    settings = TrainSettings(**QUICK | {"decoder_lr": 1e-2})
    model = fresh_segmenter(tmp_path, settings)
    groups = make_optimizer(model, settings).param_groups
    found = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in groups}
    assert found == {(3e-3, 0.01): 4 * 2 * 2, (1e-2, 0.01): 1, (1e-2, 0.0): 1}
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.trainable_parameters()}


def test_balanced_weights_make_classes_weigh_the_same(tmp_path):
    data = open_dataset("folder", write_discs(tmp_path / "discs"), "train", **OPTIONS)
    weights = class_weights_of(data, "balanced").numpy()
    pixels = data.check()
    np.testing.assert_allclose(weights[0] * pixels[0], weights[1] * pixels[1], rtol=1e-5)
    np.testing.assert_allclose((weights * pixels).sum() / pixels.sum(), 1, rtol=1e-5)
    assert class_weights_of(data, None) is None
    assert class_weights_of(data, (1, 4)).tolist() == [1.0, 4.0]
    with pytest.raises(ConfigError, match=r"class_weights has 3 numbers, but there are 2 classes"):
        class_weights_of(data, (1, 2, 3))


def test_views_are_named_and_changed():
    assert view_settings(TrainSettings(views="photographs")) == VIEWS["photographs"]
    changed = view_settings(TrainSettings(augmentation={"scale": [1, 1], "hed_p": 0}))
    assert (changed.scale, changed.hed_p, changed.vertical_flips) == ((1, 1), 0, True)
    with pytest.raises(ConfigError, match=r"augmentation\.hed_prob is unknown"):
        view_settings(TrainSettings(augmentation={"hed_prob": 0}))
    with pytest.raises(ConfigError, match="views is 'photo'; choose from photographs, pathology"):
        view_settings(TrainSettings(views="photo"))


def test_the_seal_tells_no_place_of_annotated_slides():
    data = {"slides": "/home/somebody/slides.tsv", "annotations": "/home/somebody/outlines", "class_map": {"T": "t"}}
    assert TrainSettings(dataset="slides", data=data).as_dict()["data"] == {"class_map": {"T": "t"}}


def test_a_start_says_which_blocks_it_trains(tmp_path):
    settings = TrainSettings(**QUICK | {"trainable": "last_n", "last_n": 2})
    model = fresh_segmenter(tmp_path, settings)
    assert _like(TrainSettings(**QUICK), model, 2, tmp_path) == settings


def test_what_was_never_right_cannot_drop():
    rows = [{"kind": "fog", "severity": 5, "miou": 0.0}]
    assert means_of(rows, 0.0)["relative_drop"] is None
    assert means_of(rows, 0.5) | {"pathology_miou_level_5": 0} == {
        "miou_level_5": 0.0,
        "relative_drop": 1.0,
        "pathology_miou_level_5": 0,
        "pathology_relative_drop": None,
    }
    assert (drop_of(0.2, 0.8), drop_of(0.2, 0.0)) == (pytest.approx(0.75), None)
