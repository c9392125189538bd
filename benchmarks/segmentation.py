"""What does it cost to fine-tune for segmentation? LoRA, the decoder alone, the last block and the whole encoder.

    OMP_NUM_THREADS=1 python benchmarks/segmentation.py --arch vit_small --images 16 --rounds 3

The same images, views, steps and decoder for each; processes of their own, in turns over several rounds, so that other
jobs of the machine disturb all alike. Seconds are of an epoch (the lowest and the median over rounds, without the first
step), memory is what the training adds to the process that holds the model: its peak on a GPU, or the peak of resident
memory on a CPU. Weights are random: what is learned is not the question here.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow_scripts"), str(ROOT / "tests")]
WAYS = ("decoder", "lora", "last_n", "full")
NAMES = {"decoder": "decoder alone", "lora": "LoRA, rank 3", "last_n": "last block", "full": "whole encoder"}


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="vit_small", help="size of the encoder")
    parser.add_argument("--decoder", choices=("linear", "fpn"), default="linear")
    parser.add_argument("--side", type=int, default=224, help="of views, px")
    parser.add_argument("--images", type=int, default=16, help="of an epoch")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(arguments.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", way]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    report(found, arguments)


def report(found: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    """Prints the table."""
    whole = found["full"]
    print(
        f"{arguments.arch}, {arguments.decoder} decoder, {arguments.images} views of {arguments.side} px an epoch, batch "
        f"{arguments.batch_size}, {arguments.rounds} rounds, {whole[0]['device']}, {os.cpu_count()} cores\n"
    )
    print(
        "| trained | parameters | of all | s an epoch, lowest | median | of full | memory of training, MB | of full |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    fastest = {way: min(each["seconds"] for each in rounds) for way, rounds in found.items()}
    memory = {way: statistics.median(each["memory_mb"] for each in rounds) for way, rounds in found.items()}
    for way, rounds in found.items():
        first = rounds[0]
        median = statistics.median(each["seconds"] for each in rounds)
        print(
            f"| {NAMES[way]} | {first['trained']:,} | {100 * first['trained'] / first['parameters']:.2f} % "
            f"| {fastest[way]:.2f} | {median:.2f} | {fastest[way] / fastest['full']:.2f} "
            f"| {memory[way]:.0f} | {memory[way] / memory['full']:.2f} |"
        )


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """One way, in this process: an epoch after a first step."""
    import torch

    from dinoscope.export.convert import write_initial_weights
    from dinoscope.features.encoders import load_encoder
    from dinoscope.recipe import load_recipe
    from dinoscope.segment.engine import TrainingViews, make_loader, make_optimizer, train_step
    from dinoscope.segment.settings import TrainSettings
    from dinoscope.segment.setup import build_segmenter
    from dinoscope.train.distributed import World

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    autocast = torch.bfloat16 if device.type == "cuda" else None
    world = World(0, 0, 1, device)
    settings = TrainSettings(
        trainable=arguments.worker,
        decoder=arguments.decoder,
        img_dim=(arguments.side, arguments.side),
        batch_size=arguments.batch_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "teacher.pth"
        recipe = load_recipe(ROOT / "config/runs/tiny.yaml", [f"student.arch={arguments.arch}"])
        write_initial_weights(recipe, weights)
        data = _data(Path(folder), arguments)
        model = build_segmenter(load_encoder(weights), 2, settings).to(device).train()
        optimizer = make_optimizer(model, settings)
        steps = arguments.images // arguments.batch_size
        loader = make_loader(TrainingViews(data, settings), range(1 + steps), len(data), settings, world, 0)
        before = _memory_mb(device)
        batches = list(loader)
        begun = 0.0
        for step, batch in enumerate(batches):
            train_step(model, optimizer, batch, step, settings, world, autocast=autocast)
            if step == 0:
                _wait(device)
                begun = time.perf_counter()
        _wait(device)
        seconds = time.perf_counter() - begun
    return {
        "trained": sum(parameter.numel() for parameter in model.trainable_parameters()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "memory_mb": _peak_mb(device) - before,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }


def _data(folder: Path, arguments: argparse.Namespace):
    from dinoscope.segment.datasets import open_dataset
    from segmentation_samples import write_discs

    side = arguments.side + 32
    root = write_discs(folder / "discs", ("train",) * arguments.images, (side, side))
    return open_dataset("folder", root, "train", instance=True)


def _wait(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory_mb(device) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak_mb(device) -> float:
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
