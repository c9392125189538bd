"""How the rate of the training loader grows with its worker processes.

    python benchmarks/loader.py --manifest results/manifests/train.parquet --slides config/slides.tsv --workers 2

Cuts 2×256 + 8×112 px crops in batches as a trainer gets them, and copies every tensor once, as a trainer would that
only moved them to a device. One worker and several take turns. Prints Markdown: samples a second on the clock, and CPU
milliseconds a sample of the loaders and of the process that takes the batches. On a machine with other jobs the clock
says little; that the CPU time of a sample stays the same says that N workers on N free cores make N times as many.
"""

import argparse
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))

from dinoscope.data.collate import Batch, Collate
from dinoscope.data.crops import AUGMENTATIONS, CropSizes
from dinoscope.data.dataset import ImageCrops, StepSizes, build_loader
from dinoscope.data.tiles import open_tiles

SIZES = CropSizes(global_px=256, local_px=112, num_local=8)


class Turn(NamedTuple):
    """What one turn measured: samples a second, CPU milliseconds a sample of loaders and of the consumer."""

    rate: float
    loaders: float
    consumer: float


def cpu_seconds(who: int) -> float:
    """User and system time."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def copied(batch: Batch, places: dict[str, torch.Tensor]) -> None:
    """Every tensor of a batch once, into the same memory each time."""
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            if name not in places or places[name].shape != value.shape:
                places[name] = torch.empty_like(value)
            places[name].copy_(value)


def turn(dataset: ImageCrops, batch_size: int, steps: int, workers: int) -> Turn:
    """Takes `steps` batches; the clock starts at the first batch of each worker, when all have begun."""
    collate = Collate(batch_size, 16, 0.5, (0.1, 0.5), False, 0)
    loader = build_loader(dataset, collate, first=0, last=steps + workers, rank=0, world_size=1, num_workers=workers)
    before, places, batches = cpu_seconds(resource.RUSAGE_CHILDREN), {}, iter(loader)
    for _ in range(workers):
        copied(next(batches), places)
    consumer, start = cpu_seconds(resource.RUSAGE_SELF), time.perf_counter()
    for batch in batches:
        copied(batch, places)
    samples, seconds = steps * batch_size, time.perf_counter() - start
    consumer = cpu_seconds(resource.RUSAGE_SELF) - consumer
    del batches  # ends the workers, whose time is counted then
    loaders = cpu_seconds(resource.RUSAGE_CHILDREN) - before
    return Turn(samples / seconds, 1e3 * loaders / (samples + workers * batch_size), 1e3 * consumer / samples)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True, help="merged tile manifest, windows of 256 px or more")
    parser.add_argument("--slides", required=True, help="where its slides are")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="numbers of workers to compare with one")
    parser.add_argument("--batch", type=int, default=16, help="tiles a batch")
    parser.add_argument("--steps", type=int, default=16, help="batches a turn and worker")
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dataset = ImageCrops(
        open_tiles(arguments.manifest, arguments.slides), StepSizes((SIZES,)), AUGMENTATIONS["dinov3"], 0
    )
    found: dict[int, list[Turn]] = {workers: [] for workers in (1, *arguments.workers)}
    for _ in range(arguments.turns):
        for workers, turns in found.items():
            turns.append(turn(dataset, arguments.batch, arguments.steps * workers, workers))
    print(f"{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| workers | samples/s | ratio to one worker / N | loaders, CPU ms a sample | consumer |")
    print("|---|---:|---:|---:|---:|")
    for workers, turns in found.items():
        ratios = [many.rate / one.rate / workers for many, one in zip(turns, found[1], strict=True)]
        rate, loaders, consumer = (statistics.median(values) for values in zip(*turns, strict=True))
        print(f"| {workers} | {rate:.0f} | {statistics.median(ratios):.2f} | {loaders:.2f} | {consumer:.2f} |")


if __name__ == "__main__":
    main()
