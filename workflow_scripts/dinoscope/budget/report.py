"""A budget as a table, as files, and as the sentences that refuse it."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dinoscope.budget.hours import LARGE_MODELS
from dinoscope.budget.models import Device
from dinoscope.budget.products import Product, Saving
from dinoscope.budget.space import Space
from dinoscope.budget.tiles import SlideSize
from dinoscope.train.outlook import time_in_words

__all__ = ["Budget", "as_table", "as_tsv", "shortages"]

_SAFETY = 1.05  # file systems slow down, and estimates err
_SOURCES = {
    "tiled": "counted where they are tiled",
    "thumbnail": "estimated from the tissue on their thumbnails",
    "size": "estimated from their size, and the share that tiles cover of others",
    "unknown": "guessed: not inspected, and not to be opened",
}
_STAGES = {
    "slides": ("demo_slides", "demo_biopsies", "inspect_slide", "slides_report", "tile_slide", "split_slides",
               "merge_manifest", "slide_table", "pack_slide", "pack_index"),
    "training": ("initial_weights", "train", "convert", "plot_metrics", "export_hf", "export_timm", "export_onnx"),
    "features": ("extract_features",),
    "pictures": ("list_features", "pca_fit", "pca_map", "pca_compare", "pca_region", "cluster_fit", "cluster_map",
                 "cluster_examples"),
    "evaluation": ("random_weights", "evaluation_units", "embed_images", "probe_set", "measure_model",
                   "compare_models", "evaluation_summary"),
    "segmentation": ("segment_train", "segment_evaluate", "segment_corruptions", "segment_compare",
                     "segment_predict_slide"),
    "viewer": ("viewer_pyramid", "list_sampled", "viewer_sample", "viewer_tiles", "viewer"),
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """All that is known before the first job.

    Attributes:
        slides: Size and tiles of each.
        products: What will be written.
        there: Bytes of it that are there already.
        space: What may still be written.
        jobs: Rule -> jobs.
        submitted: Profile -> jobs that its scheduler gets; empty where there is no profile of a cluster.
        hours: Rule -> hours, one job after the other.
        device: What models are computed on.
        memory: Run -> bytes of the device that has most to hold.
    """

    slides: Sequence[SlideSize]
    products: Sequence[Product]
    there: int
    space: Space
    jobs: Mapping[str, int]
    submitted: Mapping[str, int]
    hours: Mapping[str, float]
    device: Device
    memory: Mapping[str, int]

    @property
    def bytes(self) -> float:
        """Of all products."""
        return sum(product.bytes for product in self.products)

    @property
    def missing(self) -> float:
        """Bytes that are still to be written, with a margin."""
        return max(0.0, self.bytes - self.there) * _SAFETY

    @property
    def files(self) -> int:
        """Number of files of all products."""
        return sum(product.files for product in self.products)

    def as_dict(self) -> dict[str, Any]:
        """For budget.json."""
        products = [{**asdict(product), "bytes": round(product.bytes)} for product in self.products]
        slides = {name: sum(slide.source == name for slide in self.slides) for name in _SOURCES}
        return {
            "slides": slides,
            "tiles": _tiles(self.slides),
            "bytes": round(self.bytes),
            "bytes_there": self.there,
            "bytes_free": self.space.bytes,
            "files": self.files,
            "products": products,
            "jobs": dict(self.jobs),
            "submitted": dict(self.submitted),
            "hours": {rule: round(value, 4) for rule, value in self.hours.items()},
            "device": asdict(self.device),
            "memory": dict(self.memory),
            "shortages": shortages(self),
        }


def shortages(budget: Budget) -> list[str]:
    """A sentence for each thing that is short, with what to change."""
    found, space = [], budget.space
    if budget.missing > space.bytes:
        advice = _advice(budget.products, budget.missing - space.bytes)
        found.append(
            f"the results need {_gb(budget.missing)} more and {_gb(space.bytes)} are free {space.limited_by}: {advice}"
        )
    if space.files is not None and budget.files > space.files:
        found.append(
            f"the results are {budget.files:,} files and the disk has room for {space.files:,} (inodes): set "
            "viewer.mpp higher or viewer.enabled to false, or write results to another disk"
        )
    largest = max(budget.products, key=lambda product: product.largest)
    if space.largest is not None and largest.largest > space.largest:
        found.append(
            f"a file of {largest.name} has {_gb(largest.largest)} and this shell allows {_gb(space.largest)} a file: "
            "raise it (ulimit -f unlimited)"
        )
    for run, needed in budget.memory.items():
        if budget.device.bytes is not None and needed > budget.device.bytes:
            found.append(
                f"run {run} needs {_gib(needed)} of memory a GPU and there are {_gib(budget.device.bytes)}: lower "
                "train.batch_size_per_gpu and raise train.accumulation_steps, or set train.checkpointing"
            )
    return found


def _advice(products: Sequence[Product], short: float) -> str:
    """The fewest settings that save as much, the largest saving first, one of each product."""
    best = [max(product.savings, key=lambda saving: saving.bytes) for product in products if product.savings]
    chosen: list[Saving] = []
    for saving in _enough_alone(products, short) or sorted(best, key=lambda saving: -saving.bytes):
        if sum(each.bytes for each in chosen) >= short or len(chosen) == 3:
            break
        chosen.append(saving)
    missing = short - sum(saving.bytes for saving in chosen)
    texts = [f"{saving.advice} (saves {_gb(saving.bytes)})" for saving in chosen]
    room = f"make room for {_gb(missing if missing > 0 else short)}"
    if missing > 0:
        return " and ".join([*texts, room])
    return " and ".join(texts) + f", or {room}"


def _enough_alone(products: Sequence[Product], short: float) -> list[Saving]:
    """Of the settings that are enough by themselves the one that gives up least."""
    enough = [saving for product in products for saving in product.savings if saving.bytes >= short]
    return sorted(enough, key=lambda saving: saving.bytes)[:1]


def as_table(budget: Budget) -> str:
    """For the terminal."""
    rows = [("slides", f"{len(budget.slides):,}: {_sources(budget.slides)}")]
    rows += [("tiles", f"{name}: {count:,}") for name, count in _tiles(budget.slides).items()]
    rows += [("disk", f"{_gb(product.bytes):>9}  {product.name}") for product in budget.products]
    rows.append(("", f"{_gb(budget.bytes):>9}  in {budget.files:,} files; {_gb(budget.there)} of them are there"))
    rows.append(("", f"{_gb(budget.space.bytes):>9}  free {budget.space.limited_by}"))
    rows += [
        ("memory", f"{run}: {_gib(needed)} {_device_unit(budget.device)}") for run, needed in budget.memory.items()
    ]
    rows += [("time", text) for text in _times(budget)]
    rows.append(("jobs", f"{sum(budget.jobs.values()):,} of Snakemake: {_largest_first(budget.jobs)}"))
    rows += [
        ("", f"about {count:,} submitted to the cluster by profile {name}") for name, count in budget.submitted.items()
    ]
    lines, before = [], None
    for label, text in rows:
        lines.append(f"{'' if label in (before, '') else label:<8}{text}")
        before = label or before
    return "\n".join(lines)


def as_tsv(budget: Budget) -> str:
    """One row a number: section, name, value, unit."""
    rows = [("section", "name", "value", "unit")]
    rows += [("tiles", name, count, "tiles") for name, count in _tiles(budget.slides).items()]
    rows += [("disk", product.name, round(product.bytes), "bytes") for product in budget.products]
    rows += [("disk", "all", round(budget.bytes), "bytes"), ("disk", "there", budget.there, "bytes")]
    rows += [("disk", "free", budget.space.bytes, "bytes"), ("disk", "files", budget.files, "files")]
    rows += [("memory", run, needed, "bytes") for run, needed in budget.memory.items()]
    rows += [("time", rule, round(value, 4), "hours") for rule, value in budget.hours.items()]
    rows += [("jobs", rule, count, "jobs") for rule, count in budget.jobs.items()]
    rows += [("submitted", name, count, "jobs") for name, count in budget.submitted.items()]
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(rows)
    return text.getvalue()


def _tiles(slides: Sequence[SlideSize]) -> dict[str, int]:
    return {name: sum(slide.num_tiles[name] for slide in slides) for name in (slides[0].num_tiles if slides else ())}


def _sources(slides: Sequence[SlideSize]) -> str:
    counts = {name: sum(slide.source == name for slide in slides) for name in _SOURCES}
    return "; ".join(f"{count:,} {_SOURCES[name]}" for name, count in counts.items() if count)


def _times(budget: Budget) -> list[str]:
    texts = []
    for stage, rules in _STAGES.items():
        hours = sum(budget.hours.get(rule, 0) for rule in rules)
        if hours:
            texts.append(f"{time_in_words(3600 * hours):>12}  {stage}, one job after the other")
    device = budget.device
    large = ", ".join(rule for rule in LARGE_MODELS[:2] if rule in budget.hours)
    kind = "processes on the CPU" if device.kind == "cpu" else "GPUs"
    if large:
        texts.append(
            f"({large}: {device.count} {kind}, {device.flops / 1e12:.3g} TFLOP/s together, {device.source}; training "
            f"at {100 * device.training_share:.0f} % of it)"
        )
    return texts


def _largest_first(jobs: Mapping[str, int]) -> str:
    most = sorted(jobs.items(), key=lambda item: -item[1])
    return ", ".join(f"{rule} {count:,}" for rule, count in most[:8]) + (", …" if len(most) > 8 else "")


def _device_unit(device: Device) -> str:
    there = "" if device.bytes is None else f" of {_gib(device.bytes)}"
    return f"{there} a process".strip() if device.kind == "cpu" else f"{there} a GPU".strip()


def _gb(size: float) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GiB"
