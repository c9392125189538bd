"""Pascal VOC and ADE20K, in small sets of their real layout: palettes, 255 at outlines, odd sizes, grey photographs."""

import numpy as np
import pytest
from PIL import Image

from dinoscope.errors import ConfigError, MasksError
from dinoscope.segment.ade20k import ADE20K_CLASSES
from dinoscope.segment.datasets import open_dataset
from dinoscope.segment.palettes import default_palette
from dinoscope.segment.voc import VOC_CLASSES

SIZES = ((37, 50), (64, 33), (21, 90), (48, 48))  # height, width


def outlined(height, width, values, rng):
    """Blocks of the values with outlines of 255 around, as VOC's masks have them."""
    mask = np.zeros((height, width), np.uint8)
    for value in values:
        top, left = rng.integers(0, height - 12), rng.integers(0, width - 12)
        mask[top : top + 12, left : left + 12] = 255
        mask[top + 2 : top + 10, left + 2 : left + 10] = value
    return mask


@pytest.fixture
def voc(tmp_path):
    """VOCdevkit/VOC2012 with three training images and one to validate on; every class is in the training masks."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["2007_000032", "2007_000039", "2011_003271", "2009_000001"]
    for number, (name, (height, width)) in enumerate(zip(names, SIZES, strict=True)):
        photograph = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
        Image.fromarray(photograph).save(root / f"JPEGImages/{name}.jpg", quality=95)
        values = outlined(height, width, [], rng)
        for place, value in enumerate(range(number * 7, number * 7 + 8)):
            values[4 : 6 + place % 3, 2 + 2 * place : 4 + 2 * place] = min(value, 20)
        values[8:10] = 255
        mask = Image.fromarray(values, "P")
        mask.putpalette(default_palette(256).tobytes())
        mask.save(root / f"SegmentationClass/{name}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("\n".join(names[:3]) + "\n")
    (root / "ImageSets/Segmentation/val.txt").write_text(names[3] + "\n")
    (root / "ImageSets/Segmentation/trainval.txt").write_text("\r\n".join(names) + "\r\n")
    return tmp_path


@pytest.mark.parametrize("below", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc_from_any_of_its_folders(voc, below):
    train, val = (open_dataset("voc", voc / below, split) for split in ("train", "val"))
    assert train.classes == VOC_CLASSES and len(VOC_CLASSES) == 21
    assert train.names == ["2007_000032", "2007_000039", "2011_003271"] and val.names == ["2009_000001"]
    assert (train.check() > 0).all()
    for data in (train, val):
        for index, sample in enumerate(data[i] for i in range(len(data))):
            path = voc / "VOCdevkit/VOC2012/SegmentationClass" / f"{sample.name}.png"
            with Image.open(path) as mask:
                assert mask.mode == "P"
                expected = np.asarray(mask)
                shown = np.asarray(mask.convert("RGB"))
            assert np.array_equal(sample.mask, expected) and (sample.mask == 255).any()
            assert sample.image.shape == (*SIZES[index + 3 * (data is val)], 3)
            labelled = sample.mask != 255
            assert np.array_equal(data.palette[sample.mask[labelled]], shown[labelled])


def test_the_palette_is_vocs():
    """Colours that VOC's documentation names."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 8: (64, 0, 0)}
    known |= {15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    palette = default_palette(256)
    assert {number: tuple(palette[number].tolist()) for number in known} == known
    assert len(np.unique(palette, axis=0)) == 256


def test_other_lists_of_voc(voc):
    assert len(open_dataset("voc", voc, "train", train_list="trainval")) == 4
    with pytest.raises(ConfigError, match=r"no list .*train_aug\.txt: there are train, trainval, val"):
        open_dataset("voc", voc, "train", train_list="train_aug")
    with pytest.raises(ConfigError, match=r"test\.txt"):
        open_dataset("voc", voc, "test")
    with pytest.raises(MasksError, match="no JPEGImages in VOC2007"):
        open_dataset("voc", voc, "train", year="2007")


def test_damaged_voc(voc):
    root = voc / "VOCdevkit/VOC2012"
    (root / "SegmentationClass/2007_000032.png").unlink()
    (root / "JPEGImages/2011_003271.jpg").unlink()
    with (root / "ImageSets/Segmentation/train.txt").open("a") as file:
        file.write("2007_000039\n")
    with pytest.raises(MasksError) as error:
        open_dataset("voc", voc, "train")
    for part in (
        "images that are missing: 1 (JPEGImages/2011_003271.jpg)",
        "masks that are missing: 1 (SegmentationClass/2007_000032.png)",
        "names that stand twice: 1 (2007_000039)",
    ):
        assert part in str(error.value)
    Image.fromarray(np.full((48, 48), 21, np.uint8)).save(root / "SegmentationClass/2009_000001.png")
    with pytest.raises(MasksError, match=r"SegmentationClass/2009_000001.png: value 21"):
        open_dataset("voc", voc, "val").check(allow_empty=True)


def test_a_set_for_detection_is_none_for_segmentation(shared):
    with pytest.raises(ConfigError, match="there is no ImageSets/Segmentation, as in a set for detection"):
        open_dataset("voc", shared / "data/seg/bccd_voc", "train")


@pytest.fixture
def ade20k(tmp_path):
    """ADEChallengeData2016 with two training images, one of them grey, and one to validate on."""
    root = tmp_path / "ADEChallengeData2016"
    rng = np.random.default_rng(1)
    for part, name, (height, width), mode in (
        ("training", "ADE_train_00000001", SIZES[0], "RGB"),
        ("training", "ADE_train_00000002", SIZES[1], "L"),
        ("validation", "ADE_val_00000001", SIZES[2], "RGB"),
    ):
        for folder in ("images", "annotations"):
            (root / folder / part).mkdir(parents=True, exist_ok=True)
        photograph = Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).convert(mode)
        photograph.save(root / f"images/{part}/{name}.jpg")
        mask = np.arange(height * width).reshape(height, width) % 151
        Image.fromarray(mask.astype(np.uint8)).save(root / f"annotations/{part}/{name}.png")
    return tmp_path


@pytest.mark.parametrize("below", ["", "ADEChallengeData2016"])
def test_ade20k(ade20k, below):
    train, val = (open_dataset("ade20k", ade20k / below, split) for split in ("train", "val"))
    assert train.names == ["ADE_train_00000001", "ADE_train_00000002"] and val.names == ["ADE_val_00000001"]
    assert (train.check() > 0).all() and len(train.check()) == 150
    height, width = SIZES[1]
    stored = np.arange(height * width).reshape(height, width) % 151
    sample = train[1]
    assert np.array_equal(sample.mask, np.where(stored == 0, 255, stored - 1))
    assert sample.image.shape == (height, width, 3)
    assert (sample.image == sample.image[..., :1]).all()


def test_classes_of_ade20k():
    """Numbers as in objectInfo150.txt of the archive, less one; no name stands for two classes."""
    assert len(set(ADE20K_CLASSES)) == 150
    known = {1: "wall", 3: "sky", 13: "person", 21: "car", 42: "box", 59: "screen door", 77: "boat", 100: "buffet"}
    known |= {115: "tent", 128: "bicycle", 131: "screen", 142: "crt screen", 150: "flag"}
    assert {number: ADE20K_CLASSES[number - 1] for number in known} == known
    assert len(np.unique(default_palette(151)[1:], axis=0)) == 150


def test_damaged_ade20k(ade20k):
    root = ade20k / "ADEChallengeData2016"
    (root / "annotations/training/ADE_train_00000002.png").unlink()
    (root / "images/training/ADE_train_00000001.jpg").unlink()
    with pytest.raises(MasksError) as error:
        open_dataset("ade20k", root, "train")
    assert "images without a mask: 1 (images/training/ADE_train_00000002.jpg)" in str(error.value)
    assert "masks without an image: 1 (annotations/training/ADE_train_00000001.png)" in str(error.value)
    Image.fromarray(np.full(SIZES[2], 151, np.uint8)).save(root / "annotations/validation/ADE_val_00000001.png")
    with pytest.raises(MasksError, match=r"ADE_val_00000001\.png has value 151"):
        open_dataset("ade20k", root, "val")[0]
    with pytest.raises(ConfigError, match="no split 'test' with masks"):
        open_dataset("ade20k", root, "test")
    with pytest.raises(MasksError, match="is no ADEChallengeData2016"):
        open_dataset("ade20k", root / "images", "train")
