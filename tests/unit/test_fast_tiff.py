"""Decoding a TIFF's tiles directly: the same pixels as OpenSlide's own, or OpenSlide's own."""

import logging
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from dinoscope.errors import SlideError
from dinoscope.slides import fast_tiff
from dinoscope.slides.reader import Slide, SlidePool
from dinoscope.slides.tiff_directory import tiled_images
from dinoscope.slides.tile_cache import TileCache
from synthetic_slides import APERIO, split_jpeg, texture, write_tiled

HEIGHT, WIDTH = 1000, 1240  # whole numbers of pixels at downsample 4, but no whole number of tiles


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return texture(HEIGHT, WIDTH)


@pytest.fixture(autouse=True)
def nothing_checked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tiff, "_obstacles", type(fast_tiff._obstacles)())


def jpeg(subsampling: str = "420", **options: object) -> Callable[[np.ndarray], bytes]:
    return lambda tile: imagecodecs.jpeg8_encode(tile, level=80, subsampling=subsampling, **options)


def jpeg2000(**options: object) -> Callable[[np.ndarray], bytes]:
    return lambda tile: imagecodecs.jpeg2k_encode(tile, level=40, codecformat="j2k", reversible=False, **options)


def deflate(tile: np.ndarray) -> bytes:
    return zlib.compress(tile.tobytes())


def differences(tile: np.ndarray) -> np.ndarray:
    return np.diff(tile, axis=1, prepend=np.zeros_like(tile[:, :1]))


def write_abbreviated(path: Path, image: np.ndarray, colours: str) -> Path:
    encode = jpeg("420") if colours == "ycbcr" else jpeg("444", outcolorspace="RGB")
    tables, _ = split_jpeg(encode(image[:240, :240].copy()))
    return write_tiled(
        path,
        image,
        lambda tile: split_jpeg(encode(tile))[1],
        tile=(240, 240),
        photometric=colours,
        subsampling=(2, 2) if colours == "ycbcr" else None,
        jpegtables=tables,
        description=APERIO.format(WIDTH, HEIGHT),
    )


DIFFERENCES = {"photometric": "rgb", "predictor": 2}
KINDS: dict[str, Callable[[Path, np.ndarray], Path]] = {
    "4:2:0": lambda path, image: write_tiled(path, image, jpeg("420"), subsampling=(2, 2)),
    "4:2:2": lambda path, image: write_tiled(path, image, jpeg("422"), subsampling=(2, 1)),
    "4:4:4": lambda path, image: write_tiled(path, image, jpeg("444"), subsampling=(1, 1)),
    "4:4:0": lambda path, image: write_tiled(path, image, jpeg("440"), subsampling=(2, 2)),
    "4:1:1": lambda path, image: write_tiled(path, image, jpeg("411"), subsampling=(4, 1)),
    "RGB": lambda path, image: write_tiled(path, image, jpeg("444", outcolorspace="RGB"), photometric="rgb"),
    "YCbCr that the file calls RGB": lambda path, image: write_tiled(path, image, jpeg("444"), photometric="rgb"),
    "tables, Aperio, YCbCr": lambda path, image: write_abbreviated(path, image, "ycbcr"),
    "tables, Aperio, RGB": lambda path, image: write_abbreviated(path, image, "rgb"),
    "oblong tiles": lambda path, image: write_tiled(path, image, jpeg(), tile=(128, 320), subsampling=(2, 2)),
    "optimised, BigTIFF": lambda path, image: write_tiled(
        path, image, jpeg(optimize=True), subsampling=(2, 2), bigtiff=True
    ),
    "JPEG 2000, Aperio, YCbCr": lambda path, image: write_tiled(
        path, image, jpeg2000(mct=False), compression=33003, description=APERIO.format(WIDTH, HEIGHT)
    ),
    "JPEG 2000, Aperio, RGB": lambda path, image: write_tiled(
        path, image, jpeg2000(), compression=33005, photometric="rgb", description=APERIO.format(WIDTH, HEIGHT)
    ),
    "uncompressed": lambda path, image: write_tiled(
        path, image, lambda tile: tile.tobytes(), compression=1, photometric="rgb"
    ),
    "deflate": lambda path, image: write_tiled(path, image, deflate, compression=8, photometric="rgb"),
    "deflate, old number": lambda path, image: write_tiled(path, image, deflate, compression=32946, photometric="rgb"),
    "LZW": lambda path, image: write_tiled(path, image, imagecodecs.lzw_encode, compression=5, photometric="rgb"),
    "LZW of differences": lambda path, image: write_tiled(
        path,
        image,
        lambda tile: imagecodecs.lzw_encode(differences(tile)),
        compression=5,
        photometric="rgb",
        predictor=2,
    ),
    "deflate of differences": lambda path, image: write_tiled(
        path, image, lambda tile: deflate(differences(tile)), compression=8, photometric="rgb", predictor=2
    ),
}


def reference(path: Path, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
    """What openslide-python gives, on white; a handle of its own for each region."""
    with openslide.OpenSlide(path) as slide:
        region = slide.read_region((x, y), level, (width, height))
    white = Image.new("RGBA", region.size, "white")
    white.alpha_composite(region)
    return np.asarray(white.convert("RGB"))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_openslide(tmp_path: Path, image: np.ndarray, kind: str) -> None:
    path = KINDS[kind](tmp_path / "s.tiff", image)
    rng = np.random.default_rng(1)
    with Slide(path, "S") as slide:
        assert [slide.decodes_directly(level) for level in range(3)] == [True] * 3
        for level, (level_width, level_height) in enumerate(slide.level_dimensions):
            step = 2**level
            whole = reference(path, 0, 0, level, level_width, level_height)
            assert np.array_equal(slide.read_region(0, 0, level, level_width, level_height), whole)
            around = np.pad(whole, ((480, 480), (480, 480), (0, 0)), constant_values=255)
            for _ in range(12):
                x, y = (int(rng.integers(-80, side)) for side in (level_width, level_height))
                width, height = (int(side) for side in rng.integers(1, 400, 2))
                found = slide.read_region(x * step, y * step, level, width, height)
                assert np.array_equal(found, around[y + 480 :, x + 480 :][:height, :width])
                assert found.flags.writeable and found.flags.c_contiguous


def test_the_pixels_are_not_openslides_doing(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = KINDS["4:2:0"](tmp_path / "s.tiff", image)
    with Slide(path, "S") as slide:
        assert slide.decodes_directly(0)
        monkeypatch.setattr(slide, "_compose", None)
        assert np.array_equal(slide.read_region(3, 5, 0, 600, 500), reference(path, 3, 5, 0, 600, 500))
        slide.shrunk(0, 4)


def test_between_two_pixels_of_a_level_openslide_interpolates(tmp_path: Path, image: np.ndarray) -> None:
    path = KINDS["4:2:0"](tmp_path / "s.tiff", image)
    with Slide(path, "S") as slide:
        assert slide.decodes_directly(2)
        for x, y in ((401, 200), (400, 202), (7, 9)):
            wanted = reference(path, x, y, 2, 100, 90)
            assert np.array_equal(slide.read_region(x, y, 2, 100, 90), wanted)
            assert not np.array_equal(slide.read_region(x // 4 * 4, y // 4 * 4, 2, 100, 90), wanted)


def test_a_fractional_level_is_left_to_openslide(tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    write_tiled(path, texture(1001, 1241), jpeg(), subsampling=(2, 2), downsamples=(1, 2, 4))
    with Slide(path, "S") as slide:
        assert slide.level_downsamples[1] != 2
        assert [slide.decodes_directly(level) for level in range(3)] == [True, False, False]
        # corners that are a whole number of the level's pixels in none of the senses
        for x, y in ((0, 0), (600, 300), (801, 401)):
            assert np.array_equal(slide.read_region(x, y, 1, 120, 90), reference(path, x, y, 1, 120, 90))


def test_other_files_are_left_to_openslide(tmp_path: Path, image: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    grey = tmp_path / "grey.tiff"
    encode = lambda tile: imagecodecs.jpeg8_encode(tile[..., 1].copy(), level=80)  # noqa: E731
    with tifffile.TiffWriter(grey) as writer:
        tiles = [encode(image[y : y + 256, x : x + 256]) for y in (0, 256) for x in (0, 256)]
        writer.write(
            iter(tiles), shape=(512, 512), dtype=np.uint8, tile=(256, 256), compression=7, photometric="minisblack"
        )
    same_size = tmp_path / "same.tiff"  # which of two directories OpenSlide takes is not known here
    write_tiled(same_size, image[:512, :512], jpeg(), subsampling=(2, 2), downsamples=(1, 1))
    separate = tmp_path / "separate.tiff"
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    tifffile.imwrite(separate, planes, tile=(256, 256), photometric="rgb", planarconfig="separate", metadata=None)
    for path in (grey, same_size, separate):
        with caplog.at_level(logging.DEBUG, "dinoscope"), Slide(path, "S", mpp=0.5) as slide:
            assert not slide.decodes_directly(0)
            assert np.array_equal(slide.read_region(30, 40, 0, 300, 200), reference(path, 30, 40, 0, 300, 200))
    assert caplog.text.count("level 0 is read by OpenSlide") == 3


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("big", [False, True])
def test_the_index_is_that_of_tifffile(tmp_path: Path, image: np.ndarray, order: str, big: bool) -> None:
    path = tmp_path / "s.tiff"
    write_tiled(path, image, jpeg(), subsampling=(2, 2), missing=(3,), order=order, bigtiff=big, jpegtables=b"tables")
    with tifffile.TiffFile(path) as theirs, open(path, "rb") as file:
        ours = tiled_images(file.fileno())
        assert len(ours) == len(theirs.pages) == 3
        for found, page in zip(ours, theirs.pages, strict=True):
            assert (found.width, found.height) == (page.imagewidth, page.imagelength)
            assert (found.tile_width, found.tile_height) == (page.tilewidth, page.tilelength)
            assert (found.compression, found.photometric, found.tables) == (7, 6, page.jpegtables)
            assert found.offsets[:3].tolist() == list(page.dataoffsets[:3])
            assert found.sizes.tolist() == list(page.databytecounts)


def test_strips_have_no_tiles(tmp_path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(tmp_path / "strips.tiff", image, rowsperstrip=64, photometric="rgb")
    with open(tmp_path / "strips.tiff", "rb") as file:
        assert tiled_images(file.fileno()) == []


def test_a_slide_whose_decoded_pixels_differ_is_left_to_openslide(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def one_off(stream: bytes, image: object) -> np.ndarray:
        tile = imagecodecs.jpeg8_decode(stream, colorspace="YCBCR", outcolorspace="RGB")
        tile[100, 100, 1] ^= 1
        return tile

    path = KINDS["4:2:0"](tmp_path / "s.tiff", image)
    monkeypatch.setattr(fast_tiff, "decoder", lambda image: one_off)
    for _ in range(2):
        with caplog.at_level(logging.DEBUG, "dinoscope"), Slide(path, "S") as slide:
            for _ in range(2):
                assert np.array_equal(slide.read_region(0, 0, 0, 512, 512), reference(path, 0, 0, 0, 512, 512))
            assert not slide.decodes_directly(0)
    assert caplog.text.count("slide 'S': level 0 is read by OpenSlide: decoding its tiles does not give") == 1


def test_parts_of_tiles_are_compared_too(tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fast_tiff.window_decoder

    def one_off(image: object) -> Callable[..., np.ndarray]:
        return lambda *arguments: real(image)(*arguments) ^ np.uint8(1)

    path = KINDS["JPEG 2000, Aperio, RGB"](tmp_path / "s.tiff", image)
    monkeypatch.setattr(fast_tiff, "window_decoder", one_off)
    with Slide(path, "S") as slide:
        assert not slide.decodes_directly(0)
        assert np.array_equal(slide.read_region(9, 9, 0, 300, 300), reference(path, 9, 9, 0, 300, 300))


def test_a_slide_is_checked_once_a_process_unless_its_file_changes(
    tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = []
    real = fast_tiff.agrees
    monkeypatch.setattr(fast_tiff, "agrees", lambda *arguments: checks.append(1) or real(*arguments))
    path = KINDS["4:2:0"](tmp_path / "s.tiff", image)

    def read() -> int:
        with Slide(path, "S") as slide:
            slide.read_region(0, 0, 0, 10, 10)
            slide.read_region(90, 0, 0, 10, 10)
        return len(checks)

    assert (read(), read()) == (1, 1)
    os.utime(path, ns=(1, 1))
    assert (read(), read()) == (2, 2)


# damage


def damaged(path: Path, number: int, change: Callable[[bytearray], bytes]) -> tuple[Path, int, int]:
    """Changes the bytes of one tile of level 0 in place; gives the tile's corner."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        start, size = page.dataoffsets[number], page.databytecounts[number]
        columns = -(-page.imagewidth // page.tilewidth)
        corner = (number % columns * page.tilewidth, number // columns * page.tilelength)
    content = bytearray(path.read_bytes())
    stream = bytes(change(content[start : start + size]))
    content[start : start + size] = stream[:size].ljust(size, b"\0")
    path.write_bytes(content)
    return path, *corner


DAMAGES: dict[str, Callable[[bytearray], bytes]] = {
    "zeros": lambda stream: bytes(len(stream)),
    "cut": lambda stream: stream[: len(stream) * 2 // 3],
    "a lost sector": lambda stream: stream[:1500] + bytes(512) + stream[2012:],
    "noise": lambda stream: stream[:900] + np.random.default_rng(2).bytes(512) + stream[1412:],
    "another size": lambda stream: imagecodecs.jpeg8_encode(np.zeros((128, 128, 3), np.uint8)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tiles_end_as_openslide_says_and_the_others_can_be_read(
    tmp_path: Path, image: np.ndarray, damage: str
) -> None:
    sound = KINDS["4:4:4"](tmp_path / "sound.tiff", image)
    copy = tmp_path / "s.tiff"
    copy.write_bytes(sound.read_bytes())
    path, x, y = damaged(copy, 7, DAMAGES[damage])
    with pytest.raises(openslide.OpenSlideError) as theirs:
        reference(path, x, y, 0, 256, 256)
    with Slide(path, "S 1") as slide:
        assert slide.decodes_directly(0)
        assert np.array_equal(slide.read_region(0, 0, 0, 500, 250), reference(sound, 0, 0, 0, 500, 250))
        with pytest.raises(SlideError) as caught:
            slide.read_region(x - 10, y + 5, 0, 256, 200)
    message = str(caught.value)
    assert message.startswith(f"slide 'S 1' (file s.tiff) cannot be read at x {x - 10}, y {y + 5} of level 0, it is ")
    assert str(theirs.value) in message and message.endswith("copy it again from the scanner")


def read_or_none(read: Callable[[], np.ndarray]) -> np.ndarray | None:
    try:
        return read()
    except (openslide.OpenSlideError, SlideError):
        return None


@pytest.mark.parametrize(("kind", "noticed"), [("4:2:2", 1.0), ("4:4:4", 1.0), ("RGB", 1.0), ("4:2:0", 0.5)])
def test_single_wrong_bits(tmp_path: Path, shared: Path, kind: str, noticed: float) -> None:
    """Where OpenSlide refuses a tile, so is it here; where it does not, the pixels are the same.

    Exception: where chroma is averaged over rows, a tile whose data end within its last block is not always noticed.
    """
    tissue = reference(shared / "data" / "wsi" / "CMU-1-Small-Region.svs", 600, 600, 0, 512, 512)
    sound = KINDS[kind](tmp_path / "sound.tiff", tissue).read_bytes()
    rng = np.random.default_rng(3)
    both_read = both_fail = missed = 0
    for _ in range(60):
        path = tmp_path / "s.tiff"
        path.write_bytes(sound)
        position, bit = int(rng.integers(800, 8000)), 1 << int(rng.integers(8))

        def flip(stream: bytearray, position: int = position, bit: int = bit) -> bytes:
            stream[position % len(stream)] ^= bit
            return stream

        path, x, y = damaged(path, int(rng.integers(4)), flip)
        wanted = read_or_none(lambda path=path, x=x, y=y: reference(path, x, y, 0, 256, 256))
        with Slide(path, "S") as slide:
            found = read_or_none(lambda slide=slide, x=x, y=y: slide.read_region(x, y, 0, 256, 256))
        if wanted is None:
            both_fail += found is None
            missed += found is not None
        else:
            assert np.array_equal(found, wanted)
            both_read += 1
    assert both_read > 10 and both_fail > 10
    assert both_fail >= noticed * (both_fail + missed)


def test_a_grey_slide_is_no_damage(tmp_path: Path) -> None:
    grey = np.full((512, 512, 3), 128, np.uint8)
    path = write_tiled(tmp_path / "s.tiff", grey, jpeg(), subsampling=(2, 2), downsamples=(1,))
    with Slide(path, "S") as slide:
        assert (slide.read_region(10, 10, 0, 400, 400) == 128).all()


@pytest.mark.parametrize("description", [None, APERIO.format(WIDTH, HEIGHT)], ids=["generic", "Aperio"])
def test_missing_tiles_are_what_openslide_makes_of_them(
    tmp_path: Path, image: np.ndarray, description: str | None
) -> None:
    path = tmp_path / "s.tiff"
    write_tiled(path, image, jpeg(), subsampling=(2, 2), missing=(1, 7), description=description)
    with Slide(path, "S") as slide:
        assert slide.decodes_directly(0)
        for level in range(3):
            for x, y in ((0, 0), (200, 240), (256, 0)):
                found = slide.read_region(x << level, y << level, level, 256, 200)
                wanted = np.full((200, 256, 3), 255, np.uint8)
                width, height = slide.level_dimensions[level]
                size = (min(256, width - x), min(200, height - y))
                wanted[: size[1], : size[0]] = reference(path, x << level, y << level, level, *size)
                assert np.array_equal(found, wanted)


def test_directories_that_make_no_sense_have_no_images(tmp_path: Path, image: np.ndarray) -> None:
    good = KINDS["4:2:0"](tmp_path / "s.tiff", image[:512, :512]).read_bytes()
    start = int.from_bytes(good[4:8], "little")
    rng = np.random.default_rng(4)
    contents = [b"", b"II", b"II*\0", good[:start], good[: start + 40], good[:4] + good[4:8] + bytes(40)]
    for _ in range(300):
        content = bytearray(good)
        for place in (start + rng.integers(0, 220, 6)).tolist():
            content[place] = int(rng.integers(256))
        contents.append(bytes(content))
    found = 0
    for number, content in enumerate(contents):
        path = tmp_path / "bad.tiff"
        path.write_bytes(content)
        with open(path, "rb") as file:
            images = tiled_images(file.fileno())
        assert images == [] or number > 5
        found += len(images)
        tiff = fast_tiff.FastTiff(path)
        for tiled in images:
            if tiff.find(tiled.width, tiled.height) is not None:
                tiff.read(tiff.find(tiled.width, tiled.height), 0, 0, min(300, tiled.width), min(300, tiled.height))
        tiff.close()
    assert found


# the cache, threads, processes


def test_the_cache_is_bounded_and_shared_by_a_pool(tmp_path: Path, image: np.ndarray) -> None:
    paths = {str(number): KINDS["4:2:0"](tmp_path / f"{number}.tiff", image) for number in range(3)}
    tile_bytes = 256 * 256 * 3
    pool = SlidePool(paths, max_open=2)
    cache = pool._cache
    cache.max_bytes = 7 * tile_bytes + 1000
    for x, y in np.random.default_rng(5).integers(0, 800, (40, 2)).tolist():
        for name in paths:
            pool[name].read_region(x, y, 0, 200, 180)
            assert cache.num_bytes == len(cache) * tile_bytes <= cache.max_bytes
    first = pool["0"]
    for x in range(0, 1000, 100):
        first.read_region(x, 200, 0, 200, 180)
    assert len(cache) == 7
    pool.close()
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_large_regions_do_not_enter_the_cache(tmp_path: Path, image: np.ndarray) -> None:
    path = KINDS["4:2:0"](tmp_path / "s.tiff", image)
    with Slide(path, "S") as slide:
        slide.read_region(0, 0, 0, 200, 200)
        cache = slide._fast._tiff._cache
        before = len(cache)
        slide.shrunk(0, 4)
        assert 0 < len(cache) == before < 20


def test_neighbours_are_decoded_once(tmp_path: Path, image: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    path = KINDS["4:2:0"](tmp_path / "s.tiff", image)
    decoded = []
    real = fast_tiff.FastTiff._decode
    monkeypatch.setattr(
        fast_tiff.FastTiff, "_decode", lambda self, image, number: decoded.append(number) or real(self, image, number)
    )
    places = [(x, y) for y in range(60, 700, 200) for x in range(40, 1000, 200)]
    for workers in (1, 8):
        with Slide(path, "S") as slide, ThreadPoolExecutor(workers) as threads:
            slide.decodes_directly(0)
            slide._fast._tiff._cache.discard(slide._fast._tiff._owner)
            decoded.clear()
            regions = list(threads.map(lambda place, slide=slide: slide.read_region(*place, 0, 200, 200), places))
        assert len(decoded) == len(set(decoded)) == 20
        whole = reference(path, 0, 0, 0, WIDTH, HEIGHT)
        for (x, y), region in zip(places, regions, strict=True):
            assert np.array_equal(region, whole[y : y + 200, x : x + 200])


def test_tiles_are_kept_only_where_they_are_found_again(tmp_path: Path, image: np.ndarray) -> None:
    path = write_tiled(tmp_path / "s.tiff", image, jpeg(), tile=(64, 64), subsampling=(2, 2), downsamples=(1,))
    whole = reference(path, 0, 0, 0, WIDTH, HEIGHT)
    with Slide(path, "S") as slide:
        assert slide.decodes_directly(0)
        cache = slide._fast._tiff._cache
        cache.max_bytes = 8 * 64 * 64 * 3
        keeps = []

        def read(x: int, y: int) -> None:
            keeps.append(cache._found > 0.1)
            assert np.array_equal(slide.read_region(x, y, 0, 64, 64), whole[y : y + 64, x : x + 64])

        for x, y in np.random.default_rng(8).integers(1, 900, (150, 2)).tolist():
            read(x, y)
        assert keeps[0] and sum(keeps[-50:]) < 5
        for y in range(30, 400, 64):
            for x in range(20, 1100, 64):
                read(x, y)
        assert all(keeps[-50:])


def test_a_tile_that_failed_is_tried_again_and_waiting_threads_are_told() -> None:
    cache = TileCache(1000)
    answers = iter([None, RuntimeError, np.zeros(10, np.uint8)])

    def make() -> np.ndarray | None:
        answer = next(answers)
        if answer is RuntimeError:
            raise answer("no")
        return answer

    assert cache.get((0, 1), make) is None and len(cache) == 0
    with pytest.raises(RuntimeError):
        cache.get((0, 1), make)
    assert len(cache) == 0
    assert cache.get((0, 1), make) is cache.get((0, 1), make) and cache.num_bytes == 10
    cache.get((1, 1), lambda: np.zeros(2000, np.uint8))  # larger than the cache: given, not kept
    assert (len(cache), cache.num_bytes) == (0, 0)


def test_forked_and_pickled_pools_open_files_of_their_own(tmp_path: Path, image: np.ndarray) -> None:
    path = KINDS["4:2:0"](tmp_path / "s.tiff", image)
    whole = reference(path, 0, 0, 0, WIDTH, HEIGHT)
    pool = SlidePool({"S": path})
    mine = pool["S"]
    mine.read_region(0, 0, 0, 300, 300)
    copy = pickle.loads(pickle.dumps(pool))
    assert copy["S"].decodes_directly(0) and copy._cache is not pool._cache
    with pool._cache._lock:  # as if another thread were reading while this one forks
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            same = all(
                np.array_equal(pool["S"].read_region(x, 90, 0, 300, 300), whole[90:390, x : x + 300])
                for x in range(0, 900, 100)
            )
            os.write(writer, struct.pack("??", same, pool["S"] is not mine))
            os._exit(0)
    os.waitpid(child, 0)
    assert struct.unpack("??", os.read(reader, 2)) == (True, True)
    assert np.array_equal(mine.read_region(7, 9, 0, 300, 300), whole[9:309, 7:307])
    pool.close()
    copy.close()


def test_files_are_closed(tmp_path: Path, image: np.ndarray) -> None:
    path = KINDS["4:2:0"](tmp_path / "s.tiff", image)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Slide(path, "S") as slide:
            slide.read_region(0, 0, 0, 10, 10)
        slide = Slide(path, "S")  # let go without being closed
        del slide
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_colours_of_jpeg_2000(tmp_path: Path) -> None:
    """All pairs of luma and blue chroma with 16 values of red chroma, stored without loss."""
    luma, blue = np.meshgrid(np.arange(256), np.arange(256))
    reds = [0, 1, 255, *np.random.default_rng(6).integers(2, 255, 13).tolist()]
    image = np.hstack([np.stack([luma, blue, np.full_like(luma, red)], -1) for red in reds]).astype(np.uint8)
    path = write_tiled(
        tmp_path / "s.tiff",
        image,
        lambda tile: imagecodecs.jpeg2k_encode(tile, level=0, codecformat="j2k", reversible=True, mct=False),
        compression=33003,
        downsamples=(1,),
        description=APERIO.format(4096, 256),
    )
    with Slide(path, "S") as slide:
        assert slide.decodes_directly(0)
        assert np.array_equal(slide.read_region(0, 0, 0, 4096, 256), reference(path, 0, 0, 0, 4096, 256))


@pytest.mark.parametrize("kind", ["JPEG 2000, Aperio, YCbCr", "JPEG 2000, Aperio, RGB", "4:2:0", "deflate"])
def test_tiles_that_are_not_kept_have_the_same_pixels(
    tmp_path: Path, image: np.ndarray, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of JPEG 2000 only parts are decoded then."""
    monkeypatch.setattr(TileCache, "worthwhile", lambda self: False)
    path = KINDS[kind](tmp_path / "s.tiff", image)
    whole = reference(path, 0, 0, 0, WIDTH, HEIGHT)
    rng = np.random.default_rng(11)
    with Slide(path, "S") as slide:
        assert slide.decodes_directly(0)
        for _ in range(40):
            width, height = (int(side) for side in rng.integers(1, 400, 2))
            x, y = int(rng.integers(WIDTH - width)), int(rng.integers(HEIGHT - height))
            assert np.array_equal(slide.read_region(x, y, 0, width, height), whole[y : y + height, x : x + width])
        assert len(slide._fast._tiff._cache) == 0


# real slides


def test_a_real_aperio_slide(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared / "data" / "wsi" / "CMU-1-Small-Region.svs"
    whole = reference(path, 0, 0, 0, 2220, 2967)
    rng = np.random.default_rng(7)
    with Slide(path, "S") as slide:
        assert slide.decodes_directly(0)
        monkeypatch.setattr(slide, "_compose", None)
        assert np.array_equal(slide.read_region(0, 0, 0, 2220, 2967), whole)
        for _ in range(50):
            x, y, side = int(rng.integers(1900)), int(rng.integers(2600)), int(rng.integers(1, 320))
            assert np.array_equal(slide.read_region(x, y, 0, side, side), whole[y : y + side, x : x + side])


@pytest.mark.parametrize("name", ["test3-DAPI-2-(387).ndpi", "dicom_camelyon"])
def test_real_slides_that_only_openslide_reads(shared: Path, name: str) -> None:
    with Slide(shared / "data" / "wsi" / name, "S") as slide:
        assert not slide.decodes_directly(0)
        path = slide.files()[0]
        for level in range(slide.num_levels):
            width, height = (min(side, 300) for side in slide.level_dimensions[level])
            wanted = reference(path, 0, 0, level, width, height)
            assert np.array_equal(slide.read_region(0, 0, level, width, height), wanted)
