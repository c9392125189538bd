"""A manifest of 1e8 tiles: how long it takes to open, what it costs a worker, how fast samples are drawn from it.

    python benchmarks/manifest_scale.py [--rows 100000000] [--slides 10000] [--folder DIR]

Writes the manifests of the slides and merges them as the workflow does, then measures in fresh processes. Prints the
table for benchmarks/README.md. Without --folder everything is removed afterwards (1e8 tiles need 4 GB for the while).
"""

import argparse
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))

BYTES_A_TILE = 40  # parquet twice and the mapped file, with room to spare
SITES, SCANNERS, STAINS = "ABCD", ("Aperio", "Hamamatsu", "3DHISTECH"), ("HE", "IHC:ki67")
STEPS, BATCH = 100, 1024
DRAWS = STEPS * BATCH


def tiles_of_slide(slide: int, rows: int, slides: int) -> tuple[str, int]:
    """Id and number of tiles of a slide: sizes spread over a factor of 9, `rows` together."""
    edges = np.cumsum(1 + 8 * np.random.default_rng(0).random(slides))
    edges = np.round(edges / edges[-1] * rows).astype(int)
    return f"slide_{slide:05d}", int(edges[slide] - (edges[slide - 1] if slide else 0))


def write_part(folder: Path, slide: int, rows: int, slides: int) -> tuple[str, Path]:
    """The manifest of one slide: tissue that covers two fifths of its grid."""
    from dinoscope.slides.manifest import tile_table, write_tiles

    slide_id, count = tiles_of_slide(slide, rows, slides)
    side = int(np.ceil(np.sqrt(2.5 * count))) + 1
    rng = np.random.default_rng(slide)
    chosen = np.sort(rng.choice(side * side, count, replace=False))
    footprint = (1024, 2048)[slide % 2]
    columns = {"x": chosen % side * footprint, "y": chosen // side * footprint, "level": slide % 2, "read_px": 1024}
    columns |= {"tile_px": 512, "mpp": 0.5, "footprint_px": footprint, "tissue_fraction": rng.random(count)}
    about = {"slide_id": slide_id, "tile_set": "train", "tile_px": 512, "requested_mpp": 0.5, "stride_px": 512}
    path = folder / f"{slide_id}.parquet"
    write_tiles(path, tile_table(slide_id, columns), about)
    return slide_id, path


def make(folder: Path, rows: int, slides: int) -> None:
    """Manifest and slide table."""
    from dinoscope.slides.manifest import merge_manifests

    started = time.perf_counter()
    parts = folder / "parts"
    parts.mkdir(parents=True)
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        jobs = [pool.submit(write_part, parts, slide, rows, slides) for slide in range(slides)]
        written = [job.result() for job in jobs]
    progress(f"{slides:,} manifests of slides written in {time.perf_counter() - started:.0f} s")
    with open(folder / "slides.tsv", "w", encoding="utf-8") as table:
        table.write("slide_id\tpath\tsite\tscanner\tstain\n")
        for number, (slide_id, _) in enumerate(written):
            site = SITES[min(int(np.log2(1 + number % 15)), 3)]  # 1 : 2 : 4 : 8
            table.write(f"{slide_id}\t{slide_id}.svs\t{site}\t{SCANNERS[number % 3]}\t{STAINS[number % 10 == 0]}\n")
    started = time.perf_counter()
    merge_manifests([path for _, path in written], folder / "train.parquet")
    shutil.rmtree(parts)
    progress(f"merged in {time.perf_counter() - started:.0f} s")


def measure(folder: Path, what: str) -> dict[str, float]:
    """Measures in a process of its own, which has nothing of the others in its memory."""
    command = [sys.executable, __file__, "--folder", str(folder), "--measure", what]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: float(value) for name, value in (line.split("\t") for line in output.splitlines())}


def measured(folder: Path, what: str) -> Iterator[tuple[str, float]]:
    """What a measuring process prints."""
    import pyarrow.ipc  # noqa: F401 - what a library takes is not the manifest's doing

    from dinoscope.data.tiles import open_tiles

    if what in ("uniform", "tempered"):
        yield from measured_worker(folder, what)
        return
    before = private_mb()
    seconds, tiles = timed(lambda: open_tiles(folder / "train.parquet", str(folder / "slides.tsv")))
    yield "seconds", seconds
    yield "tiles", len(tiles)
    yield "MB", private_mb() - before
    (folder / "tiles.pickle").write_bytes(pickle.dumps(tiles))


def measured_worker(folder: Path, method: str) -> Iterator[tuple[str, float]]:
    """A loader's worker that inherits nothing: it gets the tiles pickled, and their order."""
    from dinoscope.config import SamplingConfig
    from dinoscope.data.sampling import sample_order

    before = private_mb()
    seconds, tiles = timed(lambda: pickle.loads((folder / "tiles.pickle").read_bytes()))
    yield "ms to unpickle", 1e3 * seconds
    settings = SamplingConfig(method=method)
    seconds, order = timed(lambda: sample_order(tiles, settings, seed=1, batch_size=BATCH, global_batch=BATCH))
    yield "ms to prepare", 1e3 * seconds
    yield "MB at first", private_mb() - before
    if method == "uniform":
        yield "us to draw", 1e6 * timed(lambda: each(order, range(DRAWS)))[0] / DRAWS
        look_up = timed(lambda: each(lambda number: tiles.tiles[number * 7919 % len(tiles)], range(DRAWS)))
        yield "us to look up", 1e6 * look_up[0] / DRAWS
    else:
        yield "ms for the slides", 1e3 * timed(lambda: each(order, range(0, STEPS * BATCH, BATCH)))[0] / STEPS
        yield "ms for a step", 1e3 * timed(lambda: each(order, range(STEPS * BATCH)))[0] / STEPS
    each(lambda sample: tiles.tiles[order(sample)], range(DRAWS))
    yield "MB in the end", private_mb() - before
    yield "MB mapped", mapped_mb()


def each(work: Callable, numbers: range) -> None:
    """Calls it for every number and keeps nothing."""
    for number in numbers:
        work(number)


def timed(work: Callable) -> tuple[float, object]:
    """Seconds, and what the work gives."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def private_mb() -> float:
    """Anonymous resident memory of this process."""
    return status_mb("RssAnon")


def mapped_mb() -> float:
    """Resident pages of mapped files, which all processes share."""
    return status_mb("RssFile")


def status_mb(field: str) -> float:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field + ":")).split()[1]) / 1024


def progress(text: str) -> None:
    """Says how far it is, beside the table."""
    print(text, file=sys.stderr, flush=True)


def report(folder: Path, slides: int) -> None:
    """Measures everything and prints the table."""
    load, stored = os.getloadavg()[0], (folder / "train.parquet").stat().st_size / 1e6
    shutil.rmtree(folder / ".mapped", ignore_errors=True)
    first, again = measure(folder, "open"), measure(folder, "open")
    mapped = sum(path.stat().st_size for path in (folder / ".mapped").iterdir()) / 1e6
    uniform, tempered = measure(folder, "uniform"), measure(folder, "tempered")
    rows = {
        "manifest (parquet) / mapped file": f"{stored:,.0f} MB / {mapped:,.0f} MB",
        "opening it for the first time, conversion included": f"{first['seconds']:.1f} s",
        "opening it again, slide table included": f"{1e3 * again['seconds']:.0f} ms",
        "private memory that this adds to a process": f"{again['MB']:.1f} MB",
        "private memory that a worker adds, at first": f"{max(uniform['MB at first'], tempered['MB at first']):.1f} MB",
        f"… after {2 * DRAWS:,} draws, uniform": f"{uniform['MB in the end']:.1f} MB",
        f"… after {2 * STEPS} steps of {BATCH:,}, tempered": f"{tempered['MB in the end']:.1f} MB",
        "pages of all mapped files by then, shared between processes": f"{uniform['MB mapped']:,.0f} MB",
        "drawing an index, uniform": f"{uniform['us to draw']:.1f} µs",
        "looking a tile up": f"{uniform['us to look up']:.1f} µs",
        "preparing the tempered order": f"{tempered['ms to prepare']:.0f} ms",
        f"which slides a step of {BATCH:,} visits, tempered": f"{tempered['ms for the slides']:.2f} ms",
        f"all {BATCH:,} indices of it": f"{tempered['ms for a step']:.1f} ms",
    }
    print(f"{first['tiles']:,.0f} tiles of {slides:,} slides; load {load:.1f} on {os.cpu_count()} cores\n")
    print("| what | measured |\n|---|---:|")
    for name, value in rows.items():
        print(f"| {name} | {value} |")


def main() -> None:
    """Makes what is missing, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000, help="tiles")
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="made there and kept; measured again when it is there")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        for name, value in measured(arguments.folder, arguments.measure):
            print(f"{name}\t{value}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if not (folder / "train.parquet").is_file():
            if free < BYTES_A_TILE * arguments.rows:
                wanted = BYTES_A_TILE * arguments.rows
                sys.exit(f"error: {folder} has {free / 1e9:.1f} GB free, and {wanted / 1e9:.1f} GB are wanted")
            make(folder, arguments.rows, arguments.slides)
        report(folder, arguments.slides)


if __name__ == "__main__":
    main()
