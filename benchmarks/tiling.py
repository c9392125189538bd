"""Tissue and grid of a slide of 40,000 x 40,000 px against a bare minimum, and tile_slide.py from start to exit.

Builds the slide in a temporary folder: a pyramid of JPEG tiles, the texture of a real slide repeated over pieces of
tissue on glass. The bare minimum opens the slide, reads the level of 16 um a pixel with OpenSlide, thresholds the
saturation by Otsu's method, closes gaps and sums up (the integral image from which tiles are counted). Both are timed
alternately in one process, by the wall clock and by the time of the processor, which tells more on a busy machine.

    python benchmarks/tiling.py --texture ../shared/data/wsi/CMU-1-Small-Region.svs
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import openslide

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow_scripts"))

from dinoscope.slides.grid import TileSet, make_grid  # noqa: E402
from dinoscope.slides.quality import quality_maps, tile_focus  # noqa: E402
from dinoscope.slides.reader import Slide  # noqa: E402
from dinoscope.slides.tiff_writer import write_pyramid  # noqa: E402
from dinoscope.slides.tissue import detect_tissue  # noqa: E402

SIDE, BLOCK, CELL, TILE = 40_000, 2048, 512, 256
MPP, NUM_LEVELS = 0.5, 7
GLASS = (243, 242, 244)
SETS = (TileSet("train", 512, 0.5), TileSet("features", 224, 0.5))


def main() -> None:
    """Builds the slide, measures, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texture", type=Path, help="slide whose middle is repeated; noise when not given")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each")
    parser.add_argument("--keep", type=Path, help="the slide: written here if missing, and kept")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.keep or Path(folder) / "large.tiff"
        if not path.exists():
            build(path, _texture(arguments.texture))
        print(f"{path.stat().st_size / 1e6:.0f} MB, {SIDE} x {SIDE} px, levels 1 to {2 ** (NUM_LEVELS - 1)}")
        functions = [lambda: bare_minimum(path), lambda: tissue_and_grid(path)]
        for name, clock in (("wall clock", time.perf_counter), ("processor", time.process_time)):
            minimum, ours = _interleaved(functions, arguments.rounds, clock)
            print(
                f"{name}: bare minimum {1e3 * np.median(minimum):.1f} ms (least {1e3 * min(minimum):.1f}), tissue and "
                f"grid {1e3 * np.median(ours):.1f} ms (least {1e3 * min(ours):.1f}), ratio "
                f"{np.median(ours) / np.median(minimum):.2f} (least {min(ours) / min(minimum):.2f})"
            )
        seconds, private, resident = zip(*(script(path, Path(folder)) for _ in range(5)), strict=True)
        print(f"tile_slide.py     median {np.median(seconds):6.2f} s,  least {min(seconds):6.2f} s")
        print(f"  peak memory     private {max(private):.0f} MB, resident {max(resident):.0f} MB")
        print(f"focus             {1e3 * focus_seconds(path):.1f} ms a tile of {SETS[1].tile_px} px")


def bare_minimum(path: Path) -> np.ndarray:
    """The least that any such tool must do."""
    with openslide.OpenSlide(str(path)) as slide:
        level = slide.get_best_level_for_downsample(16 / MPP)
        image = np.asarray(slide.read_region((0, 0), level, slide.level_dimensions[level]))
    saturation = cv2.cvtColor(image[..., :3], cv2.COLOR_RGB2HSV)[..., 1]
    mask = cv2.threshold(saturation, 0, 1, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[1]
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    return cv2.integral(mask)


def tissue_and_grid(path: Path) -> int:
    """What tile_slide.py does between opening the slide and writing; the number of tiles."""
    with Slide(path, "S") as slide:
        tissue = detect_tissue(slide)
        quality = quality_maps(slide, tissue)
        return sum(len(make_grid(slide, tissue, tile_set, quality)) for tile_set in SETS)


def focus_seconds(path: Path, count: int = 500) -> float:
    """Seconds a tile that the focus takes, in raster order."""
    with Slide(path, "S") as slide:
        grid = make_grid(slide, detect_tissue(slide), SETS[1])
        level, read_px, footprint_px, _ = grid.reading
        start = time.perf_counter()
        list(tile_focus(slide, grid.x[:count], grid.y[:count], level, read_px, SETS[1].tile_px, footprint_px))
        return (time.perf_counter() - start) / count


def script(path: Path, folder: Path) -> tuple[float, float, float]:
    """Seconds from start to exit, and the largest private and resident memory in MB."""
    command = [sys.executable, ROOT / "workflow_scripts/tile_slide.py", "--slide", path, "--slide-id", "S"]
    for tile_set in SETS:
        command += ["--set", tile_set.name, tile_set.tile_px, tile_set.mpp, folder / f"{tile_set.name}.parquet"]
    command += ["--overview", folder / "o.jpg", "--outline", folder / "o.geojson"]
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    private = resident = 0.0
    while process.poll() is None:
        status = _status(process.pid)
        private, resident = max(private, status.get("RssAnon", 0)), max(resident, status.get("VmHWM", 0))
        time.sleep(0.002)
    assert process.returncode == 0
    return time.perf_counter() - start, private, resident


def build(path: Path, texture: np.ndarray) -> None:
    """Writes the slide: `texture` (BLOCK x BLOCK) repeated where cells of CELL px are tissue."""
    cells = _cells()
    textures = [texture]
    while len(textures) < NUM_LEVELS:
        half = textures[-1].shape[0] // 2
        textures.append(cv2.resize(textures[-1], (half, half), interpolation=cv2.INTER_AREA))
    sides = [SIDE >> level for level in range(NUM_LEVELS)]
    levels = ((side, side, _tiles(textures[level], cells, level, side)) for level, side in enumerate(sides))
    write_pyramid(path, levels, MPP)


def _tiles(texture: np.ndarray, cells: np.ndarray, level: int, side: int) -> Iterator[bytes]:
    @functools.cache
    def encoded(phase_x: int, phase_y: int, where: bytes) -> bytes:
        rows, columns = ((np.arange(TILE) + phase) % len(texture) for phase in (phase_y, phase_x))
        tissue = np.frombuffer(where, bool).reshape(TILE, TILE)
        tile = np.where(tissue[..., None], texture[rows[:, None], columns], np.uint8(GLASS))
        return cv2.imencode(".jpg", tile[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()

    for top in range(0, side, TILE):
        for left in range(0, side, TILE):
            rows, columns = (((np.arange(start, start + TILE) << level) // CELL) for start in (top, left))
            where = cells[np.minimum(rows, len(cells) - 1)[:, None], np.minimum(columns, len(cells) - 1)]
            yield encoded(left % len(texture), top % len(texture), where.tobytes())


def _cells() -> np.ndarray:
    """Which cells are tissue: three sections, one with a hole, a few crumbs; about two fifths of all."""
    number = -(-SIDE // CELL)
    cells = np.zeros((number, number), np.uint8)
    for x, y, radius in ((22, 24, 19), (58, 26, 15), (36, 62, 13)):
        cv2.circle(cells, (x, y), radius, 1, cv2.FILLED)
    cv2.circle(cells, (22, 24), 4, 0, cv2.FILLED)
    cells[tuple(np.random.default_rng(0).integers(0, number, (2, 12)))] = 1
    return cells > 0


def _texture(path: Path | None) -> np.ndarray:
    if path is None:
        noise = np.random.default_rng(0).standard_normal((BLOCK, BLOCK, 3), dtype=np.float32)
        noise = cv2.GaussianBlur(noise, (0, 0), 4)
        return np.clip((205, 130, 170) + 25 * noise / noise.std(), 0, 255).astype(np.uint8)
    with Slide(path, "texture") as slide:
        region = slide.read_region(int(0.29 * slide.width), int(0.78 * slide.height), 0, 600, 600)
    # mirrored, so that its edges fit together
    region = np.concatenate([region, region[:, ::-1]], axis=1)
    region = np.concatenate([region, region[::-1]])
    return np.tile(region, (2, 2, 1))[:BLOCK, :BLOCK]


def _interleaved(
    functions: list[Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in functions]
    for number in range(rounds + 1):
        for function, measured in zip(functions, times, strict=True):
            start = clock()
            function()
            if number:  # the first round warms the file cache
                measured.append(clock() - start)
    return times


def _status(pid: int) -> dict[str, float]:
    """Memory of a process in MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}


if __name__ == "__main__":
    cv2.setNumThreads(1)
    main()
