"""Tiles with masks from QuPath's annotations, against a point-by-point test of every pixel."""

import json
import pickle

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from dinoscope.data.tiles import open_tiles
from dinoscope.errors import ConfigError, MasksError
from dinoscope.segment.datasets import open_dataset
from dinoscope.slides.manifest import merge_manifests, tile_table, write_tiles
from tiny_slides import write_slide

SLIDE_PX, FOOTPRINT, TILE = 512, 192, 64  # tiles of three times the slide's micrometres a pixel
CLASSES = {"Stroma": "stroma", "Tumor": "tumour", "Artefact": "ignore"}
SLIDES = ("a", "b", "c", "d")


def feature(rings, name):
    properties = {"objectType": "annotation"} | ({"classification": {"name": name}} if name else {})
    closed = [[*ring, ring[0]] for ring in rings]
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": closed}, "properties": properties}


def star(rng, x, y, reach):
    """A ring around a place, with up to 30 corners between half the reach and the reach from it."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(8, 30))))
    radii = rng.uniform(reach / 2, reach, len(angles))
    return [[float(x + r * np.cos(a)), float(y + r * np.sin(a))] for a, r in zip(angles, radii, strict=True)]


def annotations(seed):
    """Overlapping stars of three classes, one with a hole, in an order that is not that of the classes."""
    rng = np.random.default_rng(seed)
    features = []
    for name, reach in (("Tumor", 130), ("Artefact", 50), ("Stroma", 200), ("Tumor", 70), ("Stroma", 90)):
        features.append(feature([star(rng, *rng.uniform(60, 450, 2), reach)], name))
    features.append(feature([star(rng, 256, 256, 150), star(rng, 256, 256, 60)], "Tumor"))
    return features


def write_annotations(path, features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


@pytest.fixture
def folder(tmp_path):
    """Four slides of four cases with tiles at a third of their resolution, and annotations."""
    (tmp_path / "slides").mkdir()
    (tmp_path / "annotations").mkdir()
    parts = []
    x, y = (axis.ravel() for axis in np.meshgrid([0, 101, 320], [0, 160, 320]))
    for number, slide_id in enumerate(SLIDES):
        write_slide(tmp_path / "slides" / f"{slide_id}.tiff", number, SLIDE_PX)
        columns = {"x": x, "y": y, "level": 0, "read_px": FOOTPRINT, "tile_px": TILE, "mpp": 1.5}
        table = tile_table(slide_id, columns | {"footprint_px": FOOTPRINT, "tissue_fraction": 1.0})
        about = {"slide_id": slide_id, "tile_set": "train", "tile_px": TILE, "requested_mpp": 1.5, "stride_px": TILE}
        parts.append(tmp_path / f"{slide_id}.parquet")
        write_tiles(parts[-1], table, about)
        write_annotations(tmp_path / "annotations" / f"{slide_id}.geojson", annotations(number))
    merge_manifests(parts, tmp_path / "tiles.parquet")
    rows = ["\t".join((slide, f"{tmp_path}/slides/{slide}.tiff", f"case {slide}")) for slide in SLIDES]
    (tmp_path / "slides.tsv").write_text("slide_id\tpath\tcase_id\n" + "\n".join(rows) + "\n")
    return tmp_path


def opened(folder, split="train", **options):
    options = {"slides": str(folder / "slides.tsv"), "class_map": CLASSES, "test_fraction": 0} | options
    return open_dataset("slides", folder / "tiles.parquet", split, annotations=str(folder / "annotations"), **options)


def point_by_point(features, x, y, order, ground):
    """Class of each pixel of a tile: of its centre, in level-0 pixels, by crossings of each ring."""
    centres = (np.stack(np.meshgrid(np.arange(TILE), np.arange(TILE)), axis=-1).reshape(-1, 2) + 0.5) * FOOTPRINT / TILE
    centres += (x, y)
    expected = np.full(TILE * TILE, ground, np.uint8)
    for name, number in order:
        for each in features:
            if each["properties"].get("classification", {}).get("name") == name:
                rings = [np.array(ring) for ring in each["geometry"]["coordinates"]]
                inside = sum(Outline(ring).contains_points(centres).astype(int) for ring in rings) % 2
                expected[inside == 1] = number
    return expected.reshape(TILE, TILE)


@pytest.mark.parametrize("background", ["background", None])
def test_masks_are_filled_as_point_by_point(folder, background):
    data = opened(folder, background=background, val_fraction=0)
    first = 1 if background else 0
    assert data.classes == (("background",) if background else ()) + ("stroma", "tumour")
    order = [("Stroma", first), ("Tumor", first + 1), ("Artefact", 255)]
    assert len(data) == 36
    wrong, pixels = 0, np.zeros(first + 2, np.int64)
    for sample in (data[index] for index in range(len(data))):
        slide_id, _, place = sample.name.partition("@")
        x, y = map(int, place.split(","))
        expected = point_by_point(annotations(SLIDES.index(slide_id)), x, y, order, 0 if background else 255)
        assert sample.mask.dtype == np.uint8 and sample.mask.shape == (TILE, TILE)
        wrong += np.count_nonzero(sample.mask != expected)  # a centre on an outline, but for rounding
        pixels += np.bincount(expected.ravel(), minlength=256)[: len(pixels)]
    assert wrong <= 2
    assert np.abs(data.check() - pixels).max() <= 2 and pixels.min() > 1000


def test_images_are_those_of_the_tiles(folder):
    data = opened(folder, val_fraction=0)
    tiles = open_tiles(folder / "tiles.parquet", str(folder / "slides.tsv"))
    for index in (0, 7, 35):
        image, name = tiles.read(index)
        sample = data[index]
        assert sample.name == name == data.names[index] and np.array_equal(sample.image, image)
        assert sample.image.shape == (TILE, TILE, 3)


def test_cases_are_held_out_whole_and_the_table_is_followed(folder):
    drawn = {split: opened(folder, split, val_fraction=0.34, test_fraction=0.25) for split in ("train", "val", "test")}
    assert {split: len(data) for split, data in drawn.items()} == {"train": 18, "val": 9, "test": 9}
    assert sorted({name[0] for data in drawn.values() for name in data.names}) == list(SLIDES)
    for data in drawn.values():
        assert data.groups == [f"case {name[0]}" for name in data.names]
    rows = [
        "\t".join((slide, f"{folder}/slides/{slide}.tiff", "eval" if slide == "b" else "train")) for slide in SLIDES
    ]
    (folder / "slides.tsv").write_text("slide_id\tpath\tuse\n" + "\n".join(rows) + "\n")
    assert {name[0] for name in opened(folder, "test", test_fraction=0.9).names} == {"b"}
    others = [{name[0] for name in opened(folder, split).names} for split in ("train", "val")]
    assert [len(slides) for slides in others] == [2, 1] and others[0] | others[1] == {"a", "c", "d"}


def test_regions_limit_what_is_learned(folder):
    square = [[100, 100], [400, 100], [400, 300], [100, 300]]
    for number, slide_id in enumerate(SLIDES):
        features = [*annotations(number), feature([square], "Region*")]
        write_annotations(folder / "annotations" / f"{slide_id}.geojson", features)
    limited, free = (
        opened(folder, region="Region*", val_fraction=0),
        opened(folder, class_map=CLASSES | {"Region*": None}, val_fraction=0),
    )
    for index, name in enumerate(limited.names):
        x, y = map(int, name.partition("@")[2].split(","))
        rows, columns = (start + (np.arange(TILE) + 0.5) * FOOTPRINT / TILE for start in (y, x))
        inside = ((rows > 100) & (rows < 300))[:, None] & ((columns > 100) & (columns < 400))
        assert np.array_equal(limited.mask(index), np.where(inside, free.mask(index), 255))


def test_tiles_with_little_that_is_labelled_are_left_out(folder):
    every = opened(folder, background=None, val_fraction=0)
    shares = np.array([(every.mask(index) != 255).mean() for index in range(len(every))])
    some = opened(folder, background=None, val_fraction=0, min_labelled=0.5)
    assert some.names == [name for name, share in zip(every.names, shares, strict=True) if share >= 0.5]
    assert 0 < len(some) < len(every)


def test_content_is_of_manifest_place_and_mask(folder):
    data, again = opened(folder), opened(folder)
    contents = [data.content(index) for index in range(len(data))]
    assert len(set(contents)) == len(data) and contents == [again.content(index) for index in range(len(data))]
    other = opened(folder, background=None)
    assert not set(contents) & {other.content(index) for index in range(len(data)) if (other.mask(index) == 255).any()}


def test_data_sets_go_to_other_processes(folder):
    data = opened(folder)
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again[3].mask, data[3].mask) and np.array_equal(again[3].image, data[3].image)


# ---- what is wrong


def refused(kind, folder, **options):
    with pytest.raises(kind) as error:
        opened(folder, **{"val_fraction": 0} | options).check()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_problem_of_the_annotations_is_named_at_once(folder):
    (folder / "annotations/a.geojson").unlink()
    (folder / "annotations/b.geojson").write_text("{")
    write_annotations(folder / "annotations/c.geojson", [feature([[[0, 0], [9, 0], [9, 9]]], "Tumour")] * 2)
    write_annotations(folder / "annotations/d.geojson", [feature([[[0, 0], [9, 0], [9, 9]]], None)])
    message = refused(MasksError, folder)
    assert "slides without annotations in" in message and ": 1 (a)" in message
    assert "annotations that cannot be used: 1 (slide 'b': annotations b.geojson are no JSON" in message
    assert "annotation classes that class_map does not name: 2 (Tumour: 2, Unclassified: 1)" in message


def test_slides_without_annotations_may_be_skipped(folder):
    (folder / "annotations/a.geojson").unlink()
    data = opened(folder, skip_unannotated=True, val_fraction=0)
    assert {name[0] for name in data.names} == {"b", "c", "d"}
    held_out = opened(folder, "val", skip_unannotated=True, val_fraction=0.34)
    assert len(held_out) == 9  # of the three annotated ones, whichever is first in the draw of all
    (folder / "annotations/d.geojson").rename(folder / "annotations/d.tiff.geojson")  # as QuPath names them
    assert opened(folder, skip_unannotated=True, val_fraction=0).names == data.names


def test_annotations_of_another_slide(folder):
    far = [[[5000, 5000], [5100, 5000], [5100, 5100]]]
    write_annotations(folder / "annotations/b.geojson", [feature(far, "Tumor")])
    message = refused(MasksError, folder)
    assert (
        "slides whose annotations cannot be laid on them: 1 (slide 'b': annotation 1 (Tumor) lies at x 5000" in message
    )


def test_classes_that_nobody_drew(folder):
    message = refused(MasksError, folder, class_map=CLASSES | {"Necrosis": "necrosis"})
    assert "those without a pixel in the 36 masks: 1 (necrosis)" in message


def test_settings_that_are_missing_or_wrong(folder):
    assert "needs class_map" in refused(ConfigError, folder, class_map={})
    assert "needs slides" in refused(ConfigError, folder, slides="")
    assert "test_fraction is 1" in refused(ConfigError, folder, test_fraction=1)
    with pytest.raises(MasksError, match=r"no tile of tiles\.parquet is in split test"):
        opened(folder, "test")
    with pytest.raises(MasksError, match=r"no tile of tiles\.parquet is in split val"):
        opened(folder, "val", val_fraction=0)
    with pytest.raises(ConfigError, match="is no folder"):
        open_dataset("slides", folder / "tiles.parquet", "train", slides="x", annotations="nowhere", class_map=CLASSES)
