"""How long the stages of a plan take: jobs by what was measured of one, models by their operations."""

import os
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from dinoscope.budget.jobs import featured_slides
from dinoscope.budget.measured import (
    CPU_FLOPS_PER_CORE,
    GPU_FLOPS,
    GPU_GIB,
    PACKING_SECONDS_PER_TILE,
    SECONDS_OF_OTHER_JOBS,
    SECONDS_PER_JOB,
    VIEWER_SECONDS_PER_MEGAPIXEL,
)
from dinoscope.budget.models import Device, ModelSizes
from dinoscope.budget.tiles import SlideSize
from dinoscope.errors import ConfigError
from dinoscope.names import nearest
from dinoscope.plan import Plan
from dinoscope.plan_features import FeatureJobs
from dinoscope.train.flops import backbone_flops
from dinoscope.train.launching import num_processes
from dinoscope.train.speed import product_rate
from dinoscope.train.starting import fresh_backbone

__all__ = ["LARGE_MODELS", "device_ahead", "hours", "measure"]

_TRAINING_SHARE, _EXTRACTION_SHARE, _EXTRACTION_SHARE_CPU = 0.4, 0.4, 0.95
_USUAL_FLOPS = 123e9  # forward pass of a ViT-L at 224 px, for encoders that no file tells of
_ITERATIONS = 3
LARGE_MODELS = ("train", "extract_features", "pca_region")


def device_ahead(processes: int | str, gpu: str | None, gpus: int | None, per_machine: int | None) -> Device:
    """What the run will compute on.

    Args:
        processes: launch.processes of the config.
        gpu: Kind of GPU that it will have, a name of the table; None: this machine's devices.
        gpus: Number of them over all machines; None, `processes` or else one.
        per_machine: Of them on a machine; None, all.

    Raises:
        ConfigError: No such kind, or this machine lacks what the config asks for.
    """
    if gpu is not None:
        kind = gpu.lower().replace("-", "").replace(" ", "")
        if kind not in GPU_FLOPS:
            raise ConfigError(f"--gpu {gpu} is unknown{nearest(kind, GPU_FLOPS)}; known are {', '.join(GPU_FLOPS)}")
        count = gpus or (processes if isinstance(processes, int) else 1)
        source = "published by the maker, not measured"
        shares = (_TRAINING_SHARE, _EXTRACTION_SHARE)
        memory = GPU_GIB[kind] * 2**30
        return Device("cuda", count, count * GPU_FLOPS[kind], source, memory, per_machine or count, *shares)
    if gpus is not None:
        raise ConfigError(f"--gpus {gpus} needs --gpu, the kind that they are of: one of {', '.join(GPU_FLOPS)}")
    count = num_processes(str(processes))
    if torch.accelerator.is_available():
        kind, memory = torch.accelerator.current_accelerator().type, torch.accelerator.get_memory_info()[1]
        rate = count * product_rate(kind, torch.bfloat16)
        source = "matrix products measured on this machine"
        return Device(kind, count, rate, source, memory, count, _TRAINING_SHARE, _EXTRACTION_SHARE)
    cores = len(os.sched_getaffinity(0))
    source = f"{cores} cores as in the table"
    return Device("cpu", count, cores * CPU_FLOPS_PER_CORE, source, None, count, _TRAINING_SHARE, _EXTRACTION_SHARE_CPU)


def measure(plan: Plan, device: Device) -> Device:
    """The device with what this machine really reaches: three forward and backward passes of the base backbone.

    Passes of eight tiles, so that a small GPU holds them; larger batches are rather faster.
    """
    settings = ModelSizes(plan, device, {}).settings("base")
    crop = plan.base_run.settings.crops.global_crops_size
    side = min(crop) if isinstance(crop, list) else crop
    here = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    model = fresh_backbone(settings, seed=0).to(here)
    images = torch.zeros(8, settings.in_chans, side, side, device=here)
    flops = 8 * backbone_flops(settings, side)
    with torch.autocast(here, torch.bfloat16, enabled=here != "cpu"):
        with torch.inference_mode():
            forward = _seconds(lambda: model.forward_features(images), here)
        both = _seconds(lambda: model.forward_features(images)["cls"].sum().backward(), here)
    number = 1 if here == "cpu" else device.count
    source = f"{_ITERATIONS} passes of the base backbone, 8 tiles of {side} px, measured on this machine"
    return Device(
        here, device.count, number * flops / forward, source, device.bytes, device.per_machine, 3 * forward / both, 1.0
    )


def _seconds(work: Callable[[], object], device: str) -> float:
    """Of one pass, the shortest of some after one that warms up."""
    times = []
    for _ in range(1 + _ITERATIONS):
        begun = time.perf_counter()
        work()
        if device != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def hours(
    plan: Plan,
    slides: Sequence[SlideSize],
    models: ModelSizes,
    device: Device,
    jobs: Mapping[str, int],
    others: Mapping[str, float],
) -> dict[str, float]:
    """Rule -> hours of all its jobs, one after the other.

    Args:
        plan: The plan.
        slides: Size and tiles of each.
        models: Of the plan.
        device: What models are computed on.
        jobs: Rule -> jobs.
        others: Rule -> seconds of work that is counted elsewhere (evaluation, segmentation).
    """
    seconds = {rule: count * SECONDS_PER_JOB.get(rule, SECONDS_OF_OTHER_JOBS) for rule, count in jobs.items()}
    used = [slide for slide in slides if slide.slide_id in set(plan.feature_slides)]
    if "train" in seconds:
        rate = device.flops * device.training_share
        ahead = [models.forecast(run) for run in plan.trained_runs]
        seconds["train"] += sum(each.flops_per_tile * each.iterations * each.global_batch for each in ahead) / rate
    if "extract_features" in seconds:
        one = device.flops / (device.count if device.kind != "cpu" else 1)  # a job has one GPU
        seconds["extract_features"] += _extraction_flops(plan, slides, models) / (one * device.extraction_share)
    if "viewer_pyramid" in seconds:
        pixels = sum(slide.pixels_at(plan.config["viewer"]["mpp"]) for slide in used)
        seconds["viewer_pyramid"] += VIEWER_SECONDS_PER_MEGAPIXEL * pixels / 1e6
    if "pack_slide" in seconds:
        training = [slide for slide in slides if slide.slide_id in set(plan.train_slides)]
        tiles = sum(slide.num_tiles[name] for slide in training for name in plan.training_sets)
        seconds["pack_slide"] += PACKING_SECONDS_PER_TILE * tiles
    for rule, more in others.items():
        seconds[rule] = seconds.get(rule, 0.0) + more
    return {rule: value / 3600 for rule, value in seconds.items()}


def _extraction_flops(plan: Plan, slides: Sequence[SlideSize], models: ModelSizes) -> float:
    jobs, total = FeatureJobs(plan), 0.0
    for model in plan.measured_models:
        tile_set, settings = jobs.tile_set(model), models.settings(model)
        tile_px = plan.config["tiling"]["sets"][tile_set]["tile_px"]
        flops = _USUAL_FLOPS if settings is None else backbone_flops(settings, tile_px)
        featured = set(featured_slides(plan, model))
        total += flops * sum(slide.num_tiles[tile_set] for slide in slides if slide.slide_id in featured)
    return total
