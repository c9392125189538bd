"""Finds the tissue of a slide and lays the tiles of one or several sets over it.

Writes a parquet manifest a set, one row a tile (x and y are level-0 pixels), an overview picture, and the tissue's
outlines as GeoJSON, which QuPath opens and which may come back, edited, as --annotations.

    tile_slide.py --slide S1.svs --slide-id S1 --set train 512 0.5 train/S1.parquet --set features 224 0.5 \\
        features/S1.parquet --overview S1.jpg --outline S1.geojson
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.errors import ConfigError
from dinoscope.slides.geojson import read_annotations, write_outline
from dinoscope.slides.grid import TileSet
from dinoscope.slides.quality import QualityLimits
from dinoscope.slides.reader import Slide
from dinoscope.slides.set_options import add_set_options, tile_sets
from dinoscope.slides.skipped_tiles import write_skipped
from dinoscope.slides.skipping import Attempt, add_skip_arguments, try_slide
from dinoscope.slides.tiling import tile_slide
from dinoscope.slides.tissue import METHODS
from dinoscope.visualize.overview import draw_overview, placeholder, save_jpeg


def main() -> None:
    """Parses the command line, tiles, draws."""
    arguments = _parser().parse_args()
    cv2.setNumThreads(1)  # a job has one core, and pictures this small gain nothing from more
    wanted = list(zip(tile_sets(arguments), (Path(path) for *_, path in arguments.sets), strict=True))

    def give_up(reason: str) -> None:
        write_skipped(arguments.slide_id, wanted, reason)
        save_jpeg(placeholder("this slide was skipped"), arguments.overview)
        if arguments.outline is not None:
            write_outline(arguments.outline, np.zeros((1, 1), bool), 1.0, 1, 1)

    how = (arguments.on_error, arguments.attempt, arguments.skip_record)
    attempt = Attempt(arguments.slide, arguments.slide_id, "tiles", *how)
    try_slide(lambda: _tile(arguments, wanted), give_up, attempt)


def _tile(arguments: argparse.Namespace, wanted: list[tuple[TileSet, Path]]) -> None:
    annotations = None
    if (arguments.tissue_method == "annotations") != (arguments.annotations is not None):
        raise ConfigError("--tissue-method annotations and --annotations FILE need each other")
    if arguments.annotations is not None:
        annotations = read_annotations(arguments.annotations, arguments.slide_id, arguments.include, arguments.exclude)
    with Slide(arguments.slide, arguments.slide_id, arguments.slide_mpp, reader=arguments.slide_reader) as slide:
        tissue, grids = tile_slide(
            slide,
            wanted,
            arguments.tissue_method,
            limits=QualityLimits(**{name: getattr(arguments, name) for name in (*_LIMITS, "measure_focus")}),
            min_area_um2=arguments.min_area_um2,
            max_hole_um2=arguments.max_hole_um2,
            annotations=annotations,
        )
        if arguments.outline is not None:
            write_outline(arguments.outline, tissue.mask, tissue.downsample, slide.width, slide.height)
        save_jpeg(draw_overview(slide, tissue, grids), arguments.overview)


_LIMITS = {
    "max_white": "share of a tile that is white (bare glass, lumina, fat)",
    "max_black": "share of a tile that is black (never scanned, folds)",
    "max_grey": "share of a tile that is grey (dust, bubbles)",
    "max_pen": "share of a tile that is pen ink",
    "min_focus": "variance of the Laplacian at the tile's mpp, squared grey levels; every tile is read for it",
}


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
        help="a tile set: its name, side of a tile in pixels, micrometres a pixel (or several, as 0.25,0.5,1), file to "
        "write; may be repeated",
    )
    parser.add_argument("--overview", type=Path, required=True, metavar="OUT.jpg", help="picture to write")
    parser.add_argument("--outline", type=Path, metavar="OUT.geojson", help="outlines of the tissue to write")
    parser.add_argument(
        "--slide-mpp", type=float, metavar="M", help="micrometres a level-0 pixel; what the file says when not given"
    )
    parser.add_argument("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add_skip_arguments(parser)
    _add_tissue_options(parser.add_argument_group("tissue"))
    add_set_options(parser.add_argument_group("tile sets"))
    quality = parser.add_argument_group("quality", "Limits that a tile must keep to; without them, none is left out.")
    for name, meaning in _LIMITS.items():
        bound, unit = ("largest", "F") if name.startswith("max") else ("least", "V")
        quality.add_argument(f"--{name.replace('_', '-')}", type=float, metavar=unit, help=f"{bound} {meaning}")
    quality.add_argument(
        "--measure-focus", action="store_true", help="write down the focus of all tiles, without a limit"
    )
    return parser


def _add_tissue_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--tissue-method", choices=METHODS, default="auto", help="how tissue is found")
    for name, what in (("min-area", "smallest piece of tissue"), ("max-hole", "largest hole that is filled")):
        group.add_argument(f"--{name}-um2", type=float, metavar="A", help=f"{what}, um2; else the method's own")
    group.add_argument("--annotations", type=Path, metavar="GEOJSON", help="outlines, for method annotations")
    for name, what in (("include", "tissue"), ("exclude", "cut out of it")):
        default = ["Tissue"] if name == "include" else []
        group.add_argument(
            f"--{name}", nargs="*", default=default, metavar="CLASS", help=f"annotations that are {what}"
        )


if __name__ == "__main__":
    run_script(main)
