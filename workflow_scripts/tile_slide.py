"""Finds the tissue of a slide and lays the tiles of one or several sets over it.

Writes a parquet manifest a set, one row a tile (x and y are level-0 pixels), and an overview picture.

    tile_slide.py --slide S1.svs --slide-id S1 --set train 512 0.5 train/S1.parquet --set features 224 0.5 \\
        features/S1.parquet --overview S1.jpg
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.slides.grid import TileSet
from dinoscope.slides.reader import Slide
from dinoscope.slides.skipped_tiles import write_skipped
from dinoscope.slides.skipping import Attempt, add_skip_arguments, try_slide
from dinoscope.slides.tiling import tile_slide
from dinoscope.slides.tissue import METHODS
from dinoscope.visualize.overview import draw_overview, placeholder, save_jpeg


def main() -> None:
    """Parses the command line, tiles, draws."""
    arguments = _parser().parse_args()
    tile_sets = _tile_sets(arguments)

    def tile() -> None:
        with Slide(arguments.slide, arguments.slide_id, arguments.slide_mpp, reader=arguments.slide_reader) as slide:
            tissue, grids = tile_slide(slide, tile_sets, arguments.tissue_method)
            save_jpeg(draw_overview(slide, tissue, grids), arguments.overview)

    def give_up(reason: str) -> None:
        write_skipped(arguments.slide_id, tile_sets, reason)
        save_jpeg(placeholder("this slide was skipped"), arguments.overview)

    how = (arguments.on_error, arguments.attempt, arguments.skip_record)
    try_slide(tile, give_up, Attempt(arguments.slide, arguments.slide_id, "tiles", *how))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--slide", type=Path, required=True, help="file, or folder of a DICOM series")
    parser.add_argument("--slide-id", required=True, metavar="ID", help="name of the slide in all results")
    parser.add_argument(
        "--set",
        nargs=4,
        action="append",
        required=True,
        dest="sets",
        metavar=("NAME", "PX", "MPP", "OUT.parquet"),
        help="a tile set: its name, side of a tile in pixels, micrometres a pixel, file to write; may be repeated",
    )
    parser.add_argument("--overview", type=Path, required=True, metavar="OUT.jpg", help="picture to write")
    parser.add_argument(
        "--slide-mpp", type=float, metavar="M", help="micrometres a level-0 pixel; what the file says when not given"
    )
    parser.add_argument("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add_skip_arguments(parser)
    parser.add_argument("--tissue-method", choices=METHODS, default="auto", help="how tissue is found")
    parser.add_argument(
        "--min-tissue",
        nargs="+",
        action="extend",
        type=_named(float, "a share from 0 to 1", lambda share: 0 <= share <= 1),
        default=[],
        metavar="NAME=F",
        help="least share of tissue of a set's tiles, 0 to 1; when not given 0.5, with method cytology 0.03, "
        "fluorescence 0.25, none 0",
    )
    parser.add_argument(
        "--stride",
        nargs="+",
        action="extend",
        type=_named(int, "a whole number above 0", lambda pixels: pixels > 0),
        default=[],
        metavar="NAME=PX",
        help="distance of a set's tiles in pixels at its micrometres a pixel; the tile's side when not given",
    )
    return parser


def _named(kind: type, wanted: str, fits: Callable[[float], bool]) -> Callable[[str], tuple[str, float]]:
    def parse(text: str) -> tuple[str, float]:
        name, _, value = text.rpartition("=")
        try:
            number = kind(value)
        except ValueError:
            number = None
        if not name or number is None or not fits(number):
            raise argparse.ArgumentTypeError(f"{text!r}: wanted NAME={wanted}")
        return name, number

    return parse


def _tile_sets(arguments: argparse.Namespace) -> list[tuple[TileSet, Path]]:
    least, strides = dict(arguments.min_tissue), dict(arguments.stride)
    tile_sets = []
    for name, tile_px, mpp, path in arguments.sets:
        try:
            tile_set = TileSet(name, int(tile_px), float(mpp), least.pop(name, None), strides.pop(name, None))
        except ValueError:
            raise ConfigError(f"--set {name} {tile_px} {mpp}: wanted whole pixels and micrometres a pixel") from None
        tile_sets.append((tile_set, Path(path)))
    for option, left in (("--min-tissue", least), ("--stride", strides)):
        if left:
            raise ConfigError(f"{option} {next(iter(left))}=...: there is no --set of this name")
    return tile_sets


if __name__ == "__main__":
    run_script(main)
