"""Joins the tile manifests of many slides into one for training, sorted by slide id, in bounded memory.

With --slides-output it also writes the table of these slides (size, micrometres a pixel, case, use, number of tiles).
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.file_lists import files_among
from dinoscope.slides.manifest import merge_manifests, read_metadata
from dinoscope.slides.summary import write_slide_summary
from dinoscope.slides.table import read_slide_table


def main() -> None:
    """Parses the command line and merges."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        fromfile_prefix_chars="@",
        epilog="@FILE reads arguments from a file, one a line.",
    )
    parser.add_argument(
        "tiles",
        type=Path,
        nargs="+",
        metavar="TILES.parquet",
        help="manifests of tile_slide.py, or a folder with nothing but such, in any order",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.parquet", help="merged manifest to write")
    parser.add_argument("--slides-output", type=Path, metavar="OUT.parquet", help="table of the slides to write")
    parser.add_argument("--slides", metavar="SPEC", help="slide table, folder or glob; needed for --slides-output")
    parser.add_argument("--splits", type=Path, metavar="splits.tsv", help="table of slide_id and use that was decided")
    arguments = parser.parse_args()
    if arguments.slides_output and not arguments.slides:
        parser.error("--slides-output needs --slides")
    tiles = files_among(arguments.tiles, ".parquet")
    digest = merge_manifests(tiles, arguments.output)
    if arguments.slides_output:
        records = read_slide_table(arguments.slides)
        write_slide_summary(arguments.slides_output, tiles, records, arguments.splits)
    merged = read_metadata(arguments.output)
    logging.info("%d tiles of %d slides, digest %s", merged["num_tiles"], merged["num_slides"], digest[:12])


if __name__ == "__main__":
    run_script(main)
