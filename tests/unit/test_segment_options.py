"""Options of users: kinds of values, and what cannot be meant."""

import pytest

from dinoscope.errors import ConfigError
from dinoscope.segment.datasets import dataset_settings
from dinoscope.segment.engine import view_settings
from dinoscope.segment.inference import Inference
from dinoscope.segment.settings import TrainSettings


@pytest.mark.parametrize(
    ("kind", "options", "sentence"),
    [
        ("folder", {"val_fraction": "half"}, "folder: val_fraction is 'half'; a number is wanted"),
        ("folder", {"seed": 1.5}, r"seed is 1\.5; a whole number is wanted"),
        ("folder", {"seed": True}, "seed is True; a whole number is wanted"),
        ("folder", {"instance": 3.5}, r"instance is 3\.5; true or false or a text is wanted"),
        ("folder", {"class_map": ["a", "b"]}, "class_map is .*; a mapping {key: value} or nothing is wanted"),
        ("slides", {"skip_unannotated": "yes"}, "skip_unannotated is 'yes'; true or false is wanted"),
        ("voc", {"masks": None}, "voc: masks is None; a text is wanted"),
    ],
)
def test_values_of_other_kinds_are_refused(kind, options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        dataset_settings(kind, options)


def test_values_that_yaml_reads_as_numbers_are_taken():
    assert dataset_settings("voc", {"year": 2007}).year == "2007"
    taken = dataset_settings("folder", {"val_fraction": 0, "groups": None, "instance": True, "class_map": {0: "a"}})
    assert (taken.val_fraction, taken.groups, taken.instance, taken.class_map) == (0, None, True, {0: "a"})


@pytest.mark.parametrize(
    ("augmentation", "sentence"),
    [
        ({"scale": 2}, r"augmentation\.scale is 2; \[a number, a number\] is wanted"),
        ({"scale": [0, 1]}, r"augmentation\.scale is \(0, 1\); two numbers above 0, the lower one first is wanted"),
        ({"scale": [2, 1]}, "the lower one first"),
        ({"scale_of": "world"}, "scale_of is 'world'; pixels or image is wanted"),
        ({"hed_p": 2}, "hed_p is 2; a probability from 0 to 1 is wanted"),
        ({"hed_p": "1e-1"}, "hed_p is '1e-1'; a number is wanted"),
        ({"fill": [1, 2]}, "fill is"),
        ({"brightness": -1}, "brightness is -1; 0 or more is wanted"),
        ({"rotations_90": 1}, "rotations_90 is 1; true or false is wanted"),
    ],
)
def test_views_that_cannot_be_meant_are_refused(augmentation, sentence):
    with pytest.raises(ConfigError, match=sentence):
        view_settings(TrainSettings(augmentation=augmentation))


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": -1.0},
        {"warmup_epochs": -1.0},
        {"min_lr": 1.5},
        {"last_n": 0},
        {"dice_weight": float("nan")},
        {"class_weights": (1.0, -1.0)},
        {"class_weights": (0.0, 0.0)},
        {"class_weights": (1.0, float("nan"))},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} is"):
        TrainSettings(**settings)


@pytest.mark.parametrize("settings", [{"overlap": 1.0}, {"overlap": -0.1}, {"batch_size": 0}])
def test_windows_that_cannot_be_laid_are_refused(settings):
    with pytest.raises(ConfigError, match=f"{next(iter(settings))} is"):
        Inference((16, 16), **settings)


def test_a_class_needs_a_name():
    from dinoscope.segment.folders import class_table

    for name in (None, False, 1.5):
        with pytest.raises(ConfigError, match=f"class_map: the class of 1 is {name}; write a name"):
            class_table({0: "background", 1: name})
