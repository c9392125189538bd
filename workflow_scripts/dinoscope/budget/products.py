"""Bytes and files of everything that the workflow writes, and which setting makes each of it smaller."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dinoscope.budget.jobs import featured_slides
from dinoscope.budget.measured import (
    JPEG_BYTES_PER_PIXEL,
    PACKED_BYTES_PER_PIXEL,
    PACKED_QUALITY_STEP,
    PICTURE_BYTES_PER_PIXEL,
    VIEWER_BYTES_PER_PIXEL,
)
from dinoscope.budget.models import ModelSizes
from dinoscope.budget.tiles import SlideSize
from dinoscope.plan import Plan
from dinoscope.plan_features import FeatureJobs
from dinoscope.plan_pictures import PictureJobs

__all__ = ["VIEWER_FOLDER", "Product", "Saving", "products"]

VIEWER_FOLDER = "viewer/slides"
_ROW = 15  # of a tile in a parquet manifest, and what a small file has besides
_PARQUET = 5_500
_MAPPED_ROW = 12
_FLOAT32, _COORDS = 4, 16
_H5 = 12_000
_FILE_OF_MODEL = 40_000  # what torch and safetensors add
_METRICS_LINE = 800
_CLUSTER_GEOJSON, _CLUSTER_LABEL = 215, 1
_VIEWER_TILE = 68
_NEIGHBOUR, _SAMPLE_SCRIPT = 26, 24
_REPORT_SLIDES, _REPORT_SLIDE, _REPORT_MODEL, _REPORT_REGION = 24, 400_000, 200_000, 350_000
_REGION_MODEL_BYTES_PER_PIXEL = 1.95
_EXAMPLES = 3_800_000
_PYRAMID_SHARE = 4 / 3  # of all its levels, relative to the finest
_VIEWER_TILE_PX = 512


@dataclass(frozen=True)
class Saving:
    """A setting that takes bytes off: what to set, and how many."""

    advice: str
    bytes: float


@dataclass(frozen=True)
class Product:
    """One kind of results.

    Attributes:
        folder: Where it lies under the results, for what is there already; several kinds may share one.
        name: In words.
        bytes: Of all of it.
        files: Number of files.
        largest: Bytes of its largest file.
        savings: Settings that make it smaller, independent of each other.
    """

    folder: str
    name: str
    bytes: float
    files: int
    largest: float = 0
    savings: tuple[Saving, ...] = ()


def products(plan: Plan, slides: Sequence[SlideSize], models: ModelSizes) -> list[Product]:
    """Of a plan with all its targets: what `snakemake` without a target makes."""
    by_id = {slide.slide_id: slide for slide in slides}
    used = [by_id[slide_id] for slide_id in plan.feature_slides]
    return [
        *_of_slides(plan, slides),
        *_packed(plan, by_id),
        *_runs(plan, models),
        *_models(plan, models),
        *_features(plan, by_id, models),
        *_pictures(plan, used),
        *_viewer(plan, used, models),
        *_reports(plan),
    ]


def num_tiles(slides: Sequence[SlideSize], tile_set: str) -> int:
    """Tiles of a set over slides."""
    return sum(slide.num_tiles[tile_set] for slide in slides)


def _of_slides(plan: Plan, slides: Sequence[SlideSize]) -> Iterator[Product]:
    pixels = sum(slide.thumbnail_pixels for slide in slides)
    yield Product("slides", "inspected slides", pixels * JPEG_BYTES_PER_PIXEL + 1_500 * len(slides), 2 * len(slides))
    sets = plan.config["tiling"]["sets"]
    rows = _ROW * sum(num_tiles(slides, name) for name in sets) + _PARQUET * len(slides) * len(sets)
    size = rows + (pixels * JPEG_BYTES_PER_PIXEL + 20_000 * len(slides))
    yield Product("tiles", "tile tables and overviews", size, len(slides) * (2 + len(sets)))
    training = [slide for slide in slides if slide.slide_id in set(plan.train_slides)]
    merged = sum(_ROW * num_tiles(training, name) + 12_000 for name in plan.training_sets)
    yield Product("manifests", "merged manifests", merged, len(plan.training_sets))


def _packed(plan: Plan, slides: Mapping[str, SlideSize]) -> Iterator[Product]:
    packed = {run.tile_set for run in map(plan.runs.get, plan.trained_runs) if run and plan.is_packed(run)}
    if not packed:
        return
    training = [slides[slide_id] for slide_id in plan.train_slides]
    settings, total, largest = plan.config["packing"], 0.0, 0.0
    for name in packed:
        pixels = plan.config["tiling"]["sets"][name]["tile_px"] ** 2
        each = [pixels * _packed_bytes_per_pixel(settings) * slide.num_tiles[name] for slide in training]
        total, largest = total + sum(each), max([largest, *each])
    lower = {**settings, "quality": 80, "subsampling": "4:2:0"}
    smaller = total * (1 - _packed_bytes_per_pixel(lower) / _packed_bytes_per_pixel(settings))
    savings = [Saving("set packing.enabled to false", total)]
    if smaller > 0:
        savings = [Saving("set packing.quality to 80 and packing.subsampling to 4:2:0", smaller), *savings]
    yield Product("packed", "packed tiles", total, len(packed) * len(training), largest, tuple(savings))


def _packed_bytes_per_pixel(settings: Mapping[str, object]) -> float:
    """As measured at the nearest quality, and a little more or less for each step from there."""
    measured = PACKED_BYTES_PER_PIXEL[str(settings["subsampling"])]
    quality = int(str(settings["quality"]))
    nearest = min(measured, key=lambda each: abs(each - quality))
    return measured[nearest] * PACKED_QUALITY_STEP ** (quality - nearest)


def _runs(plan: Plan, models: ModelSizes) -> Iterator[Product]:
    for name in plan.trained_runs:
        run, ahead = plan.runs[name], models.forecast(name)
        disk, checkpointing = ahead.disk, run.settings.checkpointing
        metrics = _METRICS_LINE * ahead.iterations / run.settings.train.log_every
        mapped = 0 if run.own_data is not None else _MAPPED_ROW * ahead.num_images
        fewer = max(0, disk.num_checkpoints - 3) * disk.checkpoint  # one more while it is written
        savings = [Saving(f"set checkpointing.max_to_keep to 2 in {run.recipe.name}", fewer)]
        if checkpointing.keep_every < ahead.iterations:
            kept = ahead.iterations // checkpointing.keep_every * disk.checkpoint
            savings = [
                Saving(f"raise checkpointing.keep_every in {run.recipe.name} (now {checkpointing.keep_every})", kept)
            ]
        exports = max(0, disk.num_exports - 3) * disk.export
        savings.append(Saving(f"set evaluation.max_to_keep to 1 in {run.recipe.name}", exports))
        yield Product(
            f"runs/{name}",
            f"run {name}: {disk.num_checkpoints} checkpoints, {disk.num_exports} teachers",
            disk.total + metrics + mapped + 100_000,
            60 + 8 * disk.num_checkpoints,
            max(disk.export, disk.checkpoint / max(1, ahead.world_size)),
            tuple(saving for saving in savings if saving.bytes),
        )


def _models(plan: Plan, models: ModelSizes) -> Iterator[Product]:
    own = list(dict.fromkeys(["base", *plan.trained_runs]))
    formats = plan.config["export"]["formats"]
    each = {name: _FLOAT32 * models.num_parameters(name) + _FILE_OF_MODEL for name in own}
    total = 2 * sum(each.values())
    yield Product("models", "models", total, 3 * len(own), max(each.values()))
    exported = sum(each.get(run, max(each.values())) for run in plan.written_runs) * len(formats)
    if exported:
        saving = Saving("name fewer formats in export.formats", exported)
        yield Product("models", "exported models", exported, 4 * len(formats) * len(plan.written_runs), 0, (saving,))


def _features(plan: Plan, by_id: Mapping[str, SlideSize], models: ModelSizes) -> Iterator[Product]:
    settings, jobs = plan.config["features"], FeatureJobs(plan)
    number = 2 if settings["dtype"] == "float16" else _FLOAT32
    for model in plan.measured_models:
        tile_set = jobs.tile_set(model)
        shape = models.features(model, jobs.pooling(model), plan.config["tiling"]["sets"][tile_set]["tile_px"])
        counts = [by_id[slide_id].num_tiles[tile_set] for slide_id in featured_slides(plan, model)]
        tiles, most = sum(counts), max(counts, default=0)
        rows = tiles * (shape.width * number + _COORDS) + _H5 * len(counts)
        dense = tiles * shape.patches * 2 if settings["dense"] else 0
        savings = []
        if number == _FLOAT32:
            savings.append(Saving("set features.dtype to float16", tiles * shape.width * 2))
        if len(plan.models) > 1 and model in plan.models:
            savings.append(Saving(f"leave {model} out of features.models", rows + dense))
        guessed = ", width guessed" if shape.guessed else ""
        largest = most * (shape.width * number + _COORDS)
        yield Product(
            f"features/{model}", f"features of {model} ({shape.width} numbers a tile{guessed})", rows, len(counts),
            largest if not dense else 0, tuple(savings),
        )  # fmt: skip
        if dense:
            name, saving = f"features of every patch by {model}", Saving("set features.dense to false", dense)
            yield Product(f"features/{model}", name, dense, 0, most * shape.patches * 2, (saving,))
        if model in plan.models:
            yield from _feature_exports(plan, model, shape.width, counts)


def _feature_exports(plan: Plan, model: str, width: int, counts: Sequence[int]) -> Iterator[Product]:
    tiles = sum(counts)
    a_tile = {
        "clam": 2 * width * _FLOAT32 + 8,
        "anndata": width * _FLOAT32 + 120,
        "stamp": width * 2 + 8,
        "parquet": width * _FLOAT32 + 40,
        "wsidata": width * _FLOAT32 + 300,
    }
    for name in plan.config["features"]["export"]:
        size, files = tiles * a_tile[name] + 20_000 * len(counts), len(counts) * {"clam": 2, "wsidata": 60}.get(name, 1)
        saving = Saving(f"leave {name} out of features.export", size)
        yield Product(f"exports/{name}/{model}", f"features of {model} as {name}", size, files, 0, (saving,))


def _pictures(plan: Plan, slides: Sequence[SlideSize]) -> Iterator[Product]:
    pixels, number = sum(slide.thumbnail_pixels for slide in slides), len(plan.models)
    maps = pixels * PICTURE_BYTES_PER_PIXEL * (number + 1.15)
    regions = PictureJobs(plan).regions.values()
    of_regions = sum(region.size_px**2 for region in regions) * number * _REGION_MODEL_BYTES_PER_PIXEL
    size = maps + of_regions + 30_000 * number
    yield Product("pca", "colour maps and regions", size, len(slides) * (number + 1) + 2 * len(regions) + 2 * number)
    if plan.config["pca"]["clusters"] is None:
        return
    tiles = sum(num_tiles(slides, FeatureJobs(plan).tile_set(model)) for model in plan.models)
    size = pixels * PICTURE_BYTES_PER_PIXEL * 0.85 + tiles * (_CLUSTER_GEOJSON + _CLUSTER_LABEL) + number * _EXAMPLES
    saving = Saving("set pca.clusters to null", size)
    yield Product("clusters", "clusters", size, len(slides) * (1 + 2 * number) + 3 * number, 0, (saving,))


def _viewer(plan: Plan, slides: Sequence[SlideSize], models: ModelSizes) -> Iterator[Product]:
    settings = plan.config["viewer"]
    if not settings["enabled"]:
        return
    pixels = sum(slide.pixels_at(settings["mpp"]) for slide in slides) * _PYRAMID_SHARE
    size, coarser = pixels * VIEWER_BYTES_PER_PIXEL, sum(s.pixels_at(2 * settings["mpp"]) for s in slides)
    saved = size - coarser * _PYRAMID_SHARE * VIEWER_BYTES_PER_PIXEL
    savings = (Saving(f"set viewer.mpp to {2 * settings['mpp']:g}", saved), Saving("set viewer.enabled to false", size))
    files = round(pixels / _VIEWER_TILE_PX**2) + 2 * len(slides)
    yield Product(VIEWER_FOLDER, "viewer, pictures", size, files, 0, savings)
    jobs, data, sample = FeatureJobs(plan), 0.0, 0.0
    for model in plan.models:
        tile_set = jobs.tile_set(model)
        tiles = num_tiles(slides, tile_set)
        width = models.features(model, jobs.pooling(model), plan.config["tiling"]["sets"][tile_set]["tile_px"]).width
        sampled = min(tiles, settings["max_tiles"])
        data += tiles * _VIEWER_TILE + sampled * _SAMPLE_SCRIPT
        sample += sampled * (2 * width + _NEIGHBOUR)
    yield Product("viewer/models", "viewer, data of models", data, len(plan.models) * (len(slides) + 1))
    yield Product("neighbours", "viewer, sample of tiles", sample, 2 * len(plan.models))


def _reports(plan: Plan) -> Iterator[Product]:
    shown, number = min(_REPORT_SLIDES, len(plan.slides)), len(plan.models)
    regions = len(PictureJobs(plan).regions) * number * _REPORT_REGION
    size = shown * (_REPORT_SLIDE + number * _REPORT_MODEL) + regions
    yield Product("report.html", "report", size, 1)
    yield Product("plots", "training curves", 340_000 * len(plan.trained_runs), len(plan.trained_runs))
