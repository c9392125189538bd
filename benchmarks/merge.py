"""Merging the tiles of 10,000 slides into one manifest: seconds, peak memory, and whether order counts.

    python benchmarks/merge.py [--rows 10000] [--slides 10000] [--folder DIR] [--again]

Makes the manifests of the slides (all of the same tiles, so that it takes seconds) and merges them with
merge_manifest.py in a process of its own; with --again a second time, in another order and made in another order, and
compares the bytes. Prints the table for benchmarks/README.md; 1e8 rows want 3 GB of disk for the while.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "workflow_scripts"))

from dinoscope.files import sha256_file  # noqa: E402
from dinoscope.slides.manifest import read_metadata, tile_table, write_tiles  # noqa: E402


def template(path: Path, rows: int) -> bytes:
    """A slide's manifest, in which the slide's id stands as it is, so that it can be replaced byte by byte."""
    rng = np.random.default_rng(0)
    side = int(np.ceil(np.sqrt(2.5 * rows)))
    chosen = np.sort(rng.choice(side * side, rows, replace=False))
    columns = {"x": chosen % side * 1024, "y": chosen // side * 1024, "level": 1, "read_px": 1024, "tile_px": 512}
    columns |= {"mpp": 0.5, "footprint_px": 1024, "tissue_fraction": rng.random(rows), "section_id": chosen % 7}
    columns |= {name: rng.random(rows) for name in ("white_fraction", "grey_fraction", "focus")}
    columns |= {name: np.zeros(rows) for name in ("black_fraction", "pen_fraction")}
    about = {"slide_id": "slide_00000", "tile_set": "train", "tile_px": 512, "requested_mpp": 0.5, "stride_px": 512}
    about |= {"width": 100_000, "height": 80_000, "mpp_x": 0.25, "mpp_y": 0.25, "num_levels": 4, "vendor": "aperio"}
    tiles = tile_table("slide_00000", columns)
    write_tiles(path, tiles, about)
    metadata = pq.read_schema(path).metadata
    compression = {name: "none" if name == "slide_id" else "zstd" for name in tiles.column_names}
    pq.write_table(tiles.replace_schema_metadata(metadata), path, compression=compression)
    return path.read_bytes()


def make(folder: Path, rows: int, order: list[int]) -> list[Path]:
    """Manifests of the slides of these numbers, in this order."""
    folder.mkdir()
    content = template(folder / "template.parquet", rows)
    (folder / "template.parquet").unlink()
    paths = []
    for number in order:
        paths.append(folder / f"slide_{number:05d}.parquet")
        paths[-1].write_bytes(content.replace(b"slide_00000", b"slide_%05d" % number))
    last = paths[-1]
    assert read_metadata(last)["slide_id"] == last.stem and pq.read_table(last)["slide_id"][0].as_py() == last.stem
    return paths


def merge(paths: list[Path], output: Path) -> tuple[float, float, float]:
    """Seconds by the clock and of the processor, and peak memory in MB, of merging in a process of its own."""
    listed = output.with_suffix(".txt")
    listed.write_text("".join(f"{path}\n" for path in paths), encoding="utf-8")
    script = REPOSITORY / "workflow_scripts" / "merge_manifest.py"
    started = time.perf_counter()
    command = [sys.executable, str(script), "--output", str(output), f"@{listed}"]
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit("error: merging failed")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def main() -> None:
    """Makes, merges, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="tiles a slide")
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where the temporary files lie")
    parser.add_argument("--again", action="store_true", help="merge in another order as well, and compare")
    arguments = parser.parse_args()
    rng, numbers = random.Random(0), list(range(arguments.slides))
    print(
        "| rows | slides | order | processor, s | clock, s | peak memory, MB | file, MB | SHA-256 of the file | load |"
    )
    print("|---:|---:|---|---:|---:|---:|---:|---|---:|")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        for order in ("by name", "shuffled")[: 1 + arguments.again]:
            if order == "shuffled":
                rng.shuffle(numbers)
            paths = make(Path(temporary, order), arguments.rows, numbers)
            if order == "shuffled":
                rng.shuffle(paths)
            output = Path(temporary, f"{order}.parquet")
            load, (clock, processor, megabytes) = os.getloadavg()[0], merge(paths, output)
            print(
                f"| {arguments.rows * arguments.slides:,} | {arguments.slides:,} | {order} | {processor:.0f} |"
                f" {clock:.0f} | {megabytes:.0f} | {output.stat().st_size / 1e6:.0f} | {sha256_file(output)[:12]}… |"
                f" {load:.1f} |",
                flush=True,
            )
            for path in paths:
                path.unlink()


if __name__ == "__main__":
    main()
