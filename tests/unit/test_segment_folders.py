"""Folders of images and masks: what is read, how it is split, and what is said of broken ones."""

import pickle
import re

import cv2
import numpy as np
import pytest
from PIL import Image

from dinoscope.errors import ConfigError, MasksError
from dinoscope.segment.datasets import open_dataset

TWO = {0: "background", 1: "tumour"}


def picture(path, values, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values))
    (image.convert(mode) if mode else image).save(path)


def opened(path):
    """A picture that is read and closed."""
    with Image.open(path) as image:
        image.load()
        return image


def write_folder(root, stems, height=20, width=30, values=(0, 1)):
    """Images and masks whose pixels are drawn from `values`."""
    for number, stem in enumerate(stems):
        rng = np.random.default_rng(number)
        picture(root / "images" / f"{stem}.png", rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        picture(root / "masks" / f"{stem}.png", rng.choice(np.array(values, np.uint8), (height, width)))
    return root


def everything(root, **options):
    return open_dataset("folder", root, "train", val_fraction=0, **options)


# ---- real data


def test_real_instance_maps_become_foreground(shared):
    root = shared / "data/seg/dsb2018_histology"
    splits = {split: open_dataset("folder", root, split, instance="nucleus") for split in ("train", "val")}
    assert {split: len(data) for split, data in splits.items()} == {"train": 32, "val": 8}
    assert not set(splits["train"].names) & set(splits["val"].names)
    data = splits["val"]
    assert data.classes == ("background", "nucleus")
    pixels = data.check()
    counted = np.zeros(2, np.int64)
    for index, sample in enumerate(data[i] for i in range(len(data))):
        assert sample.image.shape == (256, 320, 3) and sample.mask.shape == (256, 320)
        assert sample.image.dtype == sample.mask.dtype == np.uint8
        assert sample.name == data.names[index]
        instances = np.asarray(opened(root / "masks" / f"{sample.name}.png"))
        assert instances.max() > 1
        assert np.array_equal(sample.mask, instances > 0)
        image, mask = data.files(index)
        assert image == data.image_path(index) and mask == root / "masks" / f"{sample.name}.png"
        assert np.array_equal(sample.image, np.asarray(opened(image))[..., :3])
        counted += np.bincount(sample.mask.ravel(), minlength=2)
    assert np.array_equal(pixels, counted) and pixels.min() > 0


# ---- kinds of files


def test_values_become_classes_in_the_order_of_the_map(tmp_path):
    write_folder(tmp_path, ["a"], values=(0, 7, 9, 200))
    data = everything(tmp_path, class_map={7: "tumour", "0": "background", 9: "tumour", 200: "ignore"})
    assert data.classes == ("tumour", "background")
    values = np.asarray(opened(tmp_path / "masks/a.png"))
    expected = np.select([values == 0, values == 200], [1, 255], 0)
    assert np.array_equal(data[0].mask, expected)
    assert data.check().tolist() == [(expected == 0).sum(), (expected == 1).sum()]


@pytest.mark.parametrize("mode", ["L", "P", "1", "I", "I;16", "F", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_masks_of_any_kind(tmp_path, mode, suffix):
    if suffix == ".png" and mode in ("I", "F"):
        suffix = ".tiff"  # PNG has neither
    write_folder(tmp_path, ["a"])
    values = np.asarray(opened(tmp_path / "masks/a.png"))
    (tmp_path / "masks/a.png").unlink()
    if mode == "1":
        mask = Image.fromarray(values > 0)
    elif mode == "P":
        mask = Image.fromarray(values, "L")
        mask.putpalette(bytes(range(255, -1, -1)) * 3)
    elif mode == "I;16":
        mask = Image.fromarray(values.astype(np.uint16))
    else:
        mask = Image.fromarray(values).convert(mode)
    if mode.endswith("A"):
        mask.putalpha(Image.fromarray((values * 99).astype(np.uint8)))
    mask.save(tmp_path / "masks" / f"a{suffix}")
    assert opened(tmp_path / "masks" / f"a{suffix}").mode == mode
    assert np.array_equal(everything(tmp_path, class_map=TWO)[0].mask, values)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "CMYK"])
def test_images_of_any_kind_without_their_alpha(tmp_path, mode):
    write_folder(tmp_path, ["a"])
    image = opened(tmp_path / "images/a.png").convert(mode.replace("A", ""))
    colours = np.asarray(image.convert("RGB"))
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(np.tile(np.arange(30, dtype=np.uint8), (20, 1))))
    (tmp_path / "images/a.png").unlink()
    image.save(tmp_path / "images/a.tif")
    assert np.array_equal(everything(tmp_path, class_map=TWO)[0].image, colours)


def test_instance_maps_above_a_byte_and_with_names(tmp_path):
    write_folder(tmp_path, ["a"])
    instances = np.zeros((20, 30), np.uint16)
    instances[2:5, 3:9], instances[7:9, 1:4] = 256, 65535
    picture(tmp_path / "masks/a.png", instances)
    data = everything(tmp_path, instance=True)
    assert data.classes == ("background", "foreground")
    assert np.array_equal(data[0].mask, instances > 0)


def test_folders_and_suffixes_of_other_names(tmp_path):
    write_folder(tmp_path, ["a", "b"])
    (tmp_path / "masks").rename(tmp_path / "labels")
    for stem in "ab":
        (tmp_path / f"labels/{stem}.png").rename(tmp_path / f"labels/{stem}_seg.png")
    (tmp_path / "labels/notes.txt").write_text("not a picture")
    data = everything(tmp_path, class_map=TWO, masks="labels", mask_suffix="_seg")
    assert data.names == ["a", "b"] and data[1].mask.shape == (20, 30)


def test_palettes(tmp_path):
    write_folder(tmp_path, ["a"])
    palette = everything(tmp_path, class_map=TWO, palette={"tumour": "#ff8000"}).palette
    assert palette.tolist() == [[0, 0, 0], [255, 128, 0]]
    for wrong in ({"stroma": "#000000"}, {"tumour": "red"}, {"tumour": [1, 2]}, {"tumour": [0, 0, 256]}):
        with pytest.raises(ConfigError, match="palette"):
            everything(tmp_path, class_map=TWO, palette=wrong)


def test_data_sets_go_to_other_processes(tmp_path):
    data = everything(write_folder(tmp_path, ["a"]), class_map=TWO)
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again[0].mask, data[0].mask) and again.names == data.names


# ---- splits


def test_a_table_of_splits_is_followed(tmp_path):
    write_folder(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "splits.tsv").write_text("name\tsplit\tcase\na.png\ttrain\t1\nb\tval\t2\nc\ttest\t3\n")
    opened = {
        split: open_dataset("folder", tmp_path, split, class_map=TWO, groups="case")
        for split in ("train", "val", "test")
    }
    assert [data.names + data.groups for data in opened.values()] == [["a", "1"], ["b", "2"], ["c", "3"]]


def test_drawn_splits_keep_groups_together_and_move_few(tmp_path):
    stems = [f"case{case:02}_{tile}" for case in range(20) for tile in range(3)]
    write_folder(tmp_path, stems)

    def split_of(seed=0):
        options = {"class_map": TWO, "groups": r"(case\d+)_", "val_fraction": 0.25, "test_fraction": 0.1, "seed": seed}
        opened = {split: open_dataset("folder", tmp_path, split, **options) for split in ("train", "val", "test")}
        for data in opened.values():
            assert data.groups == [name[:6] for name in data.names]
        return {name: split for split, data in opened.items() for name in data.names}

    first = split_of()
    assert set(first) == set(stems) and first == split_of() and first != split_of(seed=1)
    of_cases = {(name[:6], split) for name, split in first.items()}
    assert len(of_cases) == 20
    assert [sum(split == kind for _, split in of_cases) for kind in ("train", "val", "test")] == [13, 5, 2]
    for tile in range(3):
        (tmp_path / f"images/case07_{tile}.png").unlink()
        (tmp_path / f"masks/case07_{tile}.png").unlink()
    after = split_of()
    moved = {name[:6] for name in after if after[name] != first[name]}
    assert len(moved) <= 2


# ---- what is wrong


def refused(kind, root, split="train", **options):
    with pytest.raises(kind) as error:
        data = open_dataset("folder", root, split, **{"val_fraction": 0, "class_map": TWO} | options)
        data.check()
    message = str(error.value)
    assert "\n" not in message
    return message


def test_every_problem_of_the_files_is_named_at_once(tmp_path):
    write_folder(tmp_path, [f"m{number}" for number in range(12)])
    picture(tmp_path / "masks/m1.png", np.zeros((19, 30), np.uint8))
    for number in range(2, 10):
        picture(tmp_path / f"masks/m{number}.png", np.full((20, 30), 3, np.uint8))
    (tmp_path / "masks/m10.png").write_bytes((tmp_path / "masks/m10.png").read_bytes()[:60])
    picture(tmp_path / "masks/m11.png", np.random.default_rng(0).integers(0, 2, (20, 30, 3)).astype(np.uint8))
    message = refused(MasksError, tmp_path)
    assert (
        "masks of another size than their image: 1 (images/m1.png is 30 x 20 and its mask masks/m1.png 30 x 19"
        in message
    )
    assert "masks with values that are no class: 8 (masks/m2.png: value 3, masks/m3.png: value 3" in message
    assert "m6.png: value 3, and 3 more" in message and "m7.png" not in message
    assert "files that cannot be used: 2 (" in message and "m10.png cannot be read" in message
    assert "m11.png is a colour picture" in message


def test_one_sample_says_the_same(tmp_path):
    write_folder(tmp_path, ["a", "b", "c"])
    picture(tmp_path / "masks/a.png", np.full((20, 30), 9, np.uint8))
    picture(tmp_path / "masks/b.png", np.zeros((20, 31), np.uint8))
    data = everything(tmp_path, class_map=TWO)
    with pytest.raises(MasksError, match=re.escape("mask masks/a.png has value 9")):
        data[0]
    with pytest.raises(MasksError, match=re.escape("images/b.png is 30 x 20 and its mask masks/b.png 31 x 20")):
        data[1]
    (tmp_path / "masks/c.png").unlink()
    with pytest.raises(MasksError, match=re.escape("mask masks/c.png is missing")):
        data[2]


def test_classes_without_a_pixel(tmp_path):
    write_folder(tmp_path, ["a", "b"])
    classes = TWO | {2: "stroma", 3: "necrosis"}
    message = refused(MasksError, tmp_path, class_map=classes)
    assert "of 4 classes, those without a pixel in the 2 masks: 2 (stroma, necrosis)" in message
    assert everything(tmp_path, class_map=classes).check(allow_empty=True)[2:].tolist() == [0, 0]
    nothing = {0: "ignore", 1: "ignore", 2: "necrosis"}
    with pytest.raises(MasksError, match=r"of 1 classes, those without a pixel in the \d masks: 1 \(necrosis\)"):
        everything(tmp_path, class_map=nothing).check(allow_empty=True)


def test_partners_that_are_missing(tmp_path):
    write_folder(tmp_path, ["a", "b", "c", "d"])
    (tmp_path / "masks/b.png").unlink()
    (tmp_path / "images/c.png").unlink()
    (tmp_path / "images/d.png").unlink()
    message = refused(MasksError, tmp_path)
    assert "images without a mask of the same stem: 1 (images/b.png)" in message
    assert "masks without an image of the same stem: 2 (masks/c.png, masks/d.png)" in message


def test_two_files_of_a_stem(tmp_path):
    write_folder(tmp_path, ["a"])
    picture(tmp_path / "images/a.jpg", np.zeros((20, 30, 3), np.uint8))
    assert "images/a.jpg and images/a.png" in refused(MasksError, tmp_path)


def test_folders_that_are_missing_or_empty(tmp_path):
    assert "no folder images/" in refused(MasksError, tmp_path)
    (tmp_path / "images").mkdir()
    assert "images/ holds no picture" in refused(MasksError, tmp_path)
    assert "does not exist" in refused(MasksError, tmp_path / "elsewhere")


def test_deep_images_and_masks_of_fractions(tmp_path):
    numbers = {"a": 1.0, "b": 0.5, "c": np.nan, "d": -1.0, "e": 65536.0}
    write_folder(tmp_path, numbers)
    picture(tmp_path / "images/a.png", np.full((20, 30), 40_000, np.uint16))
    for stem, number in numbers.items():
        picture(tmp_path / f"masks/{stem}.tif", np.full((20, 30), number, np.float32))
        (tmp_path / f"masks/{stem}.png").unlink()
    data = everything(tmp_path, class_map=TWO)
    with pytest.raises(MasksError, match="more than 8 bits a channel"):
        data[0]
    for index, stem in enumerate("bcde", start=1):
        with pytest.raises(MasksError, match=re.escape(f"masks/{stem}.tif has numbers other than 0, 1")):
            data[index]


def test_colours_of_16_bits(tmp_path):
    """Pillow opens them as if they had 8 bits."""
    write_folder(tmp_path, ["a", "b"])
    cv2.imwrite(str(tmp_path / "images/a.png"), np.full((20, 30, 3), 40_000, np.uint16))
    cv2.imwrite(str(tmp_path / "masks/b.png"), np.full((20, 30, 3), 1, np.uint16))
    data = everything(tmp_path, class_map=TWO)
    with pytest.raises(MasksError, match="more than 8 bits a channel"):
        data[0]
    with pytest.raises(MasksError, match=re.escape("masks/b.png is a colour picture")):
        data[1]


def test_masks_must_be_explained(tmp_path):
    write_folder(tmp_path, ["a"], values=(0, 3, 4))
    message = refused(ConfigError, tmp_path, class_map=None)
    assert "class_map" in message and "masks/a.png has 0, 3, 4" in message
    assert "exclude each other" in refused(ConfigError, tmp_path, instance=True)
    assert "-1" in refused(ConfigError, tmp_path, class_map={-1: "a"})
    assert "65536" in refused(ConfigError, tmp_path, class_map={65536: "a"})
    assert "0 classes" in refused(ConfigError, tmp_path, class_map={0: "ignore"})


def test_tables_of_splits_that_are_wrong(tmp_path):
    write_folder(tmp_path, ["a", "b", "c"])

    def say(text, **options):
        (tmp_path / "splits.tsv").write_text(text)
        return refused(ConfigError, tmp_path, **options)

    assert "no column split" in say("name\tcase\na\t1\n")
    message = say("name\tsplit\na\ttrain\na\tval\nbb\tvaluation\n")
    assert "names that stand twice: 1 (line 3: a)" in message and "names that are no images: 1 (line 4: bb" in message
    assert "splits that are none of train, val, test: 1 (line 4: valuation)" in message
    message = say("name\tsplit\tcase\na\ttrain\t1\nb\tval\t1\nc\tval\t2\n", groups="case")
    assert "1 groups are in more than one split (1: train, val)" in message
    message = say("name\tsplit\tcase\na\ttrain\t1\nb\tval\t\n", groups="case")
    assert "1 images have no case in the table (b)" in message
    (tmp_path / "splits.tsv").write_text("name\tsplit\na\tval\n")
    assert "no image is in split train (train 0, val 1, test 0)" in refused(MasksError, tmp_path)
    assert "gone.tsv does not exist" in refused(ConfigError, tmp_path, splits="gone.tsv")


def test_groups_and_fractions_that_are_wrong(tmp_path):
    write_folder(tmp_path, ["case1_a", "case2_a", "other"])
    assert "not found in 1 of 3 names (other)" in refused(ConfigError, tmp_path, groups=r"case\d")
    assert "no regular expression" in refused(ConfigError, tmp_path, groups="(")
    assert "together less than 1" in refused(ConfigError, tmp_path, val_fraction=0.6, test_fraction=0.4)
    assert "raise val_fraction" in refused(MasksError, tmp_path, split="val")


def test_unknown_kinds_splits_and_options(tmp_path):
    write_folder(tmp_path, ["a"])
    with pytest.raises(ConfigError, match="did you mean folder"):
        open_dataset("folders", tmp_path, "train")
    with pytest.raises(ConfigError, match="did you mean class_map"):
        open_dataset("folder", tmp_path, "train", classmap=TWO)
    with pytest.raises(ConfigError, match="none of train, val, test"):
        open_dataset("folder", tmp_path, "validation", class_map=TWO)
