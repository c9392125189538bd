"""Speed of the multi-crop augmentation beside the same recipe in torchvision v2 on PIL images, on one thread.

    python benchmarks/augmentation.py --slide ../shared/data/wsi/CMU-1-Small-Region.svs

Cuts windows from tissue of a slide, makes the crops of the same samples with both, in turns, and prints Markdown: CPU
milliseconds a sample (which other jobs on the machine disturb less than time on the clock), the shortest and the median
of the repetitions of each sample, averaged over samples; and how our time divides over the steps.
"""

import argparse
import functools
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import torchvision_on_cpu_torch  # noqa: F401

# isort: split
from torchvision_crops import TorchvisionCrops

from dinoscope.data import color, crops
from dinoscope.data.crops import AUGMENTATIONS, CropSizes, make_crops, sample_rng
from dinoscope.processes import keep_freed_memory
from dinoscope.slides.reader import Slide

SIZES = CropSizes(global_px=256, local_px=112, num_local=8)
CLOCK = time.process_time


def windows_of(slide: Path, size_px: int, count: int) -> list[np.ndarray]:
    """Windows of level 0 with the most structure, of a grid over the slide."""
    with Slide(slide) as opened:
        tops, lefts = (range(0, length - size_px, size_px) for length in (opened.height, opened.width))
        places = [(x, y) for y in tops for x in lefts]
        found = [np.ascontiguousarray(opened.read_region(x, y, 0, size_px, size_px)) for x, y in places]
    return sorted(found, key=lambda window: -window.std())[:count]


def milliseconds(action: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = CLOCK()
    action()
    return 1e3 * (CLOCK() - start)


def compare(recipe: str, windows: list[np.ndarray], samples: int, repetitions: int) -> tuple[np.ndarray, np.ndarray]:
    """Milliseconds of each repetition and sample, of ours and of torchvision's, in turns."""
    reference = TorchvisionCrops(SIZES, AUGMENTATIONS[recipe])
    images = [Image.fromarray(window) for window in windows]
    ours, theirs = np.empty((repetitions, samples)), np.empty((repetitions, samples))
    for repetition in range(-1, repetitions):  # the first is for warming up
        for sample in range(samples):
            index = sample % len(windows)
            rng = sample_rng(0, sample)
            inputs = windows[index], SIZES, AUGMENTATIONS[recipe], rng
            ours[repetition, sample] = milliseconds(functools.partial(make_crops, *inputs))
            torch.manual_seed(sample)
            random.seed(sample)
            theirs[repetition, sample] = milliseconds(functools.partial(reference, images[index]))
    return ours, theirs


def by_step(recipe: str, windows: list[np.ndarray], samples: int, repetitions: int) -> dict[str, float]:
    """Milliseconds a sample of the steps of ours; the clock's own cost is in them."""
    spent: dict[tuple[int, int], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    inner = [0.0]
    current = (0, 0)
    timed = {
        (crops, "draw_views"): "draws",
        (crops, "resize"): "resize",
        (color, "shift_stains"): "stain jitter",
        (color, "turn_hues"): "hue",
        (color, "jitter"): "brightness, contrast, saturation",
        (crops, "_finish"): "grayscale, blur, solarize",
        (crops, "_stack"): "flips, rotations and copies",
    }

    def timing(function: Callable, name: str) -> Callable:
        def call(*args: object) -> object:
            start = CLOCK()
            inner.append(0.0)
            result = function(*args)
            seconds = CLOCK() - start
            spent[current][name] += 1e3 * (seconds - inner.pop())
            inner[-1] += seconds
            return result

        return call

    originals = {key: getattr(*key) for key in timed}
    for (module, name), label in timed.items():
        setattr(module, name, timing(originals[module, name], label))
    for repetition in range(repetitions):
        for sample in range(samples):
            current = (repetition, sample)
            make_crops(windows[sample % len(windows)], SIZES, AUGMENTATIONS[recipe], sample_rng(0, sample))
    for (module, name), function in originals.items():
        setattr(module, name, function)
    names = dict.fromkeys(timed.values())
    shortest = {name: [min(spent[r, s][name] for r in range(repetitions)) for s in range(samples)] for name in names}
    return {name: statistics.fmean(values) for name, values in shortest.items()}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slide", type=Path, required=True, help="slide to cut windows from")
    parser.add_argument("--window", type=int, default=512, help="edge of the windows, px")
    parser.add_argument("--samples", type=int, default=40, help="samples of each recipe")
    parser.add_argument("--repetitions", type=int, default=5, help="of each sample")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    keep_freed_memory()  # as the loader's processes do
    windows = windows_of(arguments.slide, arguments.window, 8)
    count = arguments.samples, arguments.repetitions
    print("| recipe | | ours, ms | torchvision on PIL, ms | ratio |\n|---|---|---:|---:|---:|")
    for recipe in AUGMENTATIONS:
        ours, theirs = compare(recipe, windows, *count)
        for name, choose in (("shortest", np.min), ("median", np.median)):
            mine, other = choose(ours, axis=0).mean(), choose(theirs, axis=0).mean()
            print(f"| {recipe} | {name} | {mine:.2f} | {other:.1f} | {other / mine:.1f} |")
    steps = {recipe: by_step(recipe, windows, *count) for recipe in AUGMENTATIONS}
    print(f"\n| step, ms a sample | {' | '.join(steps)} |\n|---|{'---:|' * len(steps)}")
    for name in next(iter(steps.values())):
        print(f"| {name} | {' | '.join(f'{each[name]:.2f}' for each in steps.values())} |")


if __name__ == "__main__":
    main()
