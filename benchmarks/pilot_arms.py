"""Does equal compute take equal time? Steps of a pilot's arms in turn, against their counted operations.

    python benchmarks/pilot_arms.py --recipe config/runs/tiny.yaml --set student.pos_embed_rope_rescale_coords=null

Whole steps without the reading of tiles: teacher, student, backward, optimizer, EMA. Seconds are the median of the
steps; the last column is how long an arm would take at the compute in which full adaptation takes 1.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow_scripts"))
from dinoscope.data.collate import Batch, mask_tensors
from dinoscope.models.registry import settings_from_config
from dinoscope.recipe import load_recipe
from dinoscope.resolutions import resolutions
from dinoscope.train.distributed import World
from dinoscope.train.flops import adapted_step_flops, num_masked_patches
from dinoscope.train.optimizer import build_optimizer
from dinoscope.train.parallelize import parallelize
from dinoscope.train.schedule import ScheduleValues
from dinoscope.train.ssl_step import SSLModel
from dinoscope.train.starting import Start, start_model
from dinoscope.train.step import TrainingStep

RECIPE = Path(__file__).resolve().parents[1] / "config/runs/tiny.yaml"
ARMS = {"full": 0, "lora": 1, "last_n": 2}
VALUES = ScheduleValues(1e-4, 0.04, 0.99, 0.07, 1e-4, None, None)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    steps = {arm: step_of(arm, arguments, device) for arm in ARMS}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for number in range(arguments.steps + 2):
        for arm, (step, batch, _) in steps.items():
            began = time.perf_counter()
            step(number, [batch], VALUES)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[arm].append(time.perf_counter() - began)
    print("arm      1e9 operations  ms a step  lowest ms  time at equal compute")
    full = statistics.median(times["full"][2:]) / steps["full"][2]
    for arm, (_, _, flops) in steps.items():
        taken = times[arm][2:]
        median = statistics.median(taken)
        print(
            f"{arm:8} {flops / 1e9:14.2f} {median * 1e3:10.0f} {min(taken) * 1e3:10.0f} {median / flops / full:10.2f}"
        )


def step_of(arm: str, arguments: argparse.Namespace, device: torch.device) -> tuple[TrainingStep, Batch, int]:
    """A step of the arm, a batch for it, and its counted operations."""
    trained = [f"student.trainable={arm}", f"student.unfrozen_blocks={ARMS[arm]}"]
    config = load_recipe(arguments.recipe, [*arguments.set, *trained])
    settings, sizes = settings_from_config(config.student), resolutions(config)[0]
    world = World(0, 0, 1, device)
    with torch.device("meta"):
        model = SSLModel(config, settings)
    parallelize(model, world)
    optimizer = build_optimizer(model.student, config, settings.depth)
    start_model(model, optimizer, Start(None, None, None), world)
    tiles = config.train.batch_size_per_gpu
    num_masked, side = num_masked_patches(config, tiles, sizes), sizes.global_px // config.student.patch_size
    masks = torch.zeros(2 * tiles, side * side, dtype=torch.bool)
    masks.view(-1)[torch.randperm(masks.numel())[:num_masked]] = True

    def crops(number: int, px: int) -> torch.Tensor:
        return torch.randint(0, 256, (number, px, px, 3), dtype=torch.uint8, device=device)

    batch = Batch(
        samples=list(range(tiles)),
        global_crops=crops(2 * tiles, sizes.global_px),
        local_crops=crops(config.crops.local_crops_number * tiles, sizes.local_px),
        gram_crops=None,
        **{name: tensor.to(device) for name, tensor in mask_tensors(masks).items()},
    )
    flops = adapted_step_flops(config, settings, tiles, num_masked, sizes)
    return TrainingStep(model, optimizer, world, 0), batch, flops


if __name__ == "__main__":
    main()
