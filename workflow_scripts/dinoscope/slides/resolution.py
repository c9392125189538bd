"""Micrometres a pixel: what a slide's file says, what the user says, and what to do when they disagree."""

import math
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["MAX_ANISOTROPY", "MAX_MPP", "MIN_MPP", "Resolution", "find_resolution", "positive_number"]

MIN_MPP, MAX_MPP = 0.05, 50.0
MAX_ANISOTROPY = 0.01
_TOLERATED_CONTRADICTION = 0.05
_OBJECTIVE_TIMES_MPP = 10.0  # of common scanners: 0.25 um a pixel at 40x, 0.5 at 20x
_MICROMETRES_PER_UNIT = {"inch": 25400.0, "centimeter": 10000.0}


class Resolution(NamedTuple):
    """Micrometres a level-0 pixel.

    Attributes:
        x, y: The values, None when unknown or implausible.
        source: "file", "table", "objective" (guessed from its power), or None when unknown.
        problem: Why there is no usable value, as the end of a sentence about the slide.
        warning: What is odd about a usable value, as a sentence.
    """

    x: float | None
    y: float | None
    source: str | None
    problem: str | None = None
    warning: str | None = None


def find_resolution(properties: Mapping[str, str | None], override: float | None) -> Resolution:
    """Decides how many micrometres a pixel has; the user's word counts more than the file's.

    Args:
        properties: OpenSlide's `openslide.mpp-*`, `openslide.objective-power`, `openslide.vendor` and
            `tiff.*Resolution*`, as far as known.
        override: What the user says.
    """
    from_file = _from_properties(properties)
    if override is not None:
        return _overridden(float(override), from_file)
    if from_file is None:
        return _guessed(positive_number(properties.get("openslide.objective-power")))
    if not all(_plausible(value) for value in from_file):
        return Resolution(
            None,
            None,
            "file",
            f"says {from_file[0]:.4g} x {from_file[1]:.4g} micrometres a pixel, outside the plausible "
            f"{MIN_MPP:g} to {MAX_MPP:g}: give the right value in column mpp of slides.tsv",
        )
    return Resolution(*from_file, "file")


def positive_number(text: str | None) -> float | None:
    """A property's text as a positive finite number, or None."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _guessed(objective_power: float | None) -> Resolution:
    """What the objective suggests, where nothing else is known."""
    mpp = _OBJECTIVE_TIMES_MPP / objective_power if objective_power else math.nan
    if not _plausible(mpp):
        problem = "does not say how many micrometres a pixel has: give it in column mpp of slides.tsv"
        return Resolution(None, None, None, problem)
    warning = (
        f"the file does not say its mpp; {mpp:.4g} is guessed from its objective of {objective_power:g}x, which may be "
        "wrong by a third: give the right one in column mpp of slides.tsv"
    )
    return Resolution(mpp, mpp, "objective", warning=warning)


def _overridden(override: float, from_file: tuple[float, float] | None) -> Resolution:
    if not _plausible(override):
        problem = (
            f"has mpp {override:g} in slides.tsv, outside the plausible {MIN_MPP:g} to {MAX_MPP:g} micrometres a "
            "pixel: correct column mpp"
        )
        return Resolution(None, None, "table", problem)
    warning = None
    if from_file and max(abs(value / override - 1) for value in from_file) > _TOLERATED_CONTRADICTION:
        said = f"{from_file[0]:.4g} x {from_file[1]:.4g}"
        warning = f"mpp {override:g} from slides.tsv is used, though the file says {said}"
    return Resolution(override, override, "table", warning=warning)


def _plausible(value: float) -> bool:
    return MIN_MPP <= value <= MAX_MPP


def _from_properties(properties: Mapping[str, str | None]) -> tuple[float, float] | None:
    values = [positive_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy"]
    unit = _MICROMETRES_PER_UNIT.get((properties.get("tiff.ResolutionUnit") or "").lower())
    if not any(values) and properties.get("openslide.vendor") == "generic-tiff" and unit:
        resolutions = [positive_number(properties.get(f"tiff.{axis}Resolution")) for axis in "XY"]
        values = [unit / resolution if resolution else None for resolution in resolutions]
    known = [value for value in values if value]
    return (values[0] or known[0], values[1] or known[0]) if known else None
