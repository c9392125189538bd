"""Writes the table of all slides (parquet): size, micrometres a pixel, case, use, tiles; no paths, no labels."""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.file_lists import files_among
from dinoscope.slides.summary import write_slide_summary
from dinoscope.slides.table import read_slide_table


def main() -> None:
    """Parses the command line and writes the table."""
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
        help="tile manifests, one a slide, or a folder with nothing but such",
    )
    parser.add_argument("--slides", required=True, metavar="SPEC", help="slide table (.tsv), folder or glob")
    parser.add_argument("--splits", type=Path, metavar="splits.tsv", help="which slides train and which are held out")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.parquet", help="table to write")
    arguments = parser.parse_args()
    tiles = files_among(arguments.tiles, ".parquet")
    write_slide_summary(arguments.output, tiles, read_slide_table(arguments.slides), arguments.splits)
    logging.info("%d slides", len(tiles))


if __name__ == "__main__":
    run_script(main)
