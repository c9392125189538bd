"""`pretrain.py --plan`: what a run will take, without starting it and without touching its folder."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dinoscope.data.dataset import crop_settings, open_images
from dinoscope.data.sampling import sample_order
from dinoscope.data.sources import TrainingImages
from dinoscope.data.windows import crop_ranges
from dinoscope.models.registry import settings_from_config
from dinoscope.models.weights import read_model_file
from dinoscope.recipe_checks import check_processes
from dinoscope.slides.table import read_slide_table
from dinoscope.train.distillation import sealed_teacher
from dinoscope.train.forecast import Forecast, forecast
from dinoscope.train.launching import num_processes
from dinoscope.train.outlook import outlook, warnings
from dinoscope.train.run_folder import newest_checkpoint
from dinoscope.train.seal import check_seal, read_seal
from dinoscope.train.speed import measure_speed
from dinoscope.train.starting import check_fit

if TYPE_CHECKING:
    from dinoscope.config import RunConfig
    from dinoscope.train.trainer import RunInputs

__all__ = ["plan_run"]


def plan_run(inputs: "RunInputs", recipe: Path, overrides: list[str], processes: str) -> str:
    """A table of what the run will take, with warnings below.

    Args:
        inputs: Of the run.
        recipe: Its recipe's file.
        overrides: Settings that win over it.
        processes: How many it will have: "auto", "gpu" or a number, of which some may be on other machines.

    Raises:
        DinoscopeError: What the run itself would refuse.
    """
    config, run_dir = inputs.config, inputs.run_dir
    check_seal(run_dir, recipe, overrides)
    world_size, local_size, device_type = _devices(processes)
    check_processes(config, world_size)
    newest = newest_checkpoint(run_dir, verify="sizes")  # a trainer at work leaves no clean end
    seal = read_seal(run_dir) if newest is not None else None
    settings = settings_from_config(config.student)
    if seal is None:
        start = inputs.resolve_start()
        distilled = start.shape(config)
        if start.weights is not None:
            check_fit(read_model_file(start.weights), settings)
    else:
        distilled = sealed_teacher(seal)
    with tempfile.TemporaryDirectory() as elsewhere:
        begun = (run_dir / ".mapped").is_dir()
        images = open_images(
            config.train.dataset_path,
            manifest=inputs.manifest,
            slides=inputs.slides,
            packed=inputs.packed,
            run_dir=run_dir if begun else Path(elsewhere),
            sealed=seal["inputs"] if seal else None,
            access=inputs.access,
        )
        ahead = forecast(config, settings, world_size, len(images), device_type, local_size, distilled)
        done = newest[0] + 1 if newest is not None else 0
        rows, found = _look_ahead(inputs, images, ahead, done)
    if seal is not None and seal["global_batch"] != ahead.global_batch:
        found.append(
            f"the run was started with {seal['global_batch']} tiles a step and would go on with {ahead.global_batch}, "
            "which it refuses: plan and start it with as many processes as before"
        )
    state = f"{done:,} of {ahead.iterations:,} iterations are done" if done else "not started"
    return _table([("run", f"{run_dir.name}, {state}"), *rows], found)


def _devices(processes: str) -> tuple[int, int, str]:
    """Processes in all and on one machine, and what they compute on."""
    if not torch.accelerator.is_available():
        world_size = num_processes(processes)
        return world_size, world_size, "cpu"
    here = torch.accelerator.device_count()
    world_size = int(processes) if processes.isdigit() and int(processes) > here else num_processes(processes)
    return world_size, min(world_size, here), torch.accelerator.current_accelerator().type


def _look_ahead(
    inputs: "RunInputs", images: TrainingImages, ahead: Forecast, done: int
) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows and warnings."""
    config = inputs.config
    crops = crop_ranges(images.windows, crop_settings(config)[0].choices)
    order = sample_order(
        images,
        config.sampling,
        seed=0,
        batch_size=config.train.batch_size_per_gpu,
        global_batch=ahead.global_batch,
    )
    speed = measure_speed(config, images, ahead, all_cores=True)
    num_cases = _num_cases(images, inputs.slides)
    rows = [("data", _data(config, images, num_cases))]
    rows += [("", line) for line in order.story(ahead.iterations)]
    rows += outlook(config, ahead, speed, crops, inputs.run_dir, done)
    return rows, warnings(config, ahead, speed, crops, inputs.run_dir, num_cases)


def _num_cases(images: TrainingImages, slides: str | None) -> int | None:
    if slides is None or not images.slide_ids:
        return None
    used = set(images.slide_ids)
    return len({slide.case_id for slide in read_slide_table(slides) if slide.slide_id in used})


def _data(config: "RunConfig", images: TrainingImages, num_cases: int | None) -> str:
    if num_cases is None:
        return f"{len(images):,} images of {config.train.dataset_path}"
    return f"{len(images):,} tiles; slides: {len(images.slide_ids):,}, cases: {num_cases:,}"


def _table(rows: list[tuple[str, str]], found: list[str]) -> str:
    width, before, lines = max(len(label) for label, _ in rows) + 2, None, []
    for label, text in rows:
        lines.append(f"{'' if label == before else label:<{width}}{text}")
        before = label
    return "\n".join([*lines, *(f"warning: {text}" for text in found)])
