"""The report: one HTML file that holds everything, opens from disk, and is what a person looks at first."""

import base64
import datetime
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from dinoscope.files import read_json, write_text
from dinoscope.visualize.curves import RUN_COLORS, curves_svg
from dinoscope.visualize.evaluation_section import EvaluationFacts, evaluation_facts
from dinoscope.visualize.pca_map import without_title
from dinoscope.visualize.report_data import ModelFacts, ReportData, RunFacts, collect
from dinoscope.visualize.segmentation import Segmented, collect_segmentation

__all__ = ["build_report", "picture_uri"]

MAX_SLIDES_SHOWN = 24
LONGEST_PX, LONGEST_PAGE_PX = 1200, 1900
LOSSES = {
    "total_loss": "total",
    "dino_global_crops_loss": "DINO, global",
    "dino_local_crops_loss": "DINO, local",
    "ibot_loss": "iBOT",
    "koleo_loss": "KoLeo",
    "kde_loss": "KDE",
    "gram_loss": "Gram",
}


@dataclass(frozen=True)
class Picture:
    """A picture with the words under it."""

    label: str
    uri: str
    caption: str


def build_report(
    results: Path,
    models: Sequence[str],
    runs: Sequence[str],
    output: Path,
    *,
    workflow_config: Path | None = None,
    max_slides: int = MAX_SLIDES_SHOWN,
    regions: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
) -> None:
    """Writes the report.

    What is not there (a model without maps, a run that has not begun) is left out or said to be missing.

    Args:
        results: The results folder.
        models: Names of models, in the order of their PCA maps.
        runs: Names of training runs.
        output: The HTML file.
        workflow_config: The workflow's config.yaml, shown without its paths.
        max_slides: Slides shown with pictures, evenly chosen from the table.
        regions: Names of the regions shown at the scale of cells; all that there are when not given.
        tasks: Names of the tasks of segmentation that are shown; all that there are when not given.
    """
    data = collect(results, models, runs, workflow_config=workflow_config)
    shown = _evenly(data.slides, max_slides)
    with_metrics = {run.name: run.metrics for run in data.runs if run.metrics is not None}
    evaluation = evaluation_facts(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(thousands=_thousands, percent=_percent, number=_number, as_yaml=_as_yaml)
    html = environment.get_template("report.html.j2").render(
        data=data,
        viewer="viewer/index.html" if (results / "viewer" / "index.html").is_file() else None,
        date=datetime.date.today().isoformat(),
        summary=[*(evaluation.on_top if evaluation else []), *summary_sentences(data)],
        evaluation=evaluation,
        task_figures=_task_figures(results, evaluation),
        pilot=_pilot(results),
        pilot_figure=_pilot_figure(results),
        rows=[
            (slide, _slide_pictures(results, slide.slide_id, data.models), _cluster_map(results, slide.slide_id))
            for slide in shown
        ],
        regions=_region_pictures(results, regions),
        examples=_cluster_examples(results, data.models),
        segmented=[(row, _segmented_picture(row)) for row in collect_segmentation(results, tasks)],
        curves=Markup(_svg_uri(curves_svg(with_metrics))) if with_metrics else "",
        losses={key: label for key, label in LOSSES.items() if any(run.first_and_last(key) for run in data.runs)},
        run_colors={run.name: RUN_COLORS[number % len(RUN_COLORS)] for number, run in enumerate(data.runs)},
    )
    write_text(output, html)


def summary_sentences(data: ReportData) -> list[str]:
    """What was done and what came of it, in words."""
    sentences = []
    counts = [
        f"{_thousands(data.num_tiles(name))} tiles for {name}{_tile_kind(metadata)}"
        for name, metadata in data.tile_sets.items()
    ]
    tiled = f" were cut into {_joined(counts)}" if counts else " were inspected"
    sentences.append(f"{_count(len(data.slides), 'slide')}{tiled}.")
    uses = [{use.strip() for use in slide.use.split(",")} for slide in data.slides]
    num_train, num_eval = (sum(name in use for use in uses) for name in ("train", "eval"))
    trained_on = {slide for run in data.runs for slide in run.slides}
    num_train = len(trained_on) or num_train
    if num_train or num_eval:
        held_out = f"{num_eval or 'none'} {'was' if num_eval == 1 else 'were'} held out"
        sentences.append(f"Training saw {_count(num_train, 'slide')}; {held_out}.")
    sentences += [sentence for run in data.runs if (sentence := _run_sentence(run))]
    explained = [f"{_percent(model.pca['explained_by_top_3'])} with {model.name}" for model in data.models if model.pca]
    if explained:
        sentences.append(
            "The first three principal components explain this much of the variance of the tile features: "
            f"{_joined(explained)}."
        )
    return sentences


def picture_uri(image: Image.Image, longest_px: int = LONGEST_PX) -> str:
    """A picture as a data URI, made smaller and packed as WebP; its metadata stays behind."""
    picture = image.convert("RGB")
    picture.thumbnail((longest_px, longest_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _slide_pictures(results: Path, slide_id: str, models: Sequence[ModelFacts]) -> list[Picture]:
    """The tiling overview (or the thumbnail), then the map of each model that has one."""
    pictures = []
    overview, thumbnail = results / "tiles" / f"{slide_id}.jpg", results / "slides" / f"{slide_id}.jpg"
    if overview.is_file():
        with Image.open(overview) as image:
            pictures.append(Picture("tiling", picture_uri(image), "slide with tissue outline and tile grid"))
    elif thumbnail.is_file():
        with Image.open(thumbnail) as image:
            pictures.append(Picture("slide", picture_uri(image), "the slide"))
    for model in models:
        path = results / "pca" / model.name / f"{slide_id}.png"
        if path.is_file():
            explained = f"3 components explain {_percent(model.pca['explained_by_top_3'])}" if model.pca else "PCA map"
            with Image.open(path) as image:
                pictures.append(Picture(model.name, picture_uri(without_title(image)), explained))
    return pictures


def _page(path: Path, label: str, caption: str) -> list[Picture]:
    """A picture that holds several, if it is there."""
    if not path.is_file():
        return []
    with Image.open(path) as image:
        return [Picture(label, picture_uri(image, LONGEST_PAGE_PX), caption)]


def _cluster_map(results: Path, slide_id: str) -> list[Picture]:
    caption = (
        "the tiles in the colours of their clusters, by every model; equal numbers of different models mean nothing"
    )
    return _page(results / "clusters" / "maps" / f"{slide_id}.png", "clusters", caption)


def _region_pictures(results: Path, regions: Sequence[str] | None) -> list[tuple[str, list[Picture]]]:
    """Colours and similarities of each region that has them."""
    folder = results / "pca" / "regions"
    names = sorted(path.name for path in folder.glob("*") if path.is_dir()) if regions is None else regions
    captions = {
        "colors": (
            "patches",
            "the image and the features of its patches by every model: red, green and blue are three components of "
            "this region's patches; above, a square a patch; below, brought to the pixels along the edges of the image",
        ),
        "similarity": (
            "similarity",
            "how alike every patch is to the one in the green ring (cosine of their features; bright is alike)",
        ),
    }
    found = []
    for name in names:
        pages = [_page(folder / name / f"{file}.png", *words) for file, words in captions.items()]
        if any(pages):
            found.append((name, [picture for page in pages for picture in page]))
    return found


def _cluster_examples(results: Path, models: Sequence[ModelFacts]) -> list[Picture]:
    pages = [
        _page(
            results / "clusters" / model.name / "examples.png", model.name, "the tiles nearest to each cluster's centre"
        )
        for model in models
    ]
    return [picture for page in pages for picture in page]


def _segmented_picture(row: Segmented) -> list[Picture]:
    caption = (
        "image, truth, prediction and error, from the worst image to the best; red: missed or wrong, blue: spurious, "
        "light grey: not asked about"
    )
    return [] if row.page is None else _page(row.page, row.title, caption)


def _task_figures(results: Path, evaluation: EvaluationFacts | None) -> dict[str, Picture]:
    """The figure of each task that has one."""
    figures = {}
    for task in evaluation.tasks if evaluation else []:
        caption = (
            "scores of all models with 95 % intervals by bootstrap over cases; grey: margin around the first model"
        )
        if not task.rows:
            caption = "numbers that describe the features; none has a better direction"
        page = _page(results / "evaluation" / task.name / "figure.png", task.name, caption)
        figures |= dict.fromkeys([task.name], page[0]) if page else {}
    return figures


def _pilot(results: Path) -> dict[str, Any] | None:
    """The advice of the pilot, and the scores that it rests on; None where there was none."""
    path = results / "pilot" / "advice.json"
    if not path.is_file():
        return None
    told = read_json(path)
    return told | {"rows": [row for row in told["rows"] if row["primary"] == "yes"]}


def _pilot_figure(results: Path) -> list[Picture]:
    caption = (
        "left: differences from the start on the selection cases while training, with 95 % intervals; middle: scores "
        "on the test cases; right: how well the site is told within a class"
    )
    return _page(results / "pilot" / "figure.png", "pilot", caption)


def _evenly(items: Sequence[Any], count: int) -> list[Any]:
    if len(items) <= count:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, count).round().astype(int)]


def _run_sentence(run: RunFacts) -> str:
    if run.metrics is None:
        return ""
    sentence = f"Run {run.name} trained for {_count(run.num_iterations, 'iteration')}"
    if losses := run.first_and_last("total_loss"):
        sentence += f"; its total loss went from {_number(losses[0])} to {_number(losses[1])}"
    if run.num_resumed:
        sentence += f", being resumed {'once' if run.num_resumed == 1 else f'{run.num_resumed} times'}"
    return sentence + ("." if run.is_finished else " so far.")


def _tile_kind(metadata: dict[str, Any]) -> str:
    tile_px, mpp = metadata.get("tile_px"), metadata.get("requested_mpp")
    mpps = [f"{each:g}" for each in (mpp if isinstance(mpp, list) else [mpp])] if mpp else []
    return f" ({tile_px} px at {_joined(mpps)} µm a pixel)" if tile_px and mpps else ""


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _count(number: int, noun: str) -> str:
    return f"{_thousands(number)} {noun}" + ("" if number == 1 else "s")


def _thousands(number: int) -> str:
    return f"{number:,}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f}\N{NO-BREAK SPACE}%"


def _number(value: float) -> str:
    """Three significant digits, and a true minus sign."""
    size = abs(value)
    if size == 0:
        return "0"
    if 1000 <= size < 1e7:
        text = f"{size:,.0f}"
    else:
        text = f"{size:#.3g}".rstrip(".") if 1e-3 <= size < 1000 else f"{size:.2e}"
    return f"\N{MINUS SIGN}{text}" if value < 0 else text


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
