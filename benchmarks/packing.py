"""Packed tiles beside tiles of the slides: bytes a tile, tiles a second, and how much JPEG changes.

    python benchmarks/packing.py --manifest results/manifests/train.parquet --slides config/slides.tsv

Packs the tiles of every slide of a manifest in several qualities, then reads random tiles in one process, from the
slides and packed, in turns; the disk cache is warm. Prints Markdown: bytes a tile, CPU milliseconds to pack and to read
one, the mean difference of the pixels, and after how many readings of every tile packing has paid in CPU time.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))


from dinoscope.data.packed import open_packed
from dinoscope.data.packing import pack_slide, write_index
from dinoscope.data.sources import TrainingImages
from dinoscope.data.tiles import open_tiles
from dinoscope.files import read_json
from dinoscope.slides.manifest import TILE_SCHEMA, read_tiles, write_tiles
from dinoscope.slides.reader import Slide
from dinoscope.slides.table import read_slide_table

SETTINGS = [
    (80, "4:2:0", False),
    (90, "4:2:0", False),
    (90, "4:4:4", False),
    (95, "4:4:4", False),
    (90, "4:2:0", True),  # JPEGs that the slide stores are copied
]


def milliseconds(action: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    action()
    return 1e3 * (time.process_time() - start)


def pack_all(manifest: Path, slides: str, folder: Path, quality: int, subsampling: str, copies: bool) -> Path:
    """The index of the packed tiles of all slides."""
    records = {record.slide_id: record for record in read_slide_table(slides)}
    table = read_tiles(manifest)
    for name in table["slide_id"].unique().to_pylist():
        mine = table.filter([value == name for value in table["slide_id"].to_pylist()])
        about = {"slide_id": name, "tile_set": "train", "tile_px": 0, "requested_mpp": 0, "stride_px": 0}
        write_tiles(folder / f"{name}.parquet", mine.cast(TILE_SCHEMA), about)
        opened = functools.partial(Slide, records[name].path, name, records[name].mpp)
        output = folder / f"{name}.arrow"
        options = {"quality": quality, "subsampling": subsampling, "copy_stored": copies}
        pack_slide(name, opened, folder / f"{name}.parquet", output, **options)
    write_index(manifest, folder, folder / "index.json")
    return folder / "index.json"


def reading(images: TrainingImages, numbers: list[int], repetitions: int) -> float:
    """Median CPU milliseconds of a random tile, the shortest of a tile's repetitions."""
    times = [[milliseconds(lambda k=number: images.read(k)) for number in numbers] for _ in range(repetitions)]
    return statistics.median(map(min, zip(*times, strict=True)))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="merged tile manifest")
    parser.add_argument("--slides", required=True, help="where its slides are")
    parser.add_argument("--tiles", type=int, default=60, help="tiles to read")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    cv2.setNumThreads(0)
    on_slides = open_tiles(arguments.manifest, arguments.slides)
    read_tiles(arguments.manifest)  # imports what the first reading needs
    for number in range(min(len(on_slides), arguments.tiles)):  # opens the slides and fills the disk cache
        on_slides.read(number)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, len(on_slides), arguments.tiles).tolist()
    print(f"{len(on_slides)} tiles of {on_slides.windows[0].width} px")
    print("| tiles | kB a tile | packing, CPU ms a tile | reading, CPU ms a tile | faster | mean change | pays after |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for quality, subsampling, copies in SETTINGS:
        with tempfile.TemporaryDirectory() as name:
            start = time.process_time()
            index = pack_all(arguments.manifest, arguments.slides, Path(name), quality, subsampling, copies)
            packing = 1e3 * (time.process_time() - start) / len(on_slides)
            packed = open_packed(arguments.manifest, arguments.slides, index)
            turns = [
                (reading(on_slides, numbers, 1), reading(packed, numbers, 1)) for _ in range(arguments.repetitions)
            ]
            slow, fast = (statistics.median(values) for values in zip(*turns, strict=True))
            changes = [np.abs(on_slides.read(k)[0].astype(int) - packed.read(k)[0]).mean() for k in numbers]
            size = read_json(index)["bytes"] / len(on_slides) / 1e3
            copied = read_json(index)["copied"]
        after = f"{packing / (slow - fast):.1f} readings" if slow > fast else "never"
        told = f", {copied} of {len(on_slides)} copied as stored" if copies else ""
        row = [f"packed, quality {quality}, {subsampling}{told}", f"{size:.0f}", f"{packing:.1f}", f"{fast:.2f}"]
        row += [f"{slow / fast:.1f}", f"{statistics.fmean(changes):.2f}", after]
        print(f"| {' | '.join(row)} |")
    print(f"| of the slides | | | {slow:.2f} | 1 | 0 | |")


if __name__ == "__main__":
    main()
