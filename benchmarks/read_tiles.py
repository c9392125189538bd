"""How fast tiles are read: `Slide` against openslide-python, with its handle kept open and opened for each tile.

    OMP_NUM_THREADS=1 python benchmarks/read_tiles.py --data ../shared/data [--side 16384] [--tiles 300] [--folder DIR]

Makes pyramids of three levels by repeating a real texture (drawn tissue without --data) and reads the same tiles of 256
px of their level 0 in both ways, which take turns in blocks; pixels are compared on the way. Prints the tables for
benchmarks/README.md: CPU time of one process in milliseconds a tile (the file cache is warm, so that nothing is waited
for, and other jobs on the machine count little), and what decoding alone takes of the stored tiles that are needed
(imagecodecs on bytes in memory, each tile once where the order lets it be kept): no reader that uses libjpeg-turbo and
OpenJPEG, as OpenSlide does, can be faster than that. Then tiles a second of several processes by the clock. The slides
take 1 GB; without --folder they are removed afterwards.
"""

import argparse
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import openslide
import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))

from dinoscope.slides.reader import Slide

TILE_PX, TEXTURE_PX, BLOCK, FEW = 256, 2048, 20, 4
STEPS = (1, 4, 8)
REAL, REAL_PX = "CMU-1-Small-Region.svs", 2220
OPENSLIDE_ALONE = {"test3-DAPI-2-(387).ndpi": 3968, "dicom_camelyon": 700}  # of ../shared, and their shorter side
APERIO = "Aperio Image Library v12.0.15\r\n{side}x{side} (256x256)|AppMag = 20|MPP = 0.5"
Place = tuple[int, int]


@dataclass(frozen=True)
class Kind:
    """One way to store a slide: how a tile is encoded, and what tifffile is told of it."""

    name: str
    encode: Callable[[np.ndarray], bytes]
    tags: dict[str, object]
    aperio: bool = False

    @property
    def planes(self) -> int:
        """How many streams a tile has: one, or one a colour."""
        return 3 if self.tags.get("planarconfig") == "separate" else 1


def jpeg(subsampling: str, quality: int, **options: object) -> Callable[[np.ndarray], bytes]:
    """Encoder of JPEG tiles."""
    return lambda tile: imagecodecs.jpeg8_encode(tile, level=quality, subsampling=subsampling, **options)


def jpeg2000(mct: bool) -> Callable[[np.ndarray], bytes]:
    """Encoder of lossy JPEG 2000 tiles of 31 dB; without colour transform they hold YCbCr."""

    def encode(tile: np.ndarray) -> bytes:
        if not mct:
            tile = np.ascontiguousarray(cv2.cvtColor(tile, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]])
        return imagecodecs.jpeg2k_encode(tile, level=31, codecformat="j2k", reversible=False, mct=mct)

    return encode


KINDS = (
    Kind("JPEG 4:2:0, quality 80, generic TIFF", jpeg("420", 80), {"photometric": "ycbcr", "subsampling": (2, 2)}),
    Kind("JPEG 4:4:4, quality 85, generic TIFF", jpeg("444", 85), {"photometric": "ycbcr", "subsampling": (1, 1)}),
    Kind("JPEG RGB, quality 30, Aperio", jpeg("444", 30, outcolorspace="RGB"), {"photometric": "rgb"}, aperio=True),
    Kind("JPEG 2000 YCbCr, Aperio 33003", jpeg2000(False), {"photometric": "ycbcr", "compression": 33003}, aperio=True),
    Kind("JPEG 2000 RGB, Aperio 33005", jpeg2000(True), {"photometric": "rgb", "compression": 33005}, aperio=True),
    Kind("deflate, generic TIFF", imagecodecs.zlib_encode, {"photometric": "rgb", "compression": "adobe_deflate"}),
    Kind(
        "deflate, colours apart (OpenSlide alone)",
        imagecodecs.zlib_encode,
        {"photometric": "rgb", "compression": "adobe_deflate", "planarconfig": "separate"},
    ),
)


def texture(data: Path | None) -> np.ndarray:
    """Real stained tissue, or drawn tissue without it; uint8 (2048, 2048, 3)."""
    if data is None:
        from dinoscope.slides.demo import draw_demo_slide

        return draw_demo_slide("demo_he_1")[1024:][:TEXTURE_PX, 1024:][:, :TEXTURE_PX]
    with Slide(data / "wsi" / REAL) as slide:
        return slide.read_region(60, 600, 0, TEXTURE_PX, TEXTURE_PX)


def write_slide(path: Path, kind: Kind, image: np.ndarray, side: int) -> None:
    """A pyramid in which the image repeats; its tiles are encoded once and stored as often as they occur."""
    with tifffile.TiffWriter(path) as writer:
        for number, step in enumerate(STEPS):
            level = cv2.resize(image, None, fx=1 / step, fy=1 / step, interpolation=cv2.INTER_AREA)
            cuts = range(0, TEXTURE_PX // step, TILE_PX)
            streams = []
            for plane in np.split(level, kind.planes, axis=2):
                cut = [[np.ascontiguousarray(plane[y : y + TILE_PX, x : x + TILE_PX]) for x in cuts] for y in cuts]
                streams.append([[kind.encode(tile) for tile in row] for row in cut])
            places = np.ndindex(kind.planes, side // step // TILE_PX, side // step // TILE_PX)
            writer.write(
                (streams[plane][row % len(cuts)][column % len(cuts)] for plane, row, column in places),
                shape=(3, side // step, side // step) if kind.planes > 1 else (side // step, side // step, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                description=APERIO.format(side=side) if kind.aperio else None,
                subfiletype=1 if number else 0,
                metadata=None,
                resolution=(20000 / step, 20000 / step),
                resolutionunit="CENTIMETER",
                **{"compression": "jpeg"} | kind.tags,
            )


def aligned(side: int, count: int) -> list[Place]:
    """Random tiles that are stored as such."""
    places = np.random.default_rng(0).integers(0, side // TILE_PX, (count, 2)) * TILE_PX
    return [(x, y) for x, y in places.tolist()]


def unaligned(side: int, count: int) -> list[Place]:
    """Random tiles anywhere."""
    return [(x, y) for x, y in np.random.default_rng(1).integers(0, side - TILE_PX, (count, 2)).tolist()]


def raster(side: int, count: int) -> list[Place]:
    """Tiles of a grid that is shifted against the stored tiles, row by row, where there is tissue: a third of it."""
    cells = side // TILE_PX - 1
    noise = cv2.GaussianBlur(np.random.default_rng(2).standard_normal((cells, cells)), (0, 0), 3)
    rows, columns = np.nonzero(noise > np.quantile(noise, 2 / 3))
    middle = len(rows) // 3 if len(rows) > 2 * count else 0
    places = zip(columns[middle:][:count].tolist(), rows[middle:][:count].tolist(), strict=True)
    return [(x * TILE_PX + 100, y * TILE_PX + 60) for x, y in places]


ORDERS = {"aligned": aligned, "unaligned": unaligned, "raster": raster}


def through_openslide(handle: openslide.OpenSlide, place: Place) -> np.ndarray:
    """A tile as openslide-python gives it."""
    return np.asarray(handle.read_region(place, 0, (TILE_PX, TILE_PX)).convert("RGB"))


def opened_for_each(path: Path, place: Place) -> np.ndarray:
    """A tile as in many a tutorial."""
    with openslide.OpenSlide(path) as handle:
        return through_openslide(handle, place)


def composed(handle: openslide.OpenSlide, memory: np.ndarray, place: Place) -> None:
    """OpenSlide's own function alone, into memory that is reused."""
    address = memory.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
    openslide.lowlevel._read_region(handle._osr, address, *place, 0, TILE_PX, TILE_PX)


def compare(path: Path, places: list[Place]) -> list[float]:
    """CPU seconds a tile: OpenSlide kept open, opened for each (some of the tiles), `Slide`, OpenSlide's own part."""
    spent: tuple[list[float], ...] = ([], [], [], [])
    memory = np.empty((TILE_PX, TILE_PX), np.uint32)
    with openslide.OpenSlide(path) as handle, openslide.OpenSlide(path) as other, Slide(path) as slide:
        slide.decodes_directly(0)
        for start in range(0, len(places), BLOCK):
            block = places[start : start + BLOCK]
            ways = (
                (block, lambda place: through_openslide(handle, place)),
                (block[:FEW], lambda place: opened_for_each(path, place)),
                (block, lambda place: slide.read_tile(*place, 0, TILE_PX, TILE_PX)),
                (block, lambda place: composed(other, memory, place)),
            )
            pictures = []
            for times, (chosen, read) in zip(spent, ways, strict=True):
                begin = time.process_time()
                pictures.append([read(place) for place in chosen])
                times.append((time.process_time() - begin) / len(chosen))
            assert all(np.array_equal(*pair) for pair in zip(pictures[0], pictures[2], strict=True))
    return [float(np.median(times)) for times in spent]


def decoding_alone(path: Path, order: str, places: list[Place]) -> float:
    """CPU seconds a tile that a reader cannot go below: of decoding the stored tiles that are needed."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        tables, tile_bytes = page.jpegtables, page.tilewidth * page.tilelength * 3
        decode = lambda stream: imagecodecs.deflate_decode(stream, out=tile_bytes)  # noqa: E731
        if page.compression == tifffile.COMPRESSION.JPEG:
            colours = {"colorspace": "RGB", "outcolorspace": "RGB"} if page.photometric == 2 else {}
            decode = lambda stream: imagecodecs.jpeg8_decode(stream, tables=tables, **colours)  # noqa: E731
        elif "JPEG_2000" in page.compression.name or page.compression in (33003, 33005):
            decode = imagecodecs.jpeg2k_decode
        numbers = np.random.default_rng(3).integers(0, len(page.dataoffsets), 100).tolist()
        streams = [
            file.filehandle.read_array("u1", page.databytecounts[n], page.dataoffsets[n]).tobytes() for n in numbers
        ]
    spent = []
    for stream in streams:
        begin = time.process_time()
        decode(stream)
        spent.append(time.process_time() - begin)
    across = -(-page.imagewidth // page.tilewidth)
    touched = [_touched(place, page.tilewidth, page.tilelength, across) for place in places]
    needed = len(set().union(*touched)) if order == "raster" else sum(len(each) for each in touched)
    return float(np.median(spent)) * needed / len(places)


def _touched(place: Place, width: int, height: int, across: int) -> set[int]:
    columns = range(place[0] // width, (place[0] + TILE_PX - 1) // width + 1)
    rows_ = range(place[1] // height, (place[1] + TILE_PX - 1) // height + 1)
    return {row * across + column for row in rows_ for column in columns}


def rate(path: Path, places: list[Place], seconds: float) -> tuple[float, float]:
    """Tiles a second by the clock and by the CPU time of this process."""
    with Slide(path) as slide:
        slide.decodes_directly(0)
        begin, spent, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - begin < seconds:
            slide.read_tile(*places[count % len(places)], 0, TILE_PX, TILE_PX)
            count += 1
        return count / (time.perf_counter() - begin), count / (time.process_time() - spent)


def scaling(path: Path, side: int, processes: int, rounds: int = 7) -> np.ndarray:
    """Best tiles a second by the clock and by CPU time: of one process alone, and of each of several at once."""
    alone, together = [], []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        places = unaligned(side, 2000)
        for _ in range(rounds + 1):
            alone.append(pool.submit(rate, path, places, 1.0).result())
            jobs = [pool.submit(rate, path, places, 1.0) for _ in range(processes)]
            together.append(np.mean([job.result() for job in jobs], axis=0))
    return np.array([np.max(rates[1:], axis=0) for rates in (alone, together)])  # the first round starts the processes


def opening(path: Path, count: int = 40) -> tuple[float, float, float]:
    """CPU seconds to open a slide with OpenSlide, with `Slide`, and with `Slide` and the first check of level 0."""
    from dinoscope.slides import fast_tiff

    spent: tuple[list[float], ...] = ([], [], [])
    for _ in range(count):
        fast_tiff._obstacles.clear()
        begin = time.process_time()
        openslide.OpenSlide(path).close()
        first = time.process_time()
        Slide(path).close()
        second = time.process_time()
        with Slide(path) as slide:
            slide.decodes_directly(0)
        third = time.process_time()
        for times, value in zip(spent, (first - begin, second - first, third - second), strict=True):
            times.append(value)
    return tuple(float(np.median(times)) for times in spent)


def rows(folder: Path, side: int, count: int, data: Path | None) -> Iterator[str]:
    """The lines of the table of reading."""
    columns = "OpenSlide kept open, ms | opened for each | dinoscope | times faster | decoding alone, ms | could be"
    yield f"| slide | bytes a tile | order | {columns} |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|---:|"
    slides = [(kind.name, folder / f"{number}.tiff", side, kind.planes == 1) for number, kind in enumerate(KINDS)]
    if data is not None:
        slides.append((f"{REAL} (small: all tiles kept)", data / "wsi" / REAL, REAL_PX, True))
        for name, length in OPENSLIDE_ALONE.items():
            with Slide(data / "wsi" / name) as slide:
                slides.append((f"{name} (OpenSlide alone)", slide.files()[0], length, False))
    for name, path, length, direct in slides:
        for order, places in ORDERS.items():
            chosen = places(length, count)
            if len(chosen) < FEW:  # a slide of so few tiles has no raster order
                continue
            kept, opened, ours, least = compare(path, chosen)
            if direct:
                least = decoding_alone(path, order, chosen)
            times = " | ".join(f"{1e3 * seconds:.2f}" for seconds in (kept, opened, ours))
            faster, bound = (f"{kept / fast:.2f} / {opened / fast:.1f}" for fast in (ours, least))
            yield f"| {name} | {_bytes_a_tile(path)} | {order} | {times} | {faster} | {1e3 * least:.2f} | {bound} |"


def _bytes_a_tile(path: Path) -> str:
    """Of level 0, on average; nothing where that is no tiled TIFF."""
    if path.suffix not in (".tiff", ".svs"):
        return ""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        across, down = -(-page.imagewidth // page.tilewidth), -(-page.imagelength // page.tilelength)
        return f"{sum(page.databytecounts) / (across * down):,.0f}"


def main() -> None:
    """Makes the slides, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with wsi/CMU-1-Small-Region.svs; drawn tissue without it")
    parser.add_argument("--side", type=int, default=16384, help="of the slides in pixels, a multiple of 2048")
    parser.add_argument("--tiles", type=int, default=300, help="to read in each order")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where slides are made and kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        image = texture(arguments.data)
        for number, kind in enumerate(KINDS):
            write_slide(folder / f"{number}.tiff", kind, image, arguments.side)
        for line in rows(folder, arguments.side, arguments.tiles, arguments.data):
            print(line, flush=True)
        alone, each = scaling(folder / "0.tiff", arguments.side, arguments.processes)
        for name, one, several in zip(("clock", "CPU time"), alone, each, strict=True):
            print(
                f"tiles/s by {name}: {one:.0f} in one process, {several:.0f} in each of {arguments.processes}: "
                f"{several / one:.2f}"
            )
        spent = (f"{1e3 * seconds:.1f}" for seconds in opening(folder / "0.tiff"))
        print("opening, ms: OpenSlide {}, Slide {}, with the check {}".format(*spent))


if __name__ == "__main__":
    main()
