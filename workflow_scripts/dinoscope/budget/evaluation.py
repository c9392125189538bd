"""What evaluation takes: passes of models over images from elsewhere, probes on folds, and what it writes."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from dinoscope.budget.measured import (
    ATTENTION_EPOCHS,
    ATTENTION_SECONDS_PER_BAG,
    ATTENTION_SECONDS_PER_BAG_AND_WIDTH,
    CPU_FLOPS_PER_CORE,
    DESCRIPTION_SECONDS_PER_WIDTH,
    PROBE_SECONDS_PER_FOLD,
    PROBE_SECONDS_PER_ROW,
    PROBE_SECONDS_PER_VALUE,
    SITE_SECONDS_PER_WIDTH,
)
from dinoscope.budget.models import ModelSizes
from dinoscope.budget.pixels import usual_size
from dinoscope.budget.products import Product, Saving
from dinoscope.budget.tiles import SlideSize
from dinoscope.budget.work import Work
from dinoscope.evaluate.baseline_names import BASELINES
from dinoscope.evaluate.labels import Label, labels_of_units, read_labels
from dinoscope.evaluate.tile_sets import image_files
from dinoscope.plan import Plan
from dinoscope.plan_evaluation import DESCRIPTIVE, LABEL, SHIFTS, TILES, EvaluationJobs
from dinoscope.plan_features import FeatureJobs
from dinoscope.train.flops import backbone_flops

__all__ = ["evaluation_products", "evaluation_work"]

_WIDTHS = {"color-histogram": 48, "thumbnail": 192}  # of baselines that are no network
_SECONDS_PER_PIXEL = 1.1e-7  # of histograms, and of reading and changing tiles
_CHOOSING_ROWS = 20_000  # of a linear probe; the one last fit of more rows is cheap beside the choice
_MOST_PATCHES, _MOST_DESCRIBED = 50_000, 10_000
_HIDDEN, _GATE = 128, 64  # of attention
_FLOAT32, _FLOAT16, _COORDS, _H5 = 4, 2, 16, 12_000
_FIGURE = 120_000  # a task's figure, tables and answers
_USUAL_FLOPS, _USUAL_PATCH = 123e9, 16  # of an encoder that no file tells of


class _Asked:
    """The numbers that work and products have in common."""

    def __init__(self, plan: Plan, by_id: Mapping[str, SlideSize], models: ModelSizes) -> None:
        self.plan, self.by_id, self.models = plan, by_id, models
        self.features = FeatureJobs(plan)
        self.jobs = EvaluationJobs(plan, self.features)
        self.settings = plan.config["evaluation"]
        self.tasks = self.jobs.tasks if self.settings["enabled"] else []

    def width(self, model: str, tile_px: int) -> int:
        """Numbers a tile."""
        if model in _WIDTHS:
            return _WIDTHS[model]
        return self.models.features(model, self.jobs.pooling(model), tile_px).width

    def flops(self, model: str, side_px: int) -> float:
        """Of a square image; what is no network has none."""
        if model in _WIDTHS:
            return 0.0
        settings = self.models.settings(model)
        return _USUAL_FLOPS * (side_px / 224) ** 2 if settings is None else backbone_flops(settings, side_px)

    def patch_px(self, model: str) -> int:
        """Side of a patch."""
        settings = self.models.settings(model)
        return _USUAL_PATCH if settings is None else settings.patch_size

    def tile_px(self, model: str) -> int:
        """Side of the tiles that its features are of."""
        return self.plan.config["tiling"]["sets"][self.features.tile_set(model)]["tile_px"]

    def num_tiles(self, task: str, model: str) -> int:
        """Tiles of the slides of a task."""
        tile_set = self.features.tile_set(model)
        return sum(self.by_id[slide].num_tiles[tile_set] for slide in self.jobs.slides(task))

    def images(self, task: str) -> tuple[int, float]:
        """Number of a task's images and side of a square of as many pixels as the first of them has for a model."""
        folder, settings = Path(self.jobs.folders(task)[0]), self.jobs.images(task)
        files = image_files(folder) if folder.is_dir() else []
        if task.startswith(TILES):
            return len(files), settings["tile_px"]
        width, height = usual_size(folder / files[0]) if files else (0, 0)
        return len(files), settings["enlarge"] * (width * height) ** 0.5

    def num_patches(self, task: str, model: str) -> int:
        """Patches of a task's images with masks."""
        number, side = self.images(task)
        return round(number * (side / self.patch_px(model)) ** 2)

    def extracted(self) -> dict[str, list[str]]:
        """Baseline -> slides whose features only evaluation wants."""
        found: dict[str, dict[str, None]] = {}
        for task in self.tasks:
            for model in self.jobs.models(task):
                if task not in self.jobs.image_tasks and model in BASELINES:
                    found.setdefault(model, {}).update(dict.fromkeys(self.jobs.slides(task)))
        return {model: list(slides) for model, slides in found.items()}

    @property
    def num_copies(self) -> int:
        """Of a tile that each model sees, itself included."""
        return 1 + (len(SHIFTS) if self.settings["robustness"] else 0)

    @property
    def num_folds(self) -> int:
        """Of all repeats and splits together."""
        return self.settings["folds"] * self.settings["repeats"] * len(self.settings["splits"])


def evaluation_work(plan: Plan, by_id: Mapping[str, SlideSize], models: ModelSizes) -> Iterator[Work]:
    """Of all tasks and models, and of the features of baselines.

    Args:
        plan: The plan.
        by_id: Slide -> its size.
        models: Of the plan.
    """
    asked = _Asked(plan, by_id, models)
    for model, slides in asked.extracted().items():
        tile_set, side = asked.features.tile_set(model), asked.tile_px(model)
        tiles = sum(by_id[slide].num_tiles[tile_set] for slide in slides)
        pixels = tiles * side**2 if model in _WIDTHS else 0
        yield Work("extract_features", pixels * _SECONDS_PER_PIXEL, tiles * asked.flops(model, side))
    for task in asked.tasks:
        for model in asked.jobs.models(task):
            if task in asked.jobs.image_tasks:
                yield from _of_images(asked, task, model)
            elif task == DESCRIPTIVE:
                described = min(_MOST_DESCRIBED, asked.num_tiles(task, model)) / _MOST_DESCRIBED
                width = asked.width(model, asked.tile_px(model))
                yield Work("measure_model", DESCRIPTION_SECONDS_PER_WIDTH * width * described)
            else:
                yield Work("measure_model", _of_label(asked, task, model))


def _of_images(asked: _Asked, task: str, model: str) -> Iterator[Work]:
    """A model over images, and the probes of what it says."""
    number, side = asked.images(task)
    if task.startswith(TILES):
        side, rows, folds = round(side), number, asked.num_folds
        passes = number * asked.num_copies * asked.flops(model, side)
    else:
        patch = asked.patch_px(model)
        side = max(patch, round(side / patch) * patch)
        rows, folds = min(_MOST_PATCHES, asked.num_patches(task, model)), asked.settings["folds"]
        passes = number * asked.flops(model, side)
    pixels = number * side**2 * (asked.num_copies if task.startswith(TILES) else 1)
    yield Work("embed_images", pixels * _SECONDS_PER_PIXEL, passes)
    yield Work("measure_model", _of_probes(rows, asked.width(model, side), folds))


def _of_label(asked: _Asked, task: str, model: str) -> float:
    """Seconds of the probes of a label, attention among them."""
    (label,) = read_labels(asked.plan.config["labels"], [task.removeprefix(LABEL)])
    units = len(labels_of_units(label, asked.jobs.slides(task), asked.jobs.cohort.case_of))
    width, tiles = asked.width(model, asked.tile_px(model)), asked.num_tiles(task, model)
    tiles = min(tiles, asked.settings["max_tiles"])
    seconds = _of_probes(units, width, asked.num_folds)
    if any(asked.plan.slides[slide].site for slide in asked.jobs.slides(task)):
        seconds += SITE_SECONDS_PER_WIDTH * width * min(1.0, tiles / _MOST_DESCRIBED)
    return seconds + (_of_attention(asked, label, units, width, tiles) if asked.settings["attention"] else 0)


def _of_attention(asked: _Asked, label: Label, units: int, width: int, tiles: int) -> float:
    """Trained on two thirds of the cases of each fold, until it gets no better; then asked about all their tiles."""
    a_bag = ATTENTION_SECONDS_PER_BAG + ATTENTION_SECONDS_PER_BAG_AND_WIDTH * width
    epochs = ATTENTION_EPOCHS * (4 if label.kind == "survival" else 1)
    trained = asked.num_folds * epochs * 0.64 * units * a_bag
    repeats = asked.settings["repeats"] * len(asked.settings["splits"])
    return trained + repeats * tiles * 2 * (width * _HIDDEN + 2 * _HIDDEN * _GATE) / CPU_FLOPS_PER_CORE


def _of_probes(rows: int, width: int, folds: int) -> float:
    a_row = PROBE_SECONDS_PER_ROW + PROBE_SECONDS_PER_VALUE * width
    return folds * (PROBE_SECONDS_PER_FOLD + min(rows, _CHOOSING_ROWS) * a_row)


def evaluation_products(plan: Plan, by_id: Mapping[str, SlideSize], models: ModelSizes) -> Iterator[Product]:
    """What evaluation writes.

    Args:
        plan: The plan.
        by_id: Slide -> its size.
        models: Of the plan.
    """
    asked = _Asked(plan, by_id, models)
    for model, slides in asked.extracted().items():
        tile_set, width = asked.features.tile_set(model), asked.width(model, asked.tile_px(model))
        tiles = sum(by_id[slide].num_tiles[tile_set] for slide in slides)
        number = _FLOAT16 if plan.config["features"]["dtype"] == "float16" else _FLOAT32
        size = tiles * (width * number + _COORDS) + _H5 * len(slides)
        saving = Saving("set evaluation.baselines to false", size)
        yield Product(f"features/{model}", f"features of {model}", size, len(slides), 0, (saving,))
    if any(model == "random" for task in asked.tasks for model in asked.jobs.models(task)):
        yield Product("models", "random weights", 2 * _FLOAT32 * models.num_parameters("base"), 3)
    size, files = 0.0, 0
    for task in asked.tasks:
        size, files = size + _FIGURE, files + 4 + 3 * len(asked.jobs.models(task))
        for model in asked.jobs.models(task):
            size += _of_features(asked, task, model)
    if size:
        yield Product("evaluation", "evaluation", size, files)
    if any(asked.jobs.is_probed(run) for run in plan.trained_runs):
        side = plan.config["tiling"]["sets"][plan.config["features"]["set"]]["tile_px"]
        pixels = plan.config["evaluation"]["probe"]["images"] * side**2
        yield Product("evaluation", "images that runs are asked about", 3 * pixels, 1)


def _of_features(asked: _Asked, task: str, model: str) -> float:
    if task not in asked.jobs.image_tasks:
        return 0.0
    number, side = asked.images(task)
    if task.startswith(TILES):
        return number * asked.num_copies * asked.width(model, round(side)) * _FLOAT32
    settings = asked.models.settings(model)
    width = asked.width(model, 224) if settings is None else settings.embed_dim
    return asked.num_patches(task, model) * width * _FLOAT16
