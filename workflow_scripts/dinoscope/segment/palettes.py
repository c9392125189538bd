"""Colours of classes."""

from collections.abc import Mapping, Sequence

import numpy as np

from dinoscope.errors import ConfigError

__all__ = ["Colour", "default_palette", "palette_of"]

Colour = str | Sequence[int]


def default_palette(count: int) -> np.ndarray:
    """Colours of so many classes as Pascal VOC chooses them, uint8 (count, 3): black, maroon, green, olive, ….

    Bits 0, 3, 6 … of a class's number are the highest, second, third … bit of its red; 1, 4, 7 … of its green, and
    2, 5, 8 … of its blue.
    """
    numbers = np.arange(count)
    channels = [
        sum((numbers >> (3 * place + channel) & 1) << (7 - place) for place in range(3)) for channel in range(3)
    ]
    return np.stack(channels, axis=1).astype(np.uint8)


def palette_of(colours: Mapping[str, Colour] | None, classes: Sequence[str], default: np.ndarray) -> np.ndarray:
    """`default` with the colours that are given, by class: "#rrggbb" or red, green and blue.

    Raises:
        ConfigError: A class is unknown, or its colour is none.
    """
    palette = default.copy()
    for name, colour in (colours or {}).items():
        if name not in classes:
            raise ConfigError(f"palette: {name!r} is none of the classes {', '.join(classes)}")
        palette[list(classes).index(name)] = _rgb(name, colour)
    return palette


def _rgb(name: str, colour: Colour) -> list[int]:
    try:
        values = list(bytes.fromhex(colour.removeprefix("#")) if isinstance(colour, str) else map(int, colour))
    except (TypeError, ValueError):
        values = []
    if len(values) != 3 or not all(0 <= value <= 255 for value in values):
        raise ConfigError(f"palette: {colour!r} of {name} is no colour: write '#rrggbb' or [red, green, blue]")
    return values
