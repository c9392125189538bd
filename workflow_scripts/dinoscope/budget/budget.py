"""The budget of a plan, put together."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from dinoscope.budget.evaluation import evaluation_products, evaluation_work
from dinoscope.budget.hours import device_ahead, hours, measure
from dinoscope.budget.jobs import count_jobs, profile_groups, submitted
from dinoscope.budget.models import ModelSizes
from dinoscope.budget.products import VIEWER_FOLDER, Product, products
from dinoscope.budget.report import Budget
from dinoscope.budget.segmentation import segmentation_products, segmentation_work
from dinoscope.budget.space import disk_use, free_space
from dinoscope.budget.tiles import SlideSize, slide_sizes
from dinoscope.budget.work import seconds_of
from dinoscope.plan import Plan

__all__ = ["make_budget"]

_PROFILE = "profile.v9+.yaml"


def make_budget(
    plan: Plan,
    *,
    groups: Mapping[str, str],
    profiles: Sequence[Path],
    gpu: str | None = None,
    gpus: int | None = None,
    per_machine: int | None = None,
    measured: bool = False,
) -> Budget:
    """Of all targets of a plan, from nothing, less what is there.

    Args:
        plan: The plan.
        groups: Rule -> group of the workflow.
        profiles: Folders of Snakemake profiles; those of clusters are counted for.
        gpu, gpus, per_machine: What it will compute on, as `device_ahead`.
        measured: Whether a few passes are timed here.

    Raises:
        ConfigError: There is no such GPU, or this machine lacks what the config asks for.
    """
    slides = slide_sizes(plan)
    device = device_ahead(plan.config["launch"]["processes"], gpu, gpus, per_machine)
    if measured:
        device = measure(plan, device)
    models = ModelSizes(plan, device, {run: _num_images(plan, run, slides) for run in plan.runs})
    by_id, jobs = {slide.slide_id: slide for slide in slides}, count_jobs(plan)
    parts = products(plan, slides, models), evaluation_products(plan, by_id, models)
    written = [product for part in (*parts, segmentation_products(plan, by_id, models)) for product in part]
    works = [*evaluation_work(plan, by_id, models), *segmentation_work(plan, by_id, models)]
    told = {profile.name: profile_groups(profile / _PROFILE) for profile in profiles}
    return Budget(
        slides=slides,
        products=written,
        there=_there(plan, written),
        space=free_space(plan.results),
        jobs=jobs,
        submitted={
            name: submitted(jobs, {**groups, **of_profile[0]}, of_profile[1])
            for name, of_profile in told.items()
            if of_profile is not None
        },
        hours=hours(plan, slides, models, device, jobs, seconds_of(works, device)),
        device=device,
        memory={run: models.forecast(run).memory.peak for run in plan.trained_runs},
    )


def _there(plan: Plan, written: Sequence[Product]) -> int:
    """Bytes of the products that are there; what a folder holds besides does not make the others smaller."""
    folders: Counter[str] = Counter()
    for product in written:
        folders[product.folder] += math.ceil(product.bytes)
    pyramids = folders.pop(VIEWER_FOLDER, 0)
    there = sum(min(disk_use(plan.results / folder)[0], size) for folder, size in folders.items())
    # a million tiles are not looked at one by one
    made = sum((plan.results / VIEWER_FOLDER / slide / "pyramid.js").is_file() for slide in plan.feature_slides)
    return there + pyramids * made // max(1, len(plan.feature_slides))


def _num_images(plan: Plan, run: str, slides: Sequence[SlideSize]) -> int:
    planned = plan.runs[run]
    if planned.own_data is not None:
        return 1  # neither operations, memory nor disk depend on it
    training = set(plan.train_slides)
    return sum(slide.num_tiles[planned.tile_set] for slide in slides if slide.slide_id in training)
