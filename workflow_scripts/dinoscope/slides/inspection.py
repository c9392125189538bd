"""What is known of a slide before anything expensive starts, and the table of a whole collection's problems."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinoscope.errors import SlideError
from dinoscope.files import read_json, write_text
from dinoscope.slides.reader import Slide

__all__ = ["REPORT_COLUMNS", "describe_slide", "report_rows", "without_file_name", "write_report"]

_PROBE_PX = 64
REPORT_COLUMNS = ("slide_id", "problems", "width", "height", "mpp_x", "mpp_y", "mpp_source", "vendor", "num_levels")


def describe_slide(slide: Slide) -> dict[str, Any]:
    """All that later stages and a reader of the report want to know of a slide; free of personal data.

    Reads the corners and the middle of every level, so that a file whose end is missing is found out.

    Raises:
        SlideError: The slide cannot be read there.
    """
    for level, (width, height) in enumerate(slide.level_dimensions):
        _probe(slide, level, width, height)
    known = slide.mpp_problem is None
    warnings = list(slide.warnings)
    if not known:
        warnings.append(f"the file {slide.mpp_problem}")
    elif abs(slide.mpp_x - slide.mpp_y) > 0.01 * slide.mpp:
        warnings.append(
            f"mpp is {slide.mpp_x:.4g} horizontally and {slide.mpp_y:.4g} vertically: give the one to use in column "
            "mpp of slides.tsv"
        )
    if slide.num_levels == 1 and max(slide.width, slide.height) > 20_000:
        warnings.append("the file has no lower-resolution levels, which makes tiling slow: convert it to a pyramid")
    return {
        "slide_id": slide.slide_id,
        "width": slide.width,
        "height": slide.height,
        "mpp_x": slide.mpp_x if known else None,
        "mpp_y": slide.mpp_y if known else None,
        "mpp_source": slide.mpp_source,
        "vendor": slide.vendor,
        "num_levels": slide.num_levels,
        "level_dimensions": [list(size) for size in slide.level_dimensions],
        "level_downsamples": list(slide.level_downsamples),
        "objective_power": slide.objective_power,
        "has_icc_profile": slide.has_icc_profile,
        "warnings": warnings,
    }


def without_file_name(error: SlideError, path: str | Path) -> str:
    """The message of an error without the file's name and folder, fit for results that may be passed on."""
    path = Path(path)
    return str(error).replace(f" (file {path.name})", "").replace(f"{path.stem}/", "")


def report_rows(documents: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """One row a slide, those with problems first, then by slide_id.

    Args:
        documents: What `describe_slide` returned, or {"slide_id", "error"} of slides that could not be read.
    """
    rows = []
    for document in documents:
        problems = [document["error"]] if "error" in document else document["warnings"]
        row = {name: _cell(document.get(name)) for name in REPORT_COLUMNS}
        rows.append(row | {"problems": _cell("; ".join(problems) or "none")})
    return sorted(rows, key=lambda row: (row["problems"] == "none", row["slide_id"]))


def write_report(path: str | Path, inspected: Sequence[str | Path]) -> list[dict[str, str]]:
    """Writes the table of `report_rows` for inspected slides as tab-separated text and returns its rows."""
    rows = report_rows(read_json(document) for document in inspected)
    lines = ["\t".join(REPORT_COLUMNS), *("\t".join(row[name] for name in REPORT_COLUMNS) for row in rows)]
    write_text(path, "\n".join(lines) + "\n")
    return rows


def _probe(slide: Slide, level: int, width: int, height: int) -> None:
    downsample = slide.level_downsamples[level]
    columns, rows = min(_PROBE_PX, width), min(_PROBE_PX, height)
    for left in np.unique([0, (width - columns) // 2, width - columns]):
        for top in np.unique([0, (height - rows) // 2, height - rows]):
            slide.read_region(int(left * downsample), int(top * downsample), level, columns, rows)


def _cell(value: object) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split())
