"""Speed of feature extraction: from slide to file, and the forward pass beside transformers' and timm's.

    OMP_NUM_THREADS=1 python benchmarks/extraction.py --threads 1
    python benchmarks/extraction.py --archs vit_small vit_base vit_large --batch 256 --tiles 8192 --workers 12   (a GPU)

Everything is measured in one run, each in turn and again from the start (--repeats), and the table has the median with
the range. A slide of drawn tissue is tiled at 224 px and its features are written; beside it the same encoder embeds
the same tiles from memory ("cached"). All encoders have the same random weights and number format. With --threads the
process, readers included, is bound to so many cores. --cpu-time counts the time of these cores in place of the clock's,
for a machine that others use at the same time.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "workflow_scripts")]

from dinoscope.features.embedding import Embedder, choose_precision  # noqa: E402
from dinoscope.features.extract import Extractor, ExtractSettings, choose_device  # noqa: E402
from dinoscope.features.read_ahead import load_tiles, read_batches  # noqa: E402
from dinoscope.models.weights import load_backbone  # noqa: E402
from dinoscope.slides.manifest import tile_table, write_tiles  # noqa: E402
from dinoscope.slides.reader import Slide  # noqa: E402
from dinoscope.slides.tiff_writer import encode_tiles, write_pyramid  # noqa: E402
from dinoscope.train.flops import backbone_flops  # noqa: E402
from other_libraries import require, save_transformers, transformers_model  # noqa: E402
from synthetic_slides import texture  # noqa: E402

TILE, MPP = 224, 0.5


class Timer:
    """Times functions in turn, again and again."""

    def __init__(self, device: torch.device, repeats: int, cpu_time: bool) -> None:
        self.device, self.repeats = device, repeats
        self._now = time.process_time if cpu_time else time.perf_counter

    def __call__(self, functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each call by name; each function has run once before."""
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():
            function()
        for _ in range(self.repeats):
            for name, function in functions.items():
                start = self._wait()
                function()
                seconds[name].append(self._wait() - start)
        return seconds

    def _wait(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return self._now()


def draw_slide(folder: Path, num_tiles: int) -> tuple[Path, Path]:
    """A slide with at least so many tiles, and the manifest of so many."""
    columns = int(np.ceil(num_tiles**0.5))
    side = columns * TILE
    piece = texture(1792, 1792)
    image = np.tile(piece, (-(-side // 1792), -(-side // 1792), 1))[:side, :side]
    slide, tiles = folder / "slide.tiff", folder / "slide.parquet"
    write_pyramid(slide, [(side, side, encode_tiles(image))], MPP)
    x, y = (axis.ravel()[:num_tiles] for axis in np.meshgrid(*[np.arange(columns) * TILE] * 2))
    table = {"x": x, "y": y, "level": 0, "read_px": TILE, "tile_px": TILE, "mpp": MPP, "footprint_px": TILE}
    about = {"slide_id": "slide", "tile_set": "features", "tile_px": TILE, "requested_mpp": MPP, "stride_px": TILE}
    about |= {"width": side, "height": side, "mpp_x": MPP, "mpp_y": MPP}
    write_tiles(tiles, tile_table("slide", table | {"tissue_fraction": 1.0}), about)
    return slide, tiles


def cached_tiles(slide: Path, tiles: Path, batch: int) -> list[Tensor]:
    """All batches of a slide, in memory."""
    with Slide(slide, "slide") as opened:
        return [images for _, images in read_batches(opened, load_tiles(tiles), batch, 0)]


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> Callable[[], Tensor]:
    """A product of two square matrices."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: left @ right


def other_encoders(arch: str, device: torch.device, folder: Path) -> dict[str, Callable[[Tensor], object]]:
    """transformers' DINOv3 with random weights, written to `folder`, and timm's with the same."""
    theirs = transformers_model(arch)
    save_transformers(theirs, folder)
    from dinoscope.models.foreign import TIMM, to_foreign
    from dinoscope.models.weights import read_model_file
    from other_libraries import timm_model

    state = to_foreign(read_model_file(folder).backbone, TIMM)
    suffix = "" if "blocks.0.attn.q_bias" not in state and "blocks.0.attn.qkv.bias" not in state else "_qkvb"
    timm = timm_model(arch, suffix=suffix)
    timm.load_state_dict(state, strict=True)
    theirs, timm = theirs.to(device).eval(), timm.to(device).eval()
    return {
        f"transformers {require('transformers').__version__}": lambda images: theirs(images).last_hidden_state[:, 0],
        f"timm {require('timm').__version__}": lambda images: timm.forward_features(images)[:, 0],
    }


def forwards(arguments: argparse.Namespace, arch: str, folder: Path) -> tuple[dict[str, Callable], Embedder, float]:
    """The forward passes to compare, our embedder, and operations of a tile."""
    device, dtype = arguments.device, choose_precision(arguments.device, arguments.precision)
    others = other_encoders(arch, device, folder)
    model = load_backbone(folder, device=device)
    flops = backbone_flops(model.settings, TILE)
    embedder = Embedder(model, arch, "cls", device, precision=arguments.precision)
    embedder.prepare()
    images = torch.randn(arguments.batch, 3, TILE, TILE, device=device)

    def run(function: Callable[[Tensor], object]) -> Callable[[], object]:
        def forward() -> object:
            with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return function(images)

        return forward

    found = {"dinoscope": run(model.forward_features)}
    found |= {name: run(function) for name, function in others.items()}
    check_same(found)
    if arguments.compile:
        found["dinoscope, compiled"] = run(torch.compile(model.forward_features, dynamic=False))
        found |= {f"{name}, compiled": run(torch.compile(function, dynamic=False)) for name, function in others.items()}
    return found, embedder, flops


def check_same(found: dict[str, Callable[[], object]]) -> None:
    """Ends the program unless all give the same CLS tokens."""
    ours, *theirs = (result["cls"] if isinstance(result := run(), dict) else result for run in found.values())
    for name, other in zip(list(found)[1:], theirs, strict=True):
        error = ((ours - other).abs().max() / other.abs().max()).item()
        if error > (1e-4 if ours.dtype == torch.float32 else 0.1):
            sys.exit(f"error: {name} gives other features, by {error:.1e} of the largest")


def compare_forwards(arguments: argparse.Namespace, arch: str, timer: Timer, folder: Path) -> Embedder:
    """Prints a row for each forward pass."""
    functions, embedder, flops = forwards(arguments, arch, folder)
    size = 2048 if arguments.device.type == "cpu" else 8192
    functions["product"] = product_rate(arguments.device, embedder.dtype, size)
    seconds = timer(functions)
    product = 2 * size**3 / min(seconds.pop("product"))
    for name, times in seconds.items():
        ratios = [theirs / ours for theirs, ours in zip(times, seconds["dinoscope"], strict=True)]
        rate = arguments.batch / statistics.median(times)
        share = flops * arguments.batch / min(times) / product
        print(
            f"| {arch} | {name} | {rate:.1f} | {statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f}) | "
            f"{share:.2f} |",
            flush=True,
        )
    return embedder


def compare_end_to_end(arguments: argparse.Namespace, arch: str, embedder: Embedder, timer: Timer, folder: Path) -> str:
    """A row: tiles/s from slide to file, from memory, and their ratio."""
    slide, tiles = draw_slide(folder, arguments.tiles)
    batches = cached_tiles(slide, tiles, arguments.batch)
    settings = ExtractSettings(
        batch_size=arguments.batch, workers=arguments.workers, precision=arguments.precision, dtype="float16"
    )
    extractor = Extractor(embedder.model, arch, "0" * 64, settings, arguments.device)
    said = []

    def from_memory() -> None:
        for images in batches:
            extractor.embed(images)

    def from_slide() -> None:
        said.append(extractor.extract(slide, tiles, folder / "slide.h5").line())

    seconds = timer({"memory": from_memory, "slide": from_slide})
    ratios = [memory / whole for memory, whole in zip(seconds["memory"], seconds["slide"], strict=True)]
    rates = [arguments.tiles / statistics.median(seconds[name]) for name in ("slide", "memory")]
    shares = said[-1].rpartition("(")[2].rstrip(")")
    ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})"
    return f"| {arch} | {rates[0]:.1f} | {rates[1]:.1f} | {ratio} | {shares} |"


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--archs", nargs="+", default=["vit_small"], choices=["vit_small", "vit_small_plus", "vit_base", "vit_large"])
    add("--batch", type=int, default=16, help="tiles a forward pass")
    add("--tiles", type=int, default=64, help="tiles of the slide")
    add("--workers", type=int, default=2, help="threads that read tiles ahead")
    add("--repeats", type=int, default=7)
    add("--threads", type=int, help="cores that everything is bound to, and threads of torch")
    add("--device", type=choose_device, default="auto")
    add("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--compile", action="store_true", help="the same compiled as well (minutes)")
    add("--cpu-time", action="store_true", help="time of the cores in place of the clock's")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    timer = Timer(arguments.device, arguments.repeats, arguments.cpu_time)
    dtype = str(choose_precision(arguments.device, arguments.precision)).removeprefix("torch.")
    where = (
        torch.cuda.get_device_name() if arguments.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"torch {torch.__version__}, {where}, {dtype}, batches of {arguments.batch} tiles of {TILE} px\n")
    print("| backbone | forward pass | tiles/s | seconds over dinoscope's | of the machine's product rate |")
    print("|---|---|---:|---:|---:|")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for arch in arguments.archs:
            place = Path(folder, arch)
            place.mkdir()
            embedder = compare_forwards(arguments, arch, timer, place)
            rows.append(compare_end_to_end(arguments, arch, embedder, timer, place))
    print(
        "\n| backbone | slide to file, tiles/s | from memory, tiles/s | ratio | main thread |\n|---|---:|---:|---:|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main()
