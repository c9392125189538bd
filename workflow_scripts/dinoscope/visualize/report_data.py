"""What the report tells, collected from the results folder. Whatever is missing is left out, never an error.

Privacy: nothing is taken over that may be a path or a file name, see `without_paths`.
"""

import math
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import yaml

import dinoscope
from dinoscope.errors import RunError
from dinoscope.files import read_json
from dinoscope.slides.manifest import read_metadata
from dinoscope.slides.skipping import SkippedSlide, read_records
from dinoscope.slides.table import COLLECTION
from dinoscope.train.metrics import read_metrics
from dinoscope.train.seal import SEAL_NAME
from dinoscope.visualize.pca import rounding_note

__all__ = ["ModelFacts", "ReportData", "RunFacts", "SlideFacts", "collect", "without_paths"]

PACKAGES = (
    "torch",
    "snakemake",
    "openslide-python",
    "openslide-bin",
    "scikit-learn",
    "numpy",
    "pandas",
    "pyarrow",
    "h5py",
    "opencv-python-headless",
    "omegaconf",
    "matplotlib",
)
PATH_PLACEHOLDER = "(path)"
_SHOWN_SLIDES = 12  # with problems, in the summary; all are listed below the table of slides
_PATH = re.compile(
    r"[/\\]|^~|\.(svs|tiff?|ndpi|mrxs|scn|vms|vmu|bif|czi|svslide|dcm|isyntax|qptiff|zvi|tsv|csv|pth|pt|safetensors)$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class SlideFacts:
    """One row of the table of slides; `warnings` are what is odd about it, `skipped` where it was left out and why."""

    slide_id: str
    use: str
    properties: dict[str, Any]
    tiles: dict[str, int]
    warnings: list[str]
    skipped: list[SkippedSlide] = field(default_factory=list)

    @property
    def size_mm(self) -> tuple[float, float] | None:
        """Width and height in millimetres, if the resolution is known."""
        known = [self.properties.get(key) for key in ("width", "height", "mpp_x", "mpp_y")]
        if not all(known):
            return None
        width, height, mpp_x, mpp_y = known
        return width * mpp_x / 1000, height * mpp_y / 1000


@dataclass(frozen=True)
class RunFacts:
    """A training run: its metrics, its settings, and what it ended with."""

    name: str
    metrics: pd.DataFrame | None
    final: dict[str, Any]
    settings: str
    slides: list[str]

    @property
    def is_finished(self) -> bool:
        """Whether final.json, which is written last, is there."""
        return bool(self.final)

    @property
    def num_iterations(self) -> int:
        """Iterations done so far."""
        return 0 if self.metrics is None else int(self.metrics.index.max()) + 1

    @property
    def num_resumed(self) -> int:
        """How often the run was continued after an interruption."""
        events = [] if self.metrics is None else self.metrics.attrs.get("events", [])
        return sum(event["event"] == "resume" for event in events)

    def first_and_last(self, column: str) -> tuple[float, float] | None:
        """Mean over the first and the last tenth of the iterations (at least one), or None if never logged."""
        if self.metrics is None or column not in self.metrics or not self.metrics[column].notna().any():
            return None
        values = self.metrics[column].dropna()
        share = max(1, len(values) // 10)
        return float(values.iloc[:share].mean()), float(values.iloc[-share:].mean())


@dataclass(frozen=True)
class ModelFacts:
    """A model: its card and the PCA of its features."""

    name: str
    card: dict[str, Any]
    pca: dict[str, Any]


@dataclass(frozen=True)
class ReportData:
    """All of it. `warnings` are sentences."""

    slides: list[SlideFacts]
    tile_sets: dict[str, dict[str, Any]]
    runs: list[RunFacts]
    models: list[ModelFacts]
    workflow_settings: str
    versions: dict[str, str]
    warnings: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> list[SkippedSlide]:
        """Where slides were left out, and why."""
        return [record for slide in self.slides for record in slide.skipped]

    @property
    def odd_slides(self) -> list[SlideFacts]:
        """Slides about which something is odd."""
        return [slide for slide in self.slides if slide.warnings]

    def num_tiles(self, tile_set: str) -> int:
        """Tiles of a set over all slides."""
        return sum(slide.tiles.get(tile_set, 0) for slide in self.slides)


def collect(
    results: Path, models: Sequence[str], runs: Sequence[str], *, workflow_config: Path | None = None
) -> ReportData:
    """Reads everything but the pictures.

    Args:
        results: The results folder.
        models: Names of the models, in the order of the report.
        runs: Names of the training runs, likewise.
        workflow_config: config.yaml of the workflow, shown without its paths.
    """
    slides = _collect_slides(results)
    run_facts = [_run_facts(results / "runs" / name) for name in runs]
    model_facts = [
        ModelFacts(
            name=name,
            card=without_paths(_json_or_empty(results / "models" / name / "model.json")),
            pca=_json_or_empty(results / "pca" / name / "basis.json"),
        )
        for name in models
    ]
    return ReportData(
        slides=slides,
        tile_sets=_tile_sets(results, slides),
        runs=run_facts,
        models=model_facts,
        workflow_settings=_settings(workflow_config) if workflow_config else "",
        versions=_versions(),
        warnings=[*_collection_warnings(results), *_warnings(slides, run_facts, model_facts)],
    )


def without_paths(value: Any) -> Any:
    """A copy of nested settings in which every text that may be a path or a file name is replaced by "(path)".

    Anything with a slash or backslash counts, and anything that ends like a slide, table or model file: rather one
    harmless value too many than a patient's name in a report.
    """
    if isinstance(value, dict):
        return {without_paths(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, str) and _PATH.search(value.strip()):
        return PATH_PLACEHOLDER
    return value


def _collect_slides(results: Path) -> list[SlideFacts]:
    uses = _column(results / "splits.tsv", "use")
    tile_sets = sorted(path.name for path in (results / "tiles").glob("*") if path.is_dir())
    slides, problems = [], _column(results / "slides_report.tsv", "problems")
    skipped = [record for record in read_records(results) if record.reason is not None]
    for slide_id in _slide_ids(results):
        properties = _json_or_empty(results / "slides" / f"{slide_id}.json")
        manifests = {name: results / "tiles" / name / f"{slide_id}.parquet" for name in tile_sets}
        tiles = {name: pq.read_metadata(path).num_rows for name, path in manifests.items() if path.is_file()}
        told = problems.get(slide_id, "none")
        said = [str(warning) for warning in properties.get("warnings", [properties.get("error", "")])]
        warnings = [told] if told != "none" else [warning for warning in said if warning]
        use = uses.get(slide_id, "features only" if uses else "")
        records = [record for record in skipped if record.slide_id == slide_id]
        slides.append(SlideFacts(slide_id, use, properties, tiles, warnings, records))
    return slides


def _slide_ids(results: Path) -> list[str]:
    listed = [slide_id for slide_id in _column(results / "slides_report.tsv", "slide_id") if slide_id != COLLECTION]
    return listed or sorted(path.stem for path in (results / "slides").glob("*.json"))


def _column(path: Path, name: str) -> dict[str, str]:
    """Column `name` of a table by its slide_id; empty if there is no such table or column."""
    if not path.is_file():
        return {}
    table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    if not {"slide_id", name} <= set(table.columns):
        return {}
    return dict(zip(table["slide_id"], table[name], strict=True))


def _tile_sets(results: Path, slides: Sequence[SlideFacts]) -> dict[str, dict[str, Any]]:
    """What the tiles of each set have in common, read off the manifest of the first slide that has one."""
    sets: dict[str, dict[str, Any]] = {}
    for slide in slides:
        for name in slide.tiles.keys() - sets.keys():
            sets[name] = read_metadata(results / "tiles" / name / f"{slide.slide_id}.parquet")
    return dict(sorted(sets.items(), reverse=True))


def _run_facts(run_dir: Path) -> RunFacts:
    try:
        metrics = read_metrics(run_dir)
    except RunError:
        metrics = None
    trained_on = _json_or_empty(run_dir / SEAL_NAME).get("slides", [])
    final, settings = _json_or_empty(run_dir / "final.json"), _settings(run_dir / "config.yaml")
    return RunFacts(run_dir.name, metrics, final, settings, trained_on)


def _settings(path: Path) -> str:
    if not path.is_file():
        return ""
    settings = without_paths(yaml.safe_load(path.read_text(encoding="utf-8")))
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True, width=100)


def _json_or_empty(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _versions() -> dict[str, str]:
    versions = {"dinoscope": dinoscope.__version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _collection_warnings(results: Path) -> list[str]:
    """What the preflight says of the collection as a whole."""
    told = _column(results / "slides_report.tsv", "problems").get(COLLECTION)
    return [f"{told[0].upper()}{told[1:]}."] if told else []


def _first(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _warnings(slides: list[SlideFacts], runs: list[RunFacts], models: list[ModelFacts]) -> list[str]:
    skipped = [slide.slide_id for slide in slides if slide.skipped]
    found = [f"{len(skipped)} of {len(slides)} slides were skipped: {_first(skipped)}."] if skipped else []
    odd = [slide for slide in slides if slide.warnings and not slide.skipped]
    if len(odd) > _SHOWN_SLIDES:
        found.append(f"{len(odd)} of {len(slides)} slides have problems, listed below the table of slides.")
    else:
        found += [f"Slide {slide.slide_id}: {warning}" for slide in odd for warning in slide.warnings]
    held_out = {slide.slide_id for slide in slides if "eval" in slide.use.split(",")}
    found += [
        f"Run {run.name} was trained on {leaked}, which is held out by now: it is no test of this run."
        for run in runs
        for leaked in sorted(held_out & set(run.slides))
    ]
    for slide in slides:
        empty = [name for name, count in slide.tiles.items() if count == 0]
        if empty and not slide.skipped:
            found.append(f"Slide {slide.slide_id}: no tissue was found, so it has no tiles (set {', '.join(empty)}).")
    for run in runs:
        if run.metrics is None:
            found.append(f"Run {run.name}: it has not logged anything yet.")
        elif not run.is_finished:
            found.append(f"Run {run.name}: not finished; its curves end at iteration {run.num_iterations - 1}.")
        elif not all(math.isfinite(value) for value in run.metrics.get("total_loss", pd.Series([0.0]))):
            found.append(f"Run {run.name}: its total loss was not finite at some iterations.")
    for model in models:
        if not model.pca:
            found.append(f"Model {model.name}: there are no PCA maps of its features.")
        elif note := rounding_note(model.pca):
            found.append(f"{note[0].upper()}{note[1:]}.")
    return found
