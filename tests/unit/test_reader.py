"""Slides: micrometres a pixel, edges, background, bad files; pixels against slow references."""

import logging
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import openslide
import pytest

from dinoscope.errors import SlideError
from dinoscope.slides.grid import TileSet, plan_reading
from dinoscope.slides.reader import Slide, SlidePool
from dinoscope.slides.resample import resample_square
from dinoscope.slides.resolution import find_resolution
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid
from synthetic_slides import texture, write_lossless


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return texture(1100, 1500)


@pytest.fixture(scope="module")
def pyramid(image: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lossless(tmp_path_factory.mktemp("slides") / "a [b] ß.tiff", image, 0.5, (1, 2, 4))


def area_average(square: np.ndarray, side: int) -> np.ndarray:
    """Slow reference: every pixel cut into `side` x `side` equal parts, of which blocks are averaged."""
    length = square.shape[0]
    rows = np.repeat(square.astype(np.float64), side, axis=0).reshape(side, length, length, 3).mean(axis=1)
    return np.repeat(rows, side, axis=1).reshape(side, side, length, 3).mean(axis=2)


def test_levels_and_pixels_are_those_of_the_file(pyramid: Path, image: np.ndarray) -> None:
    with Slide(pyramid, "S") as slide:
        assert (slide.width, slide.height, slide.num_levels) == (1500, 1100, 3)
        assert slide.level_dimensions == ((1500, 1100), (750, 550), (375, 275))
        assert slide.level_downsamples == (1, 2, 4)
        assert (slide.mpp, slide.mpp_source, slide.vendor) == (0.5, "file", "generic-tiff")
        assert slide.files() == [pyramid]
        assert np.array_equal(slide.read_region(100, 200, 0, 300, 250), image[200:450, 100:400])


@pytest.mark.parametrize("mpp", [0.5, 0.52, 0.61, 0.83, 1.0, 1.09, 1.31, 1.57, 2.0, 2.6, 3.3])
def test_tiles_equal_averages_of_level_0(pyramid: Path, image: np.ndarray, mpp: float) -> None:
    rng = np.random.default_rng(5)
    tile_px, means = 48, []
    with Slide(pyramid, "S") as slide:
        reading = plan_reading(slide, TileSet("t", tile_px, mpp))
        assert reading.footprint_px == round(tile_px * mpp / 0.5)
        last = (slide.width - reading.footprint_px, slide.height - reading.footprint_px)
        places = [(0, 0), last, *((int(rng.integers(last[0])), int(rng.integers(last[1]))) for _ in range(4))]
        for x, y in places:
            tile = slide.read_tile(x, y, reading.level, reading.read_px, tile_px, reading.footprint_px)
            square = image[y : y + reading.footprint_px, x : x + reading.footprint_px]
            difference = np.abs(tile - area_average(square, tile_px))
            means.append(difference.mean())
            assert tile.shape == (tile_px, tile_px, 3) and tile.dtype == np.uint8 and tile.flags.c_contiguous
            if reading.level == 0:
                assert difference.max() <= 1.0
        assert np.mean(means) <= 1.0 and max(means) <= 1.2


def test_cubic_sums_come_closer_to_level_0_than_equal_shares_do(image: np.ndarray) -> None:
    side, tile_px = 2 * 77, 56
    fine = image[: side + 2, : side + 2]
    level = fine.reshape(side // 2 + 1, 2, side // 2 + 1, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    wanted = area_average(fine[1 : side + 1, 1 : side + 1], tile_px)
    cubic, shares = (
        np.abs(resample_square(level, 0.5, 0.5, side / 2, tile_px, averages) - wanted).mean()
        for averages in (True, False)
    )
    assert cubic < 0.6 * shares


def test_without_footprint_the_square_is_whole_pixels_of_the_level(pyramid: Path) -> None:
    with Slide(pyramid, "S") as slide:
        tile = slide.read_tile(40, 80, 2, 100, 50)
        level = slide.read_region(40, 80, 2, 100, 100).reshape(50, 2, 50, 2, 3).mean(axis=(1, 3))
    assert np.abs(tile - level).max() <= 1


def test_uneven_levels_have_no_transparent_edges(tmp_path: Path) -> None:
    dark = np.full((1021, 1339, 3), 40, np.uint8)
    path = write_lossless(tmp_path / "odd.tiff", dark, 0.5, (1, 4))
    with Slide(path, "S") as slide:
        assert slide.level_downsamples[1] != 4
        side = 4 * 64
        tile = slide.read_tile(slide.width - side, slide.height - side, 1, 64, 64, side)
        assert np.abs(tile.astype(int) - 40).max() <= 1


def test_a_tile_larger_than_the_slide_is_filled_with_background(tmp_path: Path) -> None:
    path = write_lossless(tmp_path / "small.tiff", np.full((300, 400, 3), 80, np.uint8), 0.5)
    with Slide(path, "S") as slide:
        tile = slide.read_tile(0, 0, 0, 800, 80, 800)
    assert (tile[:30, :40] == 80).all() and (tile[30:] == 255).all() and (tile[:, 40:] == 255).all()


@pytest.mark.parametrize("level", [0, 1, 2])
def test_regions_over_the_edge_are_filled_with_background(pyramid: Path, level: int) -> None:
    with Slide(pyramid, "S") as slide:
        step = round(slide.level_downsamples[level])
        width, height = slide.level_dimensions[level]
        whole = slide.read_region(0, 0, level, width, height)
        around = slide.read_region(-10 * step, -7 * step, level, width + 30, height + 20)
        expected = np.full((height + 20, width + 30, 3), 255, np.uint8)
        expected[7 : 7 + height, 10 : 10 + width] = whole
        assert np.array_equal(around, expected)
        beyond = slide.read_region(slide.width + 5, 0, level, 8, 8)
        assert (beyond == 255).all()


def test_transparent_pixels_get_the_background_colour(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_region(slide: object, place: object, *where: int) -> None:
        place[0], place[1] = 0xFF0A141E, 0

    with Slide(pyramid, "S") as slide:
        monkeypatch.setattr(slide, "_fast", None)
        monkeypatch.setattr("openslide.lowlevel._read_region", read_region)
        assert slide.read_region(0, 0, 0, 2, 1).tolist() == [[[10, 20, 30], [255, 255, 255]]]
        slide.background = (1, 2, 3)
        assert slide.read_region(0, 0, 0, 2, 1).tolist() == [[[10, 20, 30], [1, 2, 3]]]


def test_half_transparent_pixels_are_blended_as_pil_would(pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of opacity and premultiplied colour, against openslide-python's own way to straight colours."""
    alpha, colour = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    colour = np.minimum(alpha, colour)
    argb = (alpha << 24 | colour << 16 | colour // 2 << 8 | colour // 3).astype(np.uint32)

    def read_region(slide: object, place: object, *where: int) -> None:
        np.ctypeslib.as_array(place, argb.shape)[:] = argb

    with Slide(pyramid, "S") as slide:
        slide.background = (240, 7, 99)
        monkeypatch.setattr(slide, "_fast", None)
        monkeypatch.setattr("openslide.lowlevel._read_region", read_region)
        found = slide.read_region(0, 0, 0, 256, 256)
    rgba = np.asarray(openslide.lowlevel._load_image(argb, (256, 256)))
    opacity = rgba[..., 3:].astype(np.float32) / 255
    blended = rgba[..., :3] * opacity + np.array((240, 7, 99), np.float32) * (1 - opacity)
    assert np.array_equal(found, np.rint(blended).astype(np.uint8))


@pytest.mark.parametrize("factor", [1, 3, 7, 16])
def test_shrunk_is_the_average_of_squares_however_it_is_read(
    pyramid: Path, image: np.ndarray, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinoscope.slides.reader._BLOCK_PX", (400, 300))
    calls = []
    with Slide(pyramid, "S") as slide:
        small = slide.shrunk(0, factor, lambda: calls.append(1))
        assert len(calls) == slide.num_blocks(0, factor) > 1
    missing = (-image.shape[0] % factor, -image.shape[1] % factor)
    padded = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="edge")
    rows, columns = padded.shape[0] // factor, padded.shape[1] // factor
    wanted = padded.reshape(rows, factor, columns, factor, 3).mean(axis=(1, 3))
    assert small.shape == wanted.shape
    assert np.abs(small - wanted).max() <= 1


@pytest.mark.parametrize("max_px", [64, 300, 700, 1500, 4000])
def test_thumbnail(pyramid: Path, image: np.ndarray, max_px: int) -> None:
    with Slide(pyramid, "S") as slide:
        thumbnail = slide.thumbnail(max_px)
    assert max(thumbnail.shape[:2]) == min(max_px, 1500)
    assert abs(thumbnail.shape[1] / thumbnail.shape[0] - 1500 / 1100) < 0.02
    assert np.abs(thumbnail.mean(axis=(0, 1)) - image.mean(axis=(0, 1))).max() < 1


def test_resolution_in_inches(tmp_path: Path) -> None:
    with Slide(write_lossless(tmp_path / "i.tiff", texture(300, 300), 0.25, unit="INCH"), "S") as slide:
        assert slide.mpp == pytest.approx(0.25, rel=1e-4)


def test_resolution_tags_stand_in_where_openslide_gives_no_mpp() -> None:
    tags = {"tiff.XResolution": "20000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}
    assert find_resolution({"openslide.vendor": "generic-tiff", **tags}, None)[:3] == (0.5, 0.25, "file")
    inches = tags | {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800", "tiff.YResolution": "50800"}
    assert find_resolution({"openslide.vendor": "generic-tiff", **inches}, None)[:3] == (0.5, 0.5, "file")
    # the tags of other vendors' files often describe a print size
    assert find_resolution({"openslide.vendor": "aperio", **tags}, None).source is None
    assert find_resolution({"openslide.mpp-x": "nan", "openslide.mpp-y": "0"}, None).source is None
    assert find_resolution({"openslide.mpp-x": "0.3"}, None)[:2] == (0.3, 0.3)


def test_unknown_mpp_opens_but_is_refused_when_needed(tmp_path: Path) -> None:
    path = write_lossless(tmp_path / "u.tiff", texture(300, 300), mpp=None)
    with Slide(path, "S 1") as slide:
        assert slide.mpp_source is None
        with pytest.raises(SlideError, match=r"slide 'S 1' \(file u.tiff\).*give it in column mpp of slides.tsv"):
            _ = slide.mpp
    with Slide(path, "S 1", mpp=0.4) as slide:
        assert (slide.mpp, slide.mpp_x, slide.mpp_y, slide.mpp_source) == (0.4, 0.4, 0.4, "table")


def test_implausible_mpp(tmp_path: Path, pyramid: Path) -> None:
    print_size = write_lossless(tmp_path / "p.tiff", texture(300, 300), mpp=25400 / 72)
    with Slide(print_size, "S") as slide, pytest.raises(SlideError, match=r"352\.8.*0\.05 to 50.*column mpp"):
        _ = slide.mpp_x
    with Slide(print_size, "S", mpp=0.5) as slide:
        assert slide.mpp == 0.5
    for wrong in (0.01, 77.0, float("nan")):
        with pytest.raises(SlideError, match=r"mpp .* in slides\.tsv.*correct column mpp"):
            Slide(pyramid, "S", mpp=wrong)


def test_contradiction_is_a_warning_and_the_table_wins(pyramid: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Slide(pyramid, "S", mpp=0.51) as slide:
        assert slide.mpp == 0.51 and not slide.warnings and not caplog.records
    with caplog.at_level(logging.WARNING), Slide(pyramid, "S", mpp=0.25) as slide:
        assert slide.mpp == 0.25 and len(slide.warnings) == 1
    assert "'S'" in caplog.text and "0.25" in caplog.text and "0.5" in caplog.text


def bad_files(folder: Path, good: bytes) -> dict[str, Path]:
    contents = {
        "empty": b"",
        "text": b"not a slide",
        "magic": b"II*\0" + bytes(200),
        **{f"cut {share}": good[: int(len(good) * share)] for share in (0.01, 0.3, 0.7, 0.95)},
    }
    paths = {}
    for name, content in contents.items():
        paths[name] = folder / f"{name}.svs"
        paths[name].write_bytes(content)
    paths["missing"] = folder / "missing.svs"
    paths["folder"] = folder / "folder"
    paths["folder"].mkdir()
    paths["pipe"] = folder / "pipe.svs"
    os.mkfifo(paths["pipe"])
    return paths


def test_bad_files_end_in_one_clear_sentence(tmp_path: Path, pyramid: Path) -> None:
    for name, path in bad_files(tmp_path, pyramid.read_bytes()).items():
        with pytest.raises(SlideError) as caught, Slide(path, "S 1", mpp=0.5) as slide:
            slide.shrunk(0, 8)
        message = str(caught.value)
        assert message.startswith(f"slide 'S 1' (file {path.name})"), name
        assert str(tmp_path) not in message and "\n" not in message
        assert any(advice in message for advice in ("copy it again", "column path", "give this user permission")), (
            message
        )


def test_damage_inside_is_found_when_read(tmp_path: Path) -> None:
    image = texture(512, 768)
    path = tmp_path / "d.tiff"
    write_pyramid(path, [(768, 512, encode_tiles(image))], 0.5)
    content = bytearray(path.read_bytes())
    content[2000:60000] = bytes(58000)
    path.write_bytes(content)
    with Slide(path, "S") as slide, pytest.raises(SlideError, match=r"'S'.*damaged or cut short.*copy it again"):
        slide.shrunk(0, 4)


def test_unreadable_without_permission(tmp_path: Path, pyramid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SlideError, match="may not be read"):
        Slide(pyramid, "S")


def test_closing_twice_is_harmless(pyramid: Path) -> None:
    slide = Slide(pyramid)
    assert slide.slide_id == pyramid.stem
    slide.close()
    slide.close()


def test_tiff_writer(tmp_path: Path) -> None:
    import tifffile

    image = texture(700, 900)
    half = image[::2, ::2]
    path = tmp_path / "w.tiff"
    levels = [(900, 700, encode_tiles(image, quality=95)), (450, 350, encode_tiles(half, quality=95))]
    write_pyramid(path, levels, 0.25)
    with tifffile.TiffFile(path) as file:
        assert [page.shape for page in file.pages] == [(700, 900, 3), (350, 450, 3)]
        assert [page.is_reduced for page in file.pages] == [False, True]
        numerator, denominator = file.pages[0].tags["XResolution"].value
        assert numerator / denominator == 40000
    with Slide(path) as slide:
        assert (slide.vendor, slide.mpp, slide.num_levels) == ("generic-tiff", 0.25, 2)
        assert np.abs(slide.read_region(0, 0, 0, 900, 700).astype(int) - image).mean() < 4


def test_pool_keeps_few_slides_open_and_survives_pickling_and_forks(tmp_path: Path, pyramid: Path) -> None:
    paths = {f"s{number}": pyramid for number in range(4)}
    pool = SlidePool(paths, {"s1": 0.25}, max_open=2)
    first = pool["s0"]
    assert pool["s0"] is first and pool["s1"].mpp == 0.25 and pool["s0"].mpp == 0.5
    pool["s2"]
    assert list(pool._open) == ["s0", "s2"] and pool["s0"] is first
    copy = pickle.loads(pickle.dumps(pool))
    assert copy["s1"].mpp == 0.25 and not pickle.loads(pickle.dumps(pool))._open
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # a worker must not use its parent's handle
        os.write(writer, struct.pack("?", pool["s0"] is not first))
        os._exit(0)
    os.waitpid(child, 0)
    assert struct.unpack("?", os.read(reader, 1))[0]
    pool.close()
    assert pool["s3"].width == 1500
    with pytest.raises(KeyError):
        pool["unknown"]


def test_only_allow_listed_properties_are_read(pyramid: Path) -> None:
    with Slide(pyramid, "S") as slide, pytest.raises(AssertionError):
        slide._property("openslide.comment")


def test_mirax_and_vms_members(tmp_path: Path) -> None:
    from dinoscope.slides.members import mirax_members, vms_members

    for name in ("a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "v.vms", "img one.jpg", "map.jpg", "other.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    members = mirax_members(tmp_path / "a.mrxs")
    assert [path.name for path in members] == ["a.mrxs", "Data0000.dat", "Slidedat.ini"]
    (tmp_path / "v.vms").write_text(
        "[Virtual Microscope Specimen]\nImageFile=img one.jpg\nMapFile=map.jpg\nNoLayers=1\n"
    )
    assert [path.name for path in vms_members(tmp_path / "v.vms")] == ["v.vms", "img one.jpg", "map.jpg"]


# real slides


@pytest.mark.parametrize(
    ("name", "size", "mpp", "vendor"),
    [
        ("CMU-1-Small-Region.svs", (2220, 2967), 0.499, "aperio"),
        ("test3-DAPI-2-(387).ndpi", (3968, 4864), 0.228175, "hamamatsu"),
        ("dicom_camelyon", (1152, 700), 28.9685, "dicom"),
    ],
)
def test_real_slides(shared: Path, name: str, size: tuple[int, int], mpp: float, vendor: str) -> None:
    path = shared / "data" / "wsi" / name
    with Slide(path, "S") as slide:
        assert (slide.width, slide.height) == size
        assert slide.mpp == pytest.approx(mpp, rel=1e-5) and slide.vendor == vendor
        members = slide.files()
        assert members and all(member.is_file() for member in members)
        region = slide.read_region(300, 200, 0, 256, 200)
        member = members[0] if vendor == "dicom" else path
        reference = openslide.OpenSlide(str(member)).read_region((300, 200), 0, (256, 200)).convert("RGB")
        assert np.array_equal(region, np.asarray(reference))


def test_tiles_of_a_real_pyramid_match_level_0_without_shift(shared: Path) -> None:
    import cv2

    with Slide(shared / "data" / "wsi" / "test3-DAPI-2-(387).ndpi", "S") as slide:
        for mpp in (0.5, 1.0, 1.3):
            reading = plan_reading(slide, TileSet("t", 128, mpp))
            assert reading.level > 0
            for x, y in ((501, 3001), (1203, 3400)):
                tile = slide.read_tile(x, y, reading.level, reading.read_px, 128, reading.footprint_px)
                square = slide.read_region(x, y, 0, reading.footprint_px, reading.footprint_px)
                wanted = cv2.resize(square, (128, 128), interpolation=cv2.INTER_AREA)
                assert np.abs(tile.astype(int) - wanted).mean() <= 3
                blues = (picture[..., 2].astype(np.float32) for picture in (tile, wanted))
                shift = cv2.phaseCorrelate(*blues)[0]
                assert np.hypot(*shift) < 0.5


def test_folder_with_two_dicom_series_is_refused(shared: Path, tmp_path: Path) -> None:
    source = next((shared / "data" / "wsi" / "dicom_camelyon").iterdir())
    content = source.read_bytes()
    series = b"1.3.6.1.4.1.11129.5.7.0.1.517182092386.24422120.1688792467737634"
    (tmp_path / "a.dcm").write_bytes(content)
    with Slide(tmp_path, "S") as slide:
        assert slide.files() == [tmp_path / "a.dcm"]
    (tmp_path / "b.dcm").write_bytes(content.replace(series, series[:-1] + b"9"))
    with pytest.raises(SlideError, match="more than one DICOM series"):
        Slide(tmp_path, "S")
    with Slide(tmp_path / "a.dcm", "S") as slide:
        assert slide.files() == [tmp_path / "a.dcm"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "cut.dcm").write_bytes(content[: len(content) // 2])
    with pytest.raises(SlideError, match="copy it again"), Slide(tmp_path / "c", "S", mpp=29.0) as slide:
        slide.shrunk(0, 1)
