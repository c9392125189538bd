"""What is known of a slide before anything expensive starts; free of personal data."""

import hashlib
from typing import Any

import numpy as np

from dinoscope.slides.focal_planes import focal_planes
from dinoscope.slides.looks import describe_looks
from dinoscope.slides.reader import Slide
from dinoscope.slides.resolution import MAX_ANISOTROPY

__all__ = ["THUMBNAIL_PX", "describe_slide"]

THUMBNAIL_PX = 2048
_PROBE_PX = 64


def describe_slide(slide: Slide) -> tuple[dict[str, Any], np.ndarray]:
    """All that later stages and a reader of the report want to know of a slide, and its thumbnail.

    Reads the corners and the middle of every level, so that a file whose end is missing is found out.

    Raises:
        SlideError: The slide cannot be read there.
    """
    digest = hashlib.sha256(f"{slide.width}x{slide.height}".encode())
    for level, (width, height) in enumerate(slide.level_dimensions):
        probes = _probe(slide, level, width, height)
        if level == 0:
            digest.update(probes)
    thumbnail = slide.thumbnail(THUMBNAIL_PX)
    digest.update(thumbnail.tobytes())
    planes = focal_planes(slide.vendor, slide.properties_of_planes(), slide.path, (slide.width, slide.height))
    known = slide.mpp_problem is None
    description = {
        "slide_id": slide.slide_id,
        "width": slide.width,
        "height": slide.height,
        "bounds": list(slide.bounds),
        "mpp_x": slide.mpp_x if known else None,
        "mpp_y": slide.mpp_y if known else None,
        "mpp_source": slide.mpp_source,
        "mpp_problem": slide.mpp_problem,
        "vendor": slide.vendor,
        "scanner": slide.scanner,
        "num_levels": slide.num_levels,
        "level_dimensions": [list(size) for size in slide.level_dimensions],
        "level_downsamples": list(slide.level_downsamples),
        "objective_power": slide.objective_power,
        "has_icc_profile": slide.has_icc_profile,
        "focal_planes": planes._asdict(),
        "looks": describe_looks(thumbnail),
        # of pixels, not of the file: a copy without its metadata has the same
        "content": digest.hexdigest()[:32] if np.ptp(thumbnail) else None,
        "warnings": [*slide.warnings, *_warnings(slide)],
    }
    if planes.warning:
        description["warnings"].append(planes.warning)
    return description, thumbnail


def _warnings(slide: Slide) -> list[str]:
    warnings = []
    if slide.mpp_problem is not None:
        warnings.append(f"the file {slide.mpp_problem}")
    elif abs(slide.mpp_x - slide.mpp_y) > MAX_ANISOTROPY * slide.mpp:
        warnings.append(
            f"mpp is {slide.mpp_x:.4g} horizontally and {slide.mpp_y:.4g} vertically: give the one to use in column "
            "mpp of slides.tsv"
        )
    if slide.num_levels == 1 and max(slide.width, slide.height) > 20_000:
        warnings.append("the file has no lower-resolution levels, which makes tiling slow: convert it to a pyramid")
    return warnings


def _probe(slide: Slide, level: int, width: int, height: int) -> bytes:
    """Pixels of the corners, the middle and the middles of the sides of a level."""
    downsample, pixels = slide.level_downsamples[level], []
    columns, rows = min(_PROBE_PX, width), min(_PROBE_PX, height)
    for left in np.unique([0, (width - columns) // 2, width - columns]):
        for top in np.unique([0, (height - rows) // 2, height - rows]):
            region = slide.read_region(int(left * downsample), int(top * downsample), level, columns, rows)
            pixels.append(region.tobytes())
    return b"".join(pixels)
