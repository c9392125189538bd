"""What tasks of segmentation take: trainings, their measures, class maps of slides, and what these write."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dinoscope.budget.measured import (
    CLASS_MAP_BYTES_PER_PIXEL,
    CLASS_MAP_SECONDS_PER_TILE,
    CORRUPTION_SECONDS_PER_MEGAPIXEL,
    SEGMENT_SECONDS_PER_MEGAPIXEL,
)
from dinoscope.budget.models import ModelSizes
from dinoscope.budget.pixels import usual_size
from dinoscope.budget.products import Product, Saving
from dinoscope.budget.tiles import SlideSize
from dinoscope.budget.work import Work
from dinoscope.errors import DinoscopeError
from dinoscope.plan import Plan
from dinoscope.plan_segmentation import SegmentJobs
from dinoscope.segment.arguments import data_root, test_split
from dinoscope.segment.settings import TrainSettings
from dinoscope.train.flops import backbone_flops

__all__ = ["segmentation_products", "segmentation_work"]

# Operations of a training step relative to a forward pass: backward takes twice as much where weights are trained, once
# where gradients only pass through (benchmarks/README.md has times of all four, LoRA's somewhat above that).
_ADAPTED, _FULL = 2.3, 3.0
_USUAL_IMAGES = {"train": 600, "val": 200, "test": 200}  # of a data set that is not there yet
_SHARES = {"train": 0.64, "val": 0.16, "test": 0.2}  # of the tiles of annotated slides
_USUAL_MPP = 0.5
_USUAL_FLOPS, _USUAL_PATCH, _USUAL_WIDTH, _USUAL_DEPTH = 123e9, 16, 1024, 24  # of an encoder that no file tells of
_FPN_PIXELS, _FPN_CHANNELS, _FPN_BLOCKS = 21.25, 128, 4  # pixels of its four levels for each patch
_FLOAT32, _KEPT = 4, 4  # weights, two moments, and the best weights
_PICTURES, _CORRUPTED_PICTURE, _OF_SLIDE = 1_300_000, 800_000, 3_000_000  # examples, corruptions, a slide's picture


@dataclass(frozen=True)
class _Images:
    """A split of a data set: how many, and their usual size in pixels."""

    number: int
    width: int
    height: int


class _Task:
    """The numbers that work and products of a task have in common."""

    def __init__(self, plan: Plan, jobs: SegmentJobs, name: str, by_id: Mapping[str, SlideSize]) -> None:
        self.plan, self.jobs, self.name, self.of, self._by_id = plan, jobs, name, jobs.tasks[name], by_id
        self.slides = [by_id[plan.slide(slide).slide_id] for slide in self.of["slides"]]
        self.mpp = self.of["mpp"] or _USUAL_MPP

    def images(self, split: str) -> _Images:
        """Of a split; of a data set that is not there yet, or wrong, the usual number."""
        from dinoscope.segment.datasets import open_dataset

        if self.jobs.data_files(self.name):  # tiles of slides, which are known before they are made
            return self._tiles(split)
        try:
            root = data_root(self.of["dataset"], None if self.of["root"] is None else Path(self.of["root"]))
            data = open_dataset(self.of["dataset"], root, split, **self.of["data"])
            size = usual_size(data.image_path(0)) if hasattr(data, "image_path") else data[0].image.shape[1::-1]
            return _Images(len(data), *size)
        except DinoscopeError:
            return _Images(_USUAL_IMAGES[split], *self.of["img_dim"][::-1])

    def _tiles(self, split: str) -> _Images:
        name = Path(self.of["root"]).stem
        tile_px = self.plan.config["tiling"]["sets"][name]["tile_px"]
        tiles = sum(self._by_id[slide].num_tiles[name] for slide in self.plan.train_slides)
        return _Images(round(_SHARES[split] * tiles), tile_px, tile_px)

    @property
    def asked(self) -> _Images:
        """The images that segmenters are measured on."""
        return self.images(test_split(self.of["dataset"], self.of["split"]))

    def windows(self, images: _Images, settings: TrainSettings) -> int:
        """Windows in which all the images are seen once."""
        if settings.inference == "resize":
            return images.number
        sides = zip((images.height, images.width), settings.img_dim, strict=True)
        return images.number * math.prod(_num_windows(side, window, settings.overlap) for side, window in sides)

    def slide_tiles(self, slide: SlideSize, settings: TrainSettings) -> float:
        """Tiles of a class map: those of features, as many as cover the same area."""
        name = self.plan.config["features"]["set"]
        tiles = self.plan.config["tiling"]["sets"][name]
        side_um = tiles["tile_px"] * (min(tiles["mpp"]) if isinstance(tiles["mpp"], list) else tiles["mpp"])
        stride_um = 0.75 * max(settings.img_dim) * self.mpp
        return slide.num_tiles[name] * (side_um / stride_um) ** 2


def _num_windows(side: int, window: int, overlap: float) -> int:
    """As inference.py lays them."""
    return -(-max(0, side - window) // max(1, int(window * (1 - overlap)))) + 1


def _tasks(plan: Plan, by_id: Mapping[str, SlideSize]) -> list[_Task]:
    jobs = SegmentJobs(plan)
    return [_Task(plan, jobs, name, by_id) for name in jobs.tasks]


def segmentation_work(plan: Plan, by_id: Mapping[str, SlideSize], models: ModelSizes) -> Iterator[Work]:
    """Of all trainings, their measures and their maps.

    Args:
        plan: The plan.
        by_id: Slide -> its size.
        models: Of the plan.
    """
    for task in _tasks(plan, by_id):
        split = {name: task.images(name) for name in ("train", "val")}
        asked = task.asked
        for model in task.jobs.models(task.name):
            for name, variant in task.jobs.variants(task.name).items():
                settings = task.jobs.settings(task.name, name)
                passes = _Passes(models, model, settings)
                yield from _of_training(task, split, settings, passes)
                yield _of_questions(task, asked, settings, passes, "segment_evaluate", 1)
                if task.of["corruptions"]:
                    changes = _num_kinds(task) * len(set(task.of["severities"]))
                    yield _of_questions(task, asked, settings, passes, "segment_corruptions", 1 + changes)
                if variant.seed == task.of["seeds"][0]:
                    tiles = sum(task.slide_tiles(slide, settings) for slide in task.slides)
                    side = max(settings.img_dim)
                    forward = tiles * passes.of_square(side)
                    yield Work("segment_predict_slide", tiles * CLASS_MAP_SECONDS_PER_TILE * side**2 / 224**2, forward)


class _Passes:
    """Operations of one encoder with its decoder."""

    def __init__(self, models: ModelSizes, model: str, settings: TrainSettings) -> None:
        self._vit, self._settings = models.settings(model), settings

    def of_square(self, side_px: float) -> float:
        """Forward pass of a square image."""
        patch = _USUAL_PATCH if self._vit is None else self._vit.patch_size
        side = max(patch, round(side_px / patch) * patch)
        encoder = _USUAL_FLOPS * (side / 224) ** 2 if self._vit is None else backbone_flops(self._vit, side)
        return encoder + self._decoder((side // patch) ** 2)

    @property
    def view(self) -> float:
        """Forward pass of a training view or a window."""
        return self.of_square(math.prod(self._settings.img_dim) ** 0.5)

    @property
    def trained(self) -> float:
        """Passes of a view in a training step, in forward passes."""
        depth = _USUAL_DEPTH if self._vit is None else self._vit.depth
        of = {"decoder": 1.0, "lora": _ADAPTED, "full": _FULL, "last_n": 1 + 2 * self._settings.last_n / depth}
        return of[self._settings.trainable]

    def _decoder(self, patches: int) -> float:
        if self._settings.decoder == "linear":
            return 0.0
        width = _USUAL_WIDTH if self._vit is None else self._vit.embed_dim
        smoothing = 2 * 9 * _FPN_CHANNELS**2 * _FPN_PIXELS
        return patches * (smoothing + 2 * _FPN_BLOCKS * _FPN_CHANNELS * width)


def _of_training(task: _Task, split: Mapping[str, _Images], settings: TrainSettings, passes: _Passes) -> Iterator[Work]:
    views = settings.epochs * max(split["train"].number, settings.batch_size)
    drawn = views * math.prod(settings.img_dim)
    validations = math.ceil(settings.epochs / settings.eval_epochs)
    windows = validations * task.windows(split["val"], settings)
    seen = windows * math.prod(settings.img_dim)
    seconds = (drawn + seen) / 1e6 * SEGMENT_SECONDS_PER_MEGAPIXEL
    yield Work("segment_train", seconds, windows * passes.view, views * passes.view * passes.trained)


def _of_questions(
    task: _Task, images: _Images, settings: TrainSettings, passes: _Passes, rule: str, times: int
) -> Work:
    windows = task.windows(images, settings)
    pixels = times * windows * math.prod(settings.img_dim) / 1e6
    changed = (times - 1) * images.number * images.width * images.height / 1e6
    seconds = pixels * SEGMENT_SECONDS_PER_MEGAPIXEL + changed * CORRUPTION_SECONDS_PER_MEGAPIXEL
    return Work(rule, seconds, times * windows * passes.view)


def _num_kinds(task: _Task) -> int:
    from dinoscope.segment.robustness import kinds_of

    return len(kinds_of(task.of["corruptions"]))


def segmentation_products(plan: Plan, by_id: Mapping[str, SlideSize], models: ModelSizes) -> Iterator[Product]:
    """What tasks of segmentation write.

    Args:
        plan: The plan.
        by_id: Slide -> its size.
        models: Of the plan.
    """
    for task in _tasks(plan, by_id):
        trainings = of_slides = 0.0
        files = 0
        for model in task.jobs.models(task.name):
            for name, variant in task.jobs.variants(task.name).items():
                settings = task.jobs.settings(task.name, name)
                trainings += _KEPT * _FLOAT32 * _num_trained(models, model, settings) + _PICTURES
                trainings += _CORRUPTED_PICTURE * bool(task.of["corruptions"])
                files += 10 + 3 * bool(task.of["corruptions"])
                if variant.seed == task.of["seeds"][0]:
                    of_slides += sum(_of_map(task, slide) for slide in task.slides)
                    files += 4 * len(task.of["slides"])
        folder = f"segmentation/{task.name}"
        yield Product(folder, f"trainings of {task.name}", trainings, files)
        if of_slides:
            saving = Saving(f"name fewer slides in segmentation.tasks.{task.name}.slides", of_slides)
            yield Product(folder, f"class maps of slides by {task.name}", of_slides, 0, 0, (saving,))


def _of_map(task: _Task, slide: SlideSize) -> float:
    return _OF_SLIDE + CLASS_MAP_BYTES_PER_PIXEL * slide.pixels_at(task.mpp)


def _num_trained(models: ModelSizes, model: str, settings: TrainSettings) -> float:
    """Parameters that a training keeps."""
    vit = models.settings(model)
    width, depth = (_USUAL_WIDTH, _USUAL_DEPTH) if vit is None else (vit.embed_dim, vit.depth)
    pyramid = _FPN_BLOCKS * _FPN_CHANNELS * (width + 9 * _FPN_CHANNELS)
    decoder = 2 * width if settings.decoder == "linear" else pyramid  # of two classes; few more is nothing
    if settings.trainable == "full":
        return decoder + models.num_parameters(model)
    if settings.trainable == "last_n":
        return decoder + models.num_parameters(model) * settings.last_n / depth
    if settings.trainable == "lora":
        blocks = depth if settings.blocks is None else len(settings.blocks)
        return decoder + blocks * len(settings.targets) * settings.rank * 2 * width
    return decoder
