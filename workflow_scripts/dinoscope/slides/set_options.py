"""Tile sets on the command lines of scripts: `--set NAME PX MPP …`, and what is said of them by name."""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

from dinoscope.errors import ConfigError
from dinoscope.slides.grid import EDGES, MAX_UPSAMPLE, TileSet

__all__ = ["add_reading_options", "add_set_options", "tile_sets"]

_FIELDS = ("min_tissue", "stride", "edge", "max_upsample")


def add_set_options(group: argparse._ActionsContainer) -> None:
    """Options on which tiles of a set are kept, and how they are read."""
    share = _named(float, "a share from 0 to 1", lambda share: 0 <= share <= 1)
    pixels = _named(int, "a whole number above 0", lambda pixels: pixels > 0)
    _add(
        group,
        "--min-tissue",
        share,
        "F",
        "least share of tissue of a set's tiles, 0 to 1; when not given 0.5, with method fluorescence 0.25, none 0, "
        "cytology as much as 30 um2 of cells",
    )
    _add(
        group,
        "--stride",
        pixels,
        "PX",
        "distance of a set's tiles in pixels at its mpp; the tile's side when not given",
    )
    add_reading_options(group)


def add_reading_options(group: argparse._ActionsContainer) -> None:
    """Options on how tiles of a set are read, on which it depends whether a slide suits it."""
    edge = _named(str, " or ".join(EDGES), lambda edge: edge in EDGES)
    factor = _named(float, "a factor of at least 1", lambda factor: factor >= 1)
    _add(
        group,
        "--edge",
        edge,
        "E",
        "what becomes of the rest at the right and lower edge: drop (left out, the default), shift (a last tile is "
        "moved inwards), pad (a last tile reaches over the edge and is white there)",
    )
    _add(
        group,
        "--max-upsample",
        factor,
        "F",
        f"how many times the finest level may be enlarged, {MAX_UPSAMPLE:g} when not given",
    )


def tile_sets(arguments: argparse.Namespace) -> Iterator[TileSet]:
    """The sets of a command line, in its order: each of `arguments.sets` begins with name, pixels and mpp.

    Raises:
        ConfigError: There can be no such tiles, or something is said of a set that there is not.
    """
    given = {field: dict(getattr(arguments, field, ())) for field in _FIELDS}
    names = {name for name, *_ in arguments.sets}
    for field, by_name in given.items():
        if unknown := by_name.keys() - names:
            raise ConfigError(f"--{field.replace('_', '-')} {min(unknown)}=...: there is no --set of this name")
    for name, tile_px, mpp, *_ in arguments.sets:
        options = {field: by_name[name] for field, by_name in given.items() if name in by_name}
        if "stride" in options:
            options["stride_px"] = options.pop("stride")
        try:
            mpps = tuple(float(part) for part in mpp.split(","))
            yield TileSet(name, int(tile_px), mpps[0] if len(mpps) == 1 else mpps, **options)
        except ConfigError:
            raise
        except ValueError:
            raise ConfigError(f"--set {name} {tile_px} {mpp}: wanted whole pixels and micrometres a pixel") from None


def _add(
    group: argparse._ActionsContainer, option: str, kind: Callable[[str], tuple[str, Any]], unit: str, meaning: str
) -> None:
    group.add_argument(option, nargs="+", action="extend", type=kind, default=[], metavar=f"NAME={unit}", help=meaning)


def _named(kind: type, wanted: str, fits: Callable[[Any], bool]) -> Callable[[str], tuple[str, Any]]:
    def parse(text: str) -> tuple[str, Any]:
        name, _, value = text.rpartition("=")
        try:
            number = kind(value)
        except ValueError:
            number = None
        if not name or number is None or not fits(number):
            raise argparse.ArgumentTypeError(f"{text!r}: wanted NAME={wanted}")
        return name, number

    return parse
