"""Writes the table of all inspected slides, one row a slide, those with problems first."""

import argparse
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.slides.inspection import write_report


def main() -> None:
    """Parses the command line and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=HelpFormatter,
        fromfile_prefix_chars="@",
        epilog="@FILE reads arguments from a file, one a line.",
    )
    parser.add_argument("inspected", type=Path, nargs="+", metavar="SLIDE.json", help="files of inspect_slide.py")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.tsv", help="table to write")
    arguments = parser.parse_args()
    rows = write_report(arguments.output, arguments.inspected)
    odd = [row for row in rows if row["problems"] != "none"]
    for row in odd:
        logging.warning("%s: %s", row["slide_id"], row["problems"])
    logging.info("%d slides inspected, %d with problems", len(rows), len(odd))


if __name__ == "__main__":
    run_script(main)
