"""Whole slides to class maps, against the same slides taken whole and blended by brute force."""

import json
import runpy
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import openslide
import pytest
import tifffile
import torch
from PIL import Image

from dinoscope.errors import ConfigError, DinoscopeError, SlideError
from dinoscope.features.encoders import load_encoder
from dinoscope.segment import class_map as class_map_module
from dinoscope.segment.adapters import LoraSettings
from dinoscope.segment.blending import RowBlender
from dinoscope.segment.class_map import UNKNOWN, ClassMap, array_on_disk, half_size, write_class_map
from dinoscope.segment.files import SegmenterCard, make_card, save_segmenter
from dinoscope.segment.inference import window_starts
from dinoscope.segment.model import Segmenter
from dinoscope.segment.slide_picture import draw_segmented_slide, painted
from dinoscope.segment.slides import SlideSettings, class_outlines, predict_slide, slide_settings
from dinoscope.slides.geojson import read_annotations
from dinoscope.slides.reader import Slide
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid
from dinoscope.slides.tissue import Tissue, detect_tissue
from tiny_segmenter import own_encoder, trained, write_own_encoder
from tiny_slides import write_slide

SCRIPT = Path(__file__).resolve().parents[2] / "workflow_scripts/segment_predict_slide.py"
CLASSES, PALETTE = ("background", "tumour", "stroma"), ((255, 255, 255), (200, 0, 0), (0, 90, 181))
CARD = SegmenterCard("0", "none", CLASSES, PALETTE, (0, 0, 0), (1, 1, 1), "linear", None)


class ByColor(torch.nn.Module):
    """Logits from the colour of each pixel alone: the result of a tile does not depend on where it ends."""

    num_classes, patch_size, card, mean, std = 3, 1, CARD, (0, 0, 0), (1, 1, 1)
    normalised = Segmenter.normalised

    def __init__(self):
        super().__init__()
        weight = torch.tensor([[1.0, 1, 1], [4, -2, -2], [-2, -2, 5]])
        self.weight, self.bias = torch.nn.Parameter(weight), torch.nn.Parameter(torch.tensor([-0.9, 0, 0]))

    def forward(self, images):
        return torch.einsum("kc,bchw->bkhw", self.weight, images) + self.bias[:, None, None]

    def classes(self, pixels: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self(self.normalised(torch.from_numpy(pixels)[None]))[0].argmax(0).numpy()


def everything(slide: Slide) -> Tissue:
    return detect_tissue(slide, "none")


def painted_slide(path: Path, width: int = 1500, height: int = 1100) -> Path:
    """White ground with a red rectangle and a blue disc that has a white hole, at 0.5 um a pixel."""
    image = np.full((height, width, 3), 255, np.uint8)
    image[200:500, 300:900] = (200, 30, 30)
    cv2.circle(image, (1000, 750), 250, (40, 40, 220), -1)
    cv2.circle(image, (1000, 750), 100, (255, 255, 255), -1)
    levels = [image, cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA)]
    sizes = [(level.shape[1], level.shape[0], encode_tiles(level, quality=100)) for level in levels]
    write_pyramid(path, sizes, 0.5)
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return painted_slide(tmp_path_factory.mktemp("slides") / "shapes.tiff")


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_tiles_are_blended_as_by_brute_force(tmp_path, monkeypatch, seed):
    monkeypatch.setattr("dinoscope.segment.blending._CHUNK_PX", 37)
    rng = np.random.default_rng(seed)
    tile, height, width, classes = 16, int(rng.integers(20, 90)), int(rng.integers(20, 90)), 4
    wanted, covered = np.zeros((classes, height, width)), np.zeros((height, width), bool)
    blender = RowBlender(classes, tile, width, tmp_path)
    found = np.full((height, width), 255, np.uint8)

    def store(top):
        start = blender.top
        rows = blender.move_to(top, 255)
        found[start : start + len(rows)] = rows

    for top in window_starts(height, tile, int(rng.integers(8, 17))):
        lefts = [left for left in window_starts(width, tile, 11) if rng.random() < 0.5]
        for left in lefts:
            if top != blender.top:
                store(top)
            logits = rng.normal(size=(classes, tile, tile)).astype(np.float32)
            blender.add(left, logits)
            wanted[:, top : top + tile, left : left + tile] += logits
            covered[top : top + tile, left : left + tile] = True
    store(blender.top + tile)
    assert np.array_equal(found, np.where(covered, wanted.argmax(0), 255))


def test_the_most_frequent_of_four_is_taken():
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 4, (31, 47)).astype(np.uint8)
    found = half_size(classes)
    assert found.shape == (16, 24)
    for row in range(16):
        for column in range(24):
            rows, columns = (np.minimum([2 * i, 2 * i + 1], n - 1) for i, n in ((row, 31), (column, 47)))
            four = [int(classes[i, j]) for i in rows for j in columns]
            counts = Counter(four)
            best = max(counts.values())
            assert found[row, column] == next(one for one in four if counts[one] == best)


@pytest.mark.parametrize(("tile", "overlap"), [(256, 64), (160, 0), (2048, 512)])
def test_a_slide_by_tiles_is_the_slide_in_one_pass(tmp_path, shapes, tile, overlap):
    model = ByColor()
    with Slide(shapes) as slide:
        settings = SlideSettings(0.5, tile, overlap, batch_size=3)
        found = predict_slide(slide, model, everything(slide), settings, tmp_path)
        wanted = model.classes(slide.read_region(0, 0, 0, slide.width, slide.height))
        areas = found.areas_mm2()
    assert np.array_equal(found.levels[0], wanted)
    assert found.downsample == 1
    assert areas["tumour"] == pytest.approx(300 * 600 * 0.25e-6, rel=0.02)
    assert sum(areas.values()) == pytest.approx(1500 * 1100 * 0.25e-6)


@pytest.mark.parametrize("mpp", [1.0, 0.7, 1.3])
def test_at_another_resolution_classes_stay_where_they_are(tmp_path, shapes, mpp):
    """Pixels whose centre is more than a pixel from an edge, in level-0 coordinates."""
    with Slide(shapes) as slide:
        found = predict_slide(slide, ByColor(), everything(slide), SlideSettings(mpp, 128, 32), tmp_path)
        size = slide.width, slide.height
    level, step = found.levels[0], mpp / 0.5
    assert found.downsample == step and level.shape == tuple(int(side / step + 1e-6) for side in size[::-1])
    x, y = (np.arange(count) + 0.5 for count in level.shape[::-1])
    x, y = np.meshgrid(x * step, y * step)
    radius = np.hypot(x - 1000.5, y - 750.5)
    truth = np.where((radius < 250) & (radius > 100), 2, 0)
    truth[(x > 300) & (x < 900) & (y > 200) & (y < 500)] = 1
    to_edge = np.minimum(abs(radius - 250), abs(radius - 100))
    outside = np.maximum(abs(x - 600) - 300, abs(y - 350) - 150)
    clear = (to_edge > 1.2 * step) & (abs(outside) > 1.2 * step)
    assert clear.mean() > 0.9
    assert np.array_equal(level[clear], truth[clear])


def brute_force(slide: Slide, model, tile: int, overlap: int) -> np.ndarray:
    """Every tile of the whole slide, cut out of one array, blended in float64."""
    pixels = slide.read_region(0, 0, 0, slide.width, slide.height)
    total = np.zeros((model.num_classes, slide.height, slide.width))
    ramp = np.minimum(np.minimum(np.arange(tile) + 0.5, tile - 0.5 - np.arange(tile)) / overlap, 1)
    for top in window_starts(slide.height, tile, tile - overlap):
        for left in window_starts(slide.width, tile, tile - overlap):
            part = torch.from_numpy(pixels[top : top + tile, left : left + tile].copy())[None]
            with torch.no_grad():
                logits = model(model.normalised(part))[0].double().numpy()
            total[:, top : top + tile, left : left + tile] += logits * ramp * ramp[:, None]
    return total


def tiny_model(decoder: str = "linear") -> Segmenter:
    segmenter = trained(Segmenter(own_encoder(), 3, decoder, LoraSettings(2)), seed=4).eval()
    segmenter.card = make_card(segmenter, CLASSES, PALETTE, img_dim=(96, 96), mpp=0.5)
    return segmenter


def test_a_real_model_blends_its_logits(tmp_path):
    model = tiny_model("fpn")
    with Slide(write_slide(tmp_path / "a.tiff", seed=1, side=420)) as slide:
        settings = slide_settings(model, None, None, 32, batch_size=5)
        found = predict_slide(slide, model, everything(slide), settings, tmp_path).levels[0]
        wanted = brute_force(slide, model, 96, 32)
    classes = wanted.argmax(0)
    assert len(np.unique(classes)) == 3
    best = np.sort(wanted, axis=0)
    assert np.array_equal(found[best[-1] - best[-2] > 1e-4], classes[best[-1] - best[-2] > 1e-4])
    assert (found == classes).mean() > 0.999


def test_only_tissue_is_looked_at(tmp_path, shapes):
    model = ByColor()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(len(_[1][0])))
    with Slide(shapes) as slide:
        whole = everything(slide)
        mask = np.zeros_like(whole.mask)
        mask[10:30, 20:40] = True
        tissue = Tissue(mask, whole.downsample, whole.mpp, "otsu", "test", None)
        found = predict_slide(slide, model, tissue, SlideSettings(0.5, 64, 16, batch_size=4), tmp_path).levels[0]
        wanted = model.classes(slide.read_region(0, 0, 0, slide.width, slide.height))
    at = [((np.arange(side) + 0.5) / whole.downsample).astype(int) for side in found.shape]
    inside = mask[at[0]][:, at[1]]
    assert np.array_equal(found, np.where(inside, wanted, UNKNOWN))
    side = 20 * whole.downsample
    assert sum(calls) <= (side / 48 + 2) ** 2 < 0.5 * (1500 / 48) * (1100 / 48)


def test_a_slide_without_tissue_gives_an_empty_map(tmp_path, shapes):
    with Slide(shapes) as slide:
        whole = everything(slide)
        tissue = Tissue(np.zeros_like(whole.mask), whole.downsample, whole.mpp, "otsu", "test", None)
        found = predict_slide(slide, ByColor(), tissue, SlideSettings(0.5, 64, 16), tmp_path)
        assert (found.levels[0] == UNKNOWN).all()
        assert class_outlines(found, slide)["features"] == []


def test_memory_does_not_grow_with_the_height_nor_the_classes(tmp_path):
    peaks = []
    for number, (rows, classes) in enumerate([(8, 3), (32, 3), (32, 24)]):
        (tmp_path / str(number)).mkdir()
        logits = np.zeros((classes, 64, 64), np.float32)
        finest = array_on_disk(tmp_path / str(number) / "level_0", np.uint8, (rows * 64, 2048))
        tracemalloc.start()
        blender = RowBlender(classes, 64, 2048, tmp_path / str(number))
        for top in range(0, rows * 64, 64):
            if top:
                finest[top - 64 : top] = blender.move_to(top, UNKNOWN)
            for left in range(0, 2048, 64):
                blender.add(left, logits)
        ClassMap.with_levels(finest, tmp_path / str(number), mpp=1, downsample=1, classes=(), palette=())
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 2**20
    assert peaks[2] < 1.2 * peaks[1] + 2**20


def test_arrays_on_disk_leave_nothing_behind(tmp_path):
    """Whatever ends the program: their files have no name."""
    array = array_on_disk(tmp_path / "x", np.float32, (3, 1000))
    assert (array == 0).all() and array.shape == (3, 1000)
    array[1] = 7
    other = array_on_disk(tmp_path / "x", np.float32, (3, 1000))
    assert array.sum() == 7000 and other.sum() == 0
    assert list(tmp_path.iterdir()) == []


def some_map(tmp_path, height=1500, width=1100, mpp=0.5) -> ClassMap:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 4, (height // 50 + 1, width // 50 + 1)).astype(np.uint8)
    classes = np.kron(small, np.ones((50, 50), np.uint8))[:height, :width]
    classes[classes == 3] = UNKNOWN
    return ClassMap.with_levels(classes, tmp_path, mpp=mpp, downsample=1, classes=CLASSES, palette=PALETTE)


def test_openslide_and_tifffile_open_the_map(tmp_path):
    written = some_map(tmp_path)
    write_class_map(tmp_path / "map.tiff", written)
    with tifffile.TiffFile(tmp_path / "map.tiff") as file:
        pages = list(file.pages)
        assert [page.shape for page in pages] == [(1500, 1100), (750, 550)]
        for page, level in zip(pages, written.levels, strict=True):
            assert np.array_equal(page.asarray(), level)
        about = json.loads(pages[0].description)
    assert about == {"classes": {"0": "background", "1": "tumour", "2": "stroma"}, "not_predicted": 255}
    with openslide.OpenSlide(tmp_path / "map.tiff") as slide:
        assert slide.level_dimensions == ((1100, 1500), (550, 750))
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        shown = np.asarray(slide.read_region((0, 0), 0, (1100, 1500)).convert("RGB"))
        coarse = np.asarray(slide.read_region((0, 0), 1, (550, 750)).convert("RGB"))
    colors = np.full((256, 3), 255, np.uint8)
    colors[:3] = PALETTE
    assert np.array_equal(shown, colors[written.levels[0]])
    assert np.array_equal(coarse, colors[written.levels[1]])
    with Slide(tmp_path / "map.tiff") as slide:
        assert slide.mpp == pytest.approx(0.5)


def test_a_map_that_cannot_be_written_leaves_what_was_there(tmp_path):
    written = some_map(tmp_path)
    (tmp_path / "map.tiff").mkdir()
    with pytest.raises(DinoscopeError, match=r"map\.tiff cannot be written"):
        write_class_map(tmp_path / "map.tiff", written)
    with pytest.raises(DinoscopeError, match=r"cannot be written .*free space"):
        array_on_disk(tmp_path / "x", np.uint8, (2**62,))


def test_outlines_are_annotations_that_come_back_as_they_were(tmp_path, shapes):
    model = ByColor()
    with Slide(shapes) as slide:
        found = predict_slide(slide, model, everything(slide), SlideSettings(1.0, 128, 32), tmp_path)
        document = class_outlines(found, slide)
        (tmp_path / "a.geojson").write_text(json.dumps(document))
        assert [feature["properties"]["classification"] for feature in document["features"]] == [
            {"name": "tumour", "color": [200, 0, 0]},
            {"name": "stroma", "color": [0, 90, 181]},
        ]
        for index, name in ((1, "tumour"), (2, "stroma")):
            mask = read_annotations(tmp_path / "a.geojson", "a", [name]).rasterised(slide, found.levels[0].shape, 2.0)
            assert (mask != (found.levels[0] == index)).sum() < 0.003 * mask.sum()
        assert len(class_outlines(found, slide, leave_out=())["features"]) == 3
    tumour = np.concatenate(
        [np.array(ring) for polygon in document["features"][0]["geometry"]["coordinates"][:1] for ring in polygon]
    )
    assert np.abs(tumour.min(0) - (300, 200)).max() <= 2 and np.abs(tumour.max(0) - (900, 500)).max() <= 2
    (polygon,) = document["features"][1]["geometry"]["coordinates"]
    assert len(polygon) == 2  # the disc and its hole


def test_outlines_of_large_maps_are_taken_from_a_coarser_level(tmp_path, shapes, monkeypatch):
    monkeypatch.setattr("dinoscope.segment.slides._OUTLINE_PX", 500_000)
    with Slide(shapes) as slide:
        found = predict_slide(slide, ByColor(), everything(slide), SlideSettings(0.5, 256, 64), tmp_path)
        document = class_outlines(found, slide)
    points = np.concatenate([np.array(ring) for ring in document["features"][0]["geometry"]["coordinates"][0]])
    assert np.abs(points.min(0) - (300, 200)).max() <= 4 and np.abs(points.max(0) - (900, 500)).max() <= 4


def test_the_overview_shows_each_class_where_it_is(tmp_path, shapes):
    with Slide(shapes) as slide:
        found = predict_slide(slide, ByColor(), everything(slide), SlideSettings(0.5, 256, 64), tmp_path)
        draw_segmented_slide(tmp_path / "a.png", slide, found, found.areas_mm2())
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    scale = 1100 / 1500
    for x, y, color in ((600, 350, (200, 15, 15)), (1000, 920, (20, 65, 200))):  # classes over the slide's own colours
        at = pixels[104 + int(y * scale), 24 + 1100 + 20 + int(x * scale)]
        assert np.abs(at - color).max() < 30, at
    key = (pixels == (0, 90, 181)).all(2)
    assert key[104 + int(1100 * scale) :].sum() == 18 * 18


def test_painting_leaves_what_is_unknown_paler_and_draws_the_lines():
    picture = np.zeros((4, 4, 3), np.uint8)
    classes = np.array([[1, 1, 255, 255]] * 4, np.uint8)
    drawn = painted(picture, classes, PALETTE)
    assert drawn[0, 0].tolist() == [110, 0, 0] and drawn[0, 3].tolist() == [140, 140, 140]
    assert painted(picture, np.array([[1, 2, 2, 2]] * 4, np.uint8), PALETTE)[0, 1].tolist() == [0, 90, 181]


def test_settings_come_from_the_card_and_are_checked():
    model = tiny_model()
    assert slide_settings(model, None, None, None) == SlideSettings(0.5, 96, 24)
    assert slide_settings(model, 1.0, 160, 0, workers=1) == SlideSettings(1.0, 160, 0, workers=1)
    model.card = make_card(model, CLASSES, PALETTE)
    with pytest.raises(ConfigError, match="give --mpp"):
        slide_settings(model, None, None, None)
    assert slide_settings(model, 0.5, None, None).tile_px == 512
    with pytest.raises(ConfigError, match="patch size of 16 px: 96 or 112"):
        slide_settings(model, 0.5, 100, None)
    with pytest.raises(ConfigError, match="wanted is 0 to 48"):
        slide_settings(model, 0.5, 96, 49)


def test_a_slide_that_is_too_coarse_is_refused(tmp_path, shapes):
    with Slide(shapes) as slide, pytest.raises(SlideError, match="would have to be enlarged"):
        predict_slide(slide, ByColor(), everything(slide), SlideSettings(0.25, 64, 16), tmp_path)


def command(tmp_path: Path, slide: Path, *further: str) -> list[str]:
    outputs = {"class-map": "out/map.tiff", "outlines": "out/a.geojson", "overview": "out/a.png", "areas": "out/a.tsv"}
    line = [sys.executable, str(SCRIPT), "--segmenter", str(tmp_path / "model"), "--encoder", str(tmp_path / "a.pth")]
    line += ["--slide", str(slide), "--slide-id", "S1", "--device", "cpu", *further]
    return line + [word for name, path in outputs.items() for word in (f"--{name}", str(tmp_path / path))]


@pytest.fixture
def model_folder(tmp_path) -> Path:
    segmenter = trained(Segmenter(load_encoder(write_own_encoder(tmp_path / "a.pth")), 3, "linear", LoraSettings(2)))
    save_segmenter(tmp_path / "model", segmenter, make_card(segmenter, CLASSES, PALETTE, img_dim=(96, 96), mpp=0.5))
    return tmp_path


def test_the_script_writes_everything_by_rename_and_nothing_else(model_folder):
    slide = write_slide(model_folder / "a.tiff", seed=1, side=420)
    done = subprocess.run(command(model_folder, slide, "--tissue-method", "none"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    out = model_folder / "out"
    assert sorted(path.name for path in out.iterdir()) == ["a.geojson", "a.png", "a.tsv", "map.tiff"]
    with tifffile.TiffFile(out / "map.tiff") as file:
        classes = file.pages[0].asarray()
    lines = [line.split("\t") for line in (out / "a.tsv").read_text().splitlines()]
    assert lines[0] == ["slide_id", "class", "area_mm2", "share"]
    for index, (slide_id, name, area, share) in enumerate(lines[1:]):
        count = (classes == index).sum()
        assert (slide_id, name) == ("S1", CLASSES[index])
        assert float(area) == pytest.approx(count * 0.25e-6, rel=1e-4)
        assert float(share) == pytest.approx(count / classes.size, rel=1e-4, abs=1e-6)
    names = {f["properties"]["classification"]["name"] for f in json.loads((out / "a.geojson").read_text())["features"]}
    assert names == {CLASSES[index] for index in np.unique(classes) if index}
    with Image.open(out / "a.png") as image:
        assert image.size[0] >= 1000


def test_a_broken_slide_fails_in_a_sentence_or_is_skipped(model_folder, monkeypatch):
    broken = model_folder / "b.tiff"
    broken.write_bytes(b"II*\0nothing")
    monkeypatch.setattr(sys, "argv", command(model_folder, broken)[1:])
    with pytest.raises(SlideError, match=r"slide 'S1' .* copy it again"):
        runpy.run_path(str(SCRIPT))["main"]()
    record = model_folder / "skipped.json"
    skipped = subprocess.run(
        command(model_folder, broken, "--on-error", "skip", "--skip-record", str(record)),
        capture_output=True,
        text=True,
    )
    assert skipped.returncode == 0, skipped.stderr
    assert "slide" in json.loads(record.read_text())["reason"]
    out = model_folder / "out"
    assert sorted(path.name for path in out.iterdir()) == ["a.geojson", "a.png", "a.tsv", "map.tiff"]
    assert tifffile.imread(out / "map.tiff").tolist() == [[255]]
    assert class_map_module.UNKNOWN == 255


OWN = """
import torch

class Own(torch.nn.Module):
    image_px = 64

    def __init__(self):
        super().__init__()
        self.map = torch.nn.Conv2d(3, 8, 16, 16, bias=False)
        with torch.no_grad():
            self.map.weight.copy_(torch.linspace(-0.1, 0.1, self.map.weight.numel()).view_as(self.map.weight))

    def forward(self, images):
        patches = self.map(images).flatten(2).transpose(1, 2)
        return {"cls": patches.mean(1), "patches": patches}

def own():
    return Own()
"""


def test_an_encoder_of_ones_own_segments_slides(tmp_path):
    """By a function of the user's, whose version and files count: named as where it is trained and measured."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "more.txt").write_text("what it reads")
    name, files = f"{tmp_path}/own.py:own", [tmp_path / "more.txt"]
    encoder = load_encoder(name, files=files, version="2")
    assert encoder.kind == "function own.py:own"
    segmenter = Segmenter(encoder, 3)
    card = make_card(segmenter, CLASSES, PALETTE, img_dim=(96, 96), mpp=0.5)
    save_segmenter(tmp_path / "run" / "segmenter", segmenter, card)
    line = command(tmp_path, write_slide(tmp_path / "a.tiff", seed=1, side=420), "--tissue-method", "none")
    line += ["--segmenter", str(tmp_path / "run"), "--weights", name, "--encoder_files", *map(str, files)]
    other = subprocess.run(line, capture_output=True, text=True)
    assert other.returncode == 1 and "was trained on another encoder" in other.stderr
    done = subprocess.run([*line, "--encoder-version", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "map.tiff").is_file()
