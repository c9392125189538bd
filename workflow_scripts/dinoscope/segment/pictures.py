"""Pictures of segmentations: image, truth, prediction and where they differ."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dinoscope.segment.metrics import IGNORED
from dinoscope.visualize.page import Panel, save_panels

__all__ = ["Example", "draw_examples", "evenly_ranked", "in_colors", "mistakes"]

PANEL_PX = 480
RIGHT_SHARE = 0.35  # of the grey image that shows through where the prediction is right
MISSED, SPURIOUS, IGNORED_COLOR = (230, 60, 40), (40, 110, 230), (235, 235, 235)
MAX_KEY = 8


@dataclass(frozen=True)
class Example:
    """An image (H, W, 3) uint8 with its true and predicted classes (H, W) uint8, and words about it."""

    image: np.ndarray
    truth: np.ndarray
    said: np.ndarray
    name: str
    note: str = ""


def draw_examples(
    output: str | os.PathLike[str],
    examples: Sequence[Example],
    classes: Sequence[str],
    palette: np.ndarray,
    *,
    title: str,
    subtitle: str = "",
) -> None:
    """Saves a page of rows image | truth | prediction | error as a PNG.

    Args:
        output: The PNG.
        examples: A row each; all are brought to one size.
        classes: Names; with two of them errors are told as missed and spurious, else as wrong.
        palette: (C, 3) uint8, their colours.
        title: Of the page.
        subtitle: Below it.
    """
    height, width = examples[0].image.shape[:2]
    factor = PANEL_PX / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    rows = []
    for number, example in enumerate(examples):
        pictures = (
            example.image,
            in_colors(example.truth, palette, example.image),
            in_colors(example.said, palette, example.image),
            mistakes(example.image, example.truth, example.said, len(classes)),
        )
        heads = ("image", "truth", "prediction", "error") if number == 0 else ("", "", "", "")
        words = (example.name, "", example.note, _errors_in_words(example))
        rows.append([Panel(_resized(p, size), h, w) for p, h, w in zip(pictures, heads, words, strict=True)])
    save_panels(output, rows, title=title, subtitle=subtitle, key=_key(examples, classes, palette))


def in_colors(
    mask: np.ndarray, palette: np.ndarray, image: np.ndarray | None = None, share: float = 0.65
) -> np.ndarray:
    """Classes as colours (H, W, 3) uint8; an image shows through, and alone where the colour is black.

    Args:
        mask: (H, W) uint8, `IGNORED` is left light grey.
        palette: (C, 3) uint8.
        image: (H, W, 3) uint8.
        share: Of the colours; the rest is the image.
    """
    table = np.full((256, 3), IGNORED_COLOR, np.uint8)
    table[: len(palette)] = palette
    colors = table[mask]
    if image is None:
        return colors
    mixed = np.round(share * colors.astype(np.float32) + (1 - share) * image).astype(np.uint8)
    return np.where(colors.any(axis=-1, keepdims=True), mixed, image)


def mistakes(image: np.ndarray, truth: np.ndarray, said: np.ndarray, num_classes: int) -> np.ndarray:
    """The image in pale grey with wrong pixels in red (missed, or wrong) and, of two classes, blue (spurious)."""
    grey = cv2.cvtColor(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    shown = np.round(255 - RIGHT_SHARE * (255 - grey.astype(np.float32))).astype(np.uint8)
    wrong = (truth != said) & (truth != IGNORED)
    shown[wrong] = MISSED
    if num_classes == 2:
        shown[wrong & (truth == 0)] = SPURIOUS
    shown[truth == IGNORED] = IGNORED_COLOR
    return shown


def evenly_ranked(scores: np.ndarray, count: int) -> list[int]:
    """Indices of the worst, the best and evenly spaced ones between, worst first; NaN is left out."""
    order = [int(index) for index in np.argsort(scores, kind="stable") if not np.isnan(scores[index])]
    if len(order) <= count:
        return order
    return [order[round(place)] for place in np.linspace(0, len(order) - 1, count)]


def _errors_in_words(example: Example) -> str:
    asked = example.truth != IGNORED
    wrong = (example.truth != example.said) & asked
    return f"{100 * wrong.sum() / max(1, asked.sum()):.1f} % of the pixels are wrong"


def _key(examples: Sequence[Example], classes: Sequence[str], palette: np.ndarray) -> list[tuple[str, str]]:
    seen = np.unique(np.concatenate([np.unique(mask) for each in examples for mask in (each.truth, each.said)]))
    shown = [int(value) for value in seen if value < len(classes) and palette[value].any()][:MAX_KEY]
    entries = [(_hex(palette[value]), classes[value]) for value in shown]
    if len(classes) == 2:
        return [*entries, (_hex(MISSED), f"{classes[1]} missed"), (_hex(SPURIOUS), "spurious")]
    return [*entries, (_hex(MISSED), "wrong")]


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in color)


def _resized(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    shrinks = size[0] < picture.shape[1]
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST)
