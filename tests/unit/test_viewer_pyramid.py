"""Pyramids of the viewer: their pixels against plain averages of the slide, and which tiles there are."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from dinoscope.slides.reader import Slide
from dinoscope.visualize.viewer.pyramid import TILE_PX, plan_layout, write_pyramid
from dinoscope.visualize.viewer.scripts import read_script
from synthetic_slides import texture, write_lossless

SCRIPT = Path(__file__).parents[2] / "workflow_scripts" / "build_viewer.py"


def build(tmp_path, image, finest_mpp, name="A", **options):
    """The pyramid of an image, and what its script says."""
    slide = write_lossless(tmp_path / f"{name}.tiff", image, **options)
    output = tmp_path / "viewer" / "slides" / name / "pyramid.js"
    with Slide(slide, name) as opened:
        write_pyramid(opened, output, finest_mpp)
    kind, key, value = read_script(output)
    assert (kind, key) == ("pyramid", name)
    return output.parent / "tiles", value


def mosaic(folder, value, z):
    """All tiles of a z side by side, cut to the slide, float64; those that were left out in the background's colour."""
    side = value["footprint"] << (len(value["present"]) - 1 - z)
    columns, rows = -(-value["width"] // side), -(-value["height"] // side)
    assert len(value["present"][z]) == columns * rows
    picture = np.empty((rows * TILE_PX, columns * TILE_PX, 3))
    picture[:] = list(bytes.fromhex(value["background"][1:]))
    for number, there in enumerate(value["present"][z]):
        y, x = divmod(number, columns)
        path = folder / str(z) / f"{x}_{y}.jpg"
        assert path.is_file() == (there == "1")
        if there == "1":
            tile = cv2.imread(str(path))[..., ::-1]
            picture[y * TILE_PX : (y + 1) * TILE_PX, x * TILE_PX : (x + 1) * TILE_PX] = tile
    return picture, side / TILE_PX


def averaged(image, factor, height, width):
    """Means over squares of `factor` pixels, cut by areas: differences of the bilinear running sum, in float64."""
    sums = np.pad(image.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0), (0, 0)))

    def corner_sums():
        y, x = (np.arange(count + 1) * factor for count in (height, width))
        top, left = np.minimum(y.astype(int), image.shape[0] - 1), np.minimum(x.astype(int), image.shape[1] - 1)
        down, right = (y - top)[:, None, None], (x - left)[None, :, None]
        rows = sums[top] * (1 - down) + sums[top + 1] * down
        return rows[:, left] * (1 - right) + rows[:, left + 1] * right

    corners = corner_sums()
    total = corners[1:, 1:] - corners[:-1, 1:] - corners[1:, :-1] + corners[:-1, :-1]
    return total / factor**2


def as_jpeg(picture):
    """What JPEG makes of a picture: it takes more from fine colourful noise than the reading may."""
    data = cv2.imencode(".jpg", np.rint(picture).astype(np.uint8)[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 82])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1].astype(float)


@pytest.mark.parametrize(("mpp", "downsamples"), [(1.0, (1,)), (1.3, (1,)), (2.1, (1, 4))])
def test_each_z_shows_the_slide_where_it_lies(tmp_path, mpp, downsamples):
    image = texture(1900, 2300)
    folder, value = build(tmp_path, image, mpp, downsamples=downsamples)
    finest = len(value["present"]) - 1
    assert value["footprint"] == round(TILE_PX * mpp / 0.5)
    assert (value["width"], value["height"], value["mpp"]) == (2300, 1900, 0.5)
    for z in range(finest + 1):
        picture, factor = mosaic(folder, value, z)
        height, width = int(image.shape[0] / factor), int(image.shape[1] / factor)  # whole pixels
        wanted = averaged(image, factor, height, width)
        difference = np.abs(picture[:height, :width] - as_jpeg(wanted))
        assert difference.mean() < 3, (z, difference.mean())
        for edge in (difference[-40:], difference[:, -40:]):  # nothing is moved inwards there
            assert edge.mean() < 4, (z, edge.mean())
    assert value["present"][0] == "1"


def test_bare_glass_is_left_out_and_its_colour_told(tmp_path):
    image = np.full((3000, 3000, 3), (241, 243, 240), np.uint8)
    image[100:400, 100:400] = texture(300, 300)
    folder, value = build(tmp_path, image, 0.5)
    assert value["present"][-1] == "1" + 35 * "0"
    assert value["background"] == "#f1f3f0"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.jpg"))
    assert files == [f"{z}/0_0.jpg" for z in range(len(value["present"]))]


def test_a_slide_coarser_than_asked_for_is_not_enlarged(tmp_path):
    _, value = build(tmp_path, texture(700, 300), 2.0, mpp=8.0)
    assert value["footprint"] == TILE_PX and len(value["present"]) == 2


def test_a_small_slide_is_one_tile(tmp_path):
    folder, value = build(tmp_path, texture(90, 120), 0.5)
    assert value["present"] == ["1"] and (folder / "0" / "0_0.jpg").is_file()


def test_another_pyramid_takes_the_place_of_the_old_one(tmp_path):
    image = texture(1400, 1400)
    folder, _ = build(tmp_path, image, 0.5)
    before = {path.relative_to(folder) for path in folder.rglob("*.jpg")}
    (folder.parent / ".tiles.77.partial" / "0").mkdir(parents=True)  # of a process that was killed
    folder, value = build(tmp_path, image, 2.0)
    after = {path.relative_to(folder) for path in folder.rglob("*.jpg")}
    assert len(before) == 9 + 4 + 1 and after == {Path("0/0_0.jpg")} and value["present"] == ["1"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["pyramid.js", "tiles"]


def test_the_coarsest_level_that_is_fine_enough_is_read(tmp_path):
    slide = write_lossless(tmp_path / "A.tiff", texture(1024, 1024), 0.25, (1, 2, 4))
    with Slide(slide) as opened:
        for mpp, level in ((0.25, 0), (0.49, 0), (0.5, 1), (0.9, 1), (2.0, 2)):
            assert plan_layout(opened, mpp).level == level, mpp


def run_script(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "pyramid", *map(str, arguments)], capture_output=True, text=True
    )


def test_a_damaged_slide_is_an_error_or_is_written_down(tmp_path):
    slide = tmp_path / "Jane Doe.svs"
    slide.write_bytes(b"II*\0" + bytes(500))
    output = tmp_path / "viewer" / "pyramid.js"
    arguments = ("--slide", slide, "--slide-id", "@A", "--output", output)
    done = run_script(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: slide '@A'") and not output.exists()
    done = run_script(*arguments, "--on-error", "skip")
    assert done.returncode == 0, done.stderr
    kind, key, value = read_script(output)
    assert (kind, key) == ("pyramid", "@A") and "OpenSlide" in value["problem"]
    assert "Jane" not in json.dumps(value) and str(tmp_path) not in json.dumps(value)


def test_a_real_slide(tmp_path, shared):
    with Slide(shared / "data" / "wsi" / "CMU-1-Small-Region.svs", "CMU") as slide:
        output = tmp_path / "slides" / "CMU" / "pyramid.js"
        write_pyramid(slide, output, 1.0)
        thumbnail = slide.thumbnail(370).astype(float)
    _, _, value = read_script(output)
    picture, factor = mosaic(output.parent / "tiles", value, 0)
    height, width = round(value["height"] / factor), round(value["width"] / factor)
    seen, wanted = (
        cv2.resize(image.astype(np.float32), (55, 74), interpolation=cv2.INTER_AREA)
        for image in (picture[:height, :width], thumbnail)
    )
    assert np.abs(seen - wanted).mean() < 2
