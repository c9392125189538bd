"""What a slide looks like, from its thumbnail: bright or dark ground, and the hues of what is stained.

Only to compare with what the slide table says of the stain: a table whose rows have slipped shows here. The bounds are
wide, so that pale, old and restained slides pass.
"""

import cv2
import numpy as np

__all__ = ["describe_looks", "stain_contradiction"]

_MAX_PX = 512
_DARK, _BRIGHT = 60, 190
_MIN_SATURATION, _MIN_STAINED = 0.08, 0.0005
# Hue in degrees, from the first to before the second.
_HUES = {"brown": (5, 55), "green": (55, 165), "blue": (165, 250), "purple": (250, 305), "pink": (305, 365)}


def describe_looks(thumbnail: np.ndarray) -> dict[str, float]:
    """Shares of dark and bright pixels, of stained ones, and of each hue among these, 0 to 1.

    Args:
        thumbnail: uint8 (height, width, 3), RGB, the whole slide.
    """
    longest = max(thumbnail.shape[:2])
    if longest > _MAX_PX:
        scale = _MAX_PX / longest
        size = tuple(max(1, round(side * scale)) for side in thumbnail.shape[1::-1])
        thumbnail = cv2.resize(thumbnail, size, interpolation=cv2.INTER_AREA)
    brightest, darkest = (limit(thumbnail, axis=2).astype(np.float32) for limit in (np.max, np.min))
    hue = cv2.cvtColor(thumbnail.astype(np.float32) / 255, cv2.COLOR_RGB2HSV)[..., 0]
    saturation = (brightest - darkest) / np.maximum(brightest, 1)
    stained = (saturation > _MIN_SATURATION) & (brightest > 30)
    looks = {
        "dark": float((brightest < _DARK).mean()),
        "bright": float((darkest > _BRIGHT).mean()),
        "stained": float(stained.mean()),
    }
    number = max(1, int(stained.sum()))
    # saturated pixels count more: the edge of everything is pale and of any hue
    weights = np.where(stained, saturation, 0)
    total = max(float(weights.sum()), 1e-6)
    for name, (first, last) in _HUES.items():
        inside = (hue >= first) & (hue < last) | (hue + 360 < last)
        looks[name] = float(weights[inside].sum()) / total if number > 1 else 0.0
    return {name: round(value, 4) for name, value in looks.items()}


def stain_contradiction(stain: str | None, looks: dict[str, float]) -> str | None:
    """A sentence if a slide looks unlike its stain, else None; unknown stains are never contradicted.

    Args:
        stain: Column `stain` of the slide table.
        looks: As `describe_looks` gives them.
    """
    kind = (stain or "").partition(":")[0].strip().casefold()
    if kind not in {"he", "ihc", "pap", "mgg", "if"}:
        return None
    is_dark = looks["dark"] > 0.5 and looks["bright"] < 0.02
    if kind == "if":
        bright = looks["bright"] > 0.3
        return f"{_says(stain)}, but {looks['bright']:.0%} of the slide is bright ground" if bright else None
    if is_dark:
        return f"{_says(stain)}, but the slide is dark without bright ground, as fluorescence is"
    if looks["stained"] < _MIN_STAINED:
        return f"{_says(stain)}, but hardly anything on the slide has a colour ({looks['stained']:.2%} of it)"
    rosy = looks["pink"] + looks["purple"]
    if kind == "he" and looks["brown"] > 0.25 and rosy < 0.5:
        return f"{_says(stain)}, but the slide is brown ({looks['brown']:.0%} of what is stained), as DAB is"
    if kind == "he" and rosy < 0.1:
        return f"{_says(stain)}, but only {rosy:.0%} of what is stained is pink or purple"
    if kind == "ihc" and looks["pink"] > 0.5 and looks["brown"] < 0.1:
        return f"{_says(stain)}, but {looks['pink']:.0%} of what is stained is pink, as eosin is"
    return None


def _says(stain: str | None) -> str:
    return f"column stain says {stain}"
