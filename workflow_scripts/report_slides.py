"""Writes the table of all inspected slides, one row a slide, those with problems first.

With --slides it also compares the slides with the slide table, and with --set it tells which are too coarse or too
small for which tiles. What no single slide is to blame for stands in a first row, whose slide_id is *.
"""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.file_lists import files_among
from dinoscope.slides.collection import write_report
from dinoscope.slides.set_options import add_reading_options, tile_sets
from dinoscope.slides.table import COLLECTION, read_slide_table


def main() -> None:
    """Parses the command line and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        fromfile_prefix_chars="@",
        epilog="@FILE reads arguments from a file, one a line.",
    )
    parser.add_argument(
        "inspected", type=Path, nargs="+", metavar="SLIDE.json", help="files of inspect_slide.py, or a folder of them"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.tsv", help="table to write")
    parser.add_argument("--slides", metavar="SPEC", help="slide table (.tsv), folder or glob")
    parser.add_argument(
        "--set",
        nargs=3,
        action="append",
        default=[],
        dest="sets",
        metavar=("NAME", "PX", "MPP"),
        help="a tile set that is wanted: its name, side of a tile in pixels, micrometres a pixel; may be repeated",
    )
    add_reading_options(parser)
    arguments = parser.parse_args()
    records = read_slide_table(arguments.slides) if arguments.slides else []
    inspected = files_among(arguments.inspected, ".json")
    rows = write_report(arguments.output, inspected, records, list(tile_sets(arguments)))
    odd = [row for row in rows if row["problems"] != "none"]
    for row in odd:
        logging.warning("%s: %s", row["slide_id"], row["problems"])
    slides = [row for row in odd if row["slide_id"] != COLLECTION]
    logging.info("%d of %d slides have problems; %s says which", len(slides), len(inspected), arguments.output)


if __name__ == "__main__":
    run_script(main)
