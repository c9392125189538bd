"""Speed of the training step alone, on drawn batches that lie on the device already.

    python benchmarks/train_step.py --arch vit_small --batch 4 --crops 224 96 --prototypes 4096 --baseline
    torchrun --nproc-per-node 8 benchmarks/train_step.py --arch vit_large --batch 64 --crops 256 112 --compile

Prints seconds a step, images a second, the share of the machine's matrix-product rate (measured in the same run, in the
number format of the training) and of a GPU's nominal bf16 peak, peak memory, and how a step divides into its phases.
With --baseline also a plain loop without FSDP over the same modules, interleaved with ours.
"""

import argparse
import contextlib
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))

from dinoscope.config import RunConfig
from dinoscope.data.collate import Batch, mask_tensors
from dinoscope.data.masking import sample_masks
from dinoscope.models.registry import settings_from_config
from dinoscope.recipe import resolve_recipe
from dinoscope.train import parallelize as parallelize_module
from dinoscope.train.distributed import World, joined_world
from dinoscope.train.flops import step_flops
from dinoscope.train.optimizer import apply_schedule, build_optimizer, clip_gradients, update_ema
from dinoscope.train.schedule import ScheduleValues
from dinoscope.train.ssl_step import SSLModel, compute_dtype, parameters_by_part
from dinoscope.train.starting import Start, start_model
from dinoscope.train.step import TrainingStep

VALUES = ScheduleValues(1e-4, 0.04, 0.994, 0.07, 1e-4, None, None)
# Dense bf16 peaks of data sheets, FLOP/s.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "L4": 121e12}


class Stopwatch:
    """Seconds spent in named phases; the device is waited for at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict(list)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times one phase."""
        start = self.now()
        yield
        self.seconds[name].append(self.now() - start)

    def now(self) -> float:
        """The time after all that was asked of the device is done."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()


def recipe(arguments: argparse.Namespace) -> RunConfig:
    """The settings that are measured."""
    heads = {"head_n_prototypes": arguments.prototypes}
    layers = {
        "student": {"arch": arguments.arch, "n_storage_tokens": 4, "mask_k_bias": True, "drop_path_rate": 0.0},
        "crops": {
            "global_crops_size": arguments.crops[0],
            "local_crops_size": arguments.crops[1],
            "local_crops_number": arguments.locals,
        },
        "dino": heads,
        "ibot": heads,
        "optim": {"clip_grad": 3.0},
        "train": {
            "batch_size_per_gpu": arguments.batch,
            "accumulation_steps": arguments.accumulation,
            "compile": arguments.compile,
            "checkpointing": arguments.checkpointing == "selective",
            "checkpointing_full": arguments.checkpointing == "full",
        },
    }
    return resolve_recipe([("the benchmark", layers)], "benchmark")


def drawn_batch(config: RunConfig, device: torch.device) -> Batch:
    """Random pixels and masks as the loader makes them."""
    rng, crops = np.random.default_rng(0), config.crops
    tiles = config.train.batch_size_per_gpu * config.train.accumulation_steps
    side = crops.global_crops_size // config.student.patch_size
    ibot = config.ibot
    masks = sample_masks(2 * tiles, (side, side), ibot.mask_sample_probability, tuple(ibot.mask_ratio_min_max), rng)

    def pixels(count: int, size: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 256, (count, size, size, 3), np.uint8))

    return Batch(
        samples=list(range(tiles)),
        global_crops=pixels(2 * tiles, crops.global_crops_size),
        local_crops=pixels(crops.local_crops_number * tiles, crops.local_crops_size),
        gram_crops=None,
        **mask_tensors(torch.from_numpy(masks)),
    ).to(device)


def sharded(config: RunConfig, world: World, watch: Stopwatch) -> Callable[[Batch], None]:
    """The trainer's step."""
    settings = settings_from_config(config.student)
    with torch.device("meta"):
        model = SSLModel(config, settings)
    parallelize_module.parallelize(model, world)
    optimizer = build_optimizer(model.student, config, settings.depth)
    start_model(model, optimizer, Start(None, None, None), world)
    step = TrainingStep(model, optimizer, world, 0, phase=watch)
    return lambda batch: step(0, batch.split(config.train.accumulation_steps), VALUES)


def plain(config: RunConfig, device: torch.device) -> Callable[[Batch], None]:
    """The same modules and losses without FSDP, in the fewest lines."""
    settings = settings_from_config(config.student)
    model = SSLModel(config, settings)
    for network in (model.student, model.teacher):
        for part in network.values():
            part.init_weights()
    model.to(device)
    optimizer = build_optimizer(model.student, config, settings.depth)
    parts = parameters_by_part(model.student)

    def step(batch: Batch) -> None:
        apply_schedule(optimizer, VALUES)
        optimizer.zero_grad(set_to_none=True)
        loss, _ = model(batch, model.targets([batch], VALUES.teacher_temp)[0])
        loss.backward()
        for part in parts.values():
            clip_gradients(part, config.optim.clip_grad)
        optimizer.step()
        update_ema(model.teacher, model.student, VALUES.momentum)

    return step


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    side = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    watch, times = Stopwatch(device), []
    for _ in range(8):
        start = watch.now()
        left @ right
        times.append(watch.now() - start)
    return 2 * side**3 / min(times)


def timed(steps: dict[str, Callable[[Batch], None]], batch: Batch, count: int, watch: Stopwatch) -> dict[str, list]:
    """Seconds of each step, the steps taking turns; two rounds warm up."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for turn in range(count + 2):
        if turn == 2:
            watch.seconds.clear()
        for name, step in steps.items():
            start = watch.now()
            step(batch)
            if turn >= 2:
                seconds[name].append(watch.now() - start)
    return seconds


def report(arguments: argparse.Namespace, config: RunConfig, world: World) -> None:
    """Measures and prints."""
    device = world.device
    watch = Stopwatch(device)
    batch = drawn_batch(config, device)
    if arguments.compile and device.type == "cpu":
        parallelize_module._compiles = lambda config, device_type: True
    steps = {"ours": sharded(config, world, watch)}
    if arguments.baseline:
        steps["plain loop"] = plain(config, device)
    rate = product_rate(device, compute_dtype(config, device.type))
    seconds = timed(steps, batch, arguments.iterations, watch)
    rate = max(rate, product_rate(device, compute_dtype(config, device.type)))
    if not world.is_main:
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    tiles = len(batch.samples)
    flops = step_flops(config, settings_from_config(config.student), tiles, len(batch.mask_indices))
    print(f"{name}, {world.size} process(es), torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{arguments}")
    print(f"{flops / 1e9:.1f} GFLOP a step and process; matrix products run at {rate / 1e9:.1f} GFLOP/s")
    print("| | median, s | fastest, s | tiles/s | share of matrix-product rate |\n|---|---:|---:|---:|---:|")
    for which, times in seconds.items():
        middle = statistics.median(times)
        cells = f"{middle:.3f} | {min(times):.3f} | {world.size * tiles / middle:.2f} | {flops / middle / rate:.3f}"
        print(f"| {which} | {cells} |")
    peak = next((peak for key, peak in PEAKS.items() if key in name), None)
    if peak:
        print(f"share of the nominal bf16 peak: {flops / statistics.median(seconds['ours']) / peak:.3f}")
    whole = sum(sum(times) for times in watch.seconds.values())
    print("phases: " + ", ".join(f"{key} {sum(times) / whole:.1%}" for key, times in watch.seconds.items()))
    if device.type == "cpu":
        print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    else:
        print(f"peak device memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small")
    parser.add_argument("--batch", type=int, default=4, help="tiles that a process forwards at once")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--crops", type=int, nargs=2, default=[224, 96], metavar=("GLOBAL", "LOCAL"), help="px")
    parser.add_argument("--locals", type=int, default=8, help="local crops a tile")
    parser.add_argument("--prototypes", type=int, default=4096)
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--baseline", action="store_true", help="also time a plain loop without FSDP")
    parser.add_argument("--iterations", type=int, default=8)
    arguments = parser.parse_args()
    config = recipe(arguments)
    with joined_world() as world:
        report(arguments, config, world)


if __name__ == "__main__":
    main()
