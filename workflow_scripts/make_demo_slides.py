"""Draws the demo slides: three H&E, one immunohistochemistry and one cytology slide, as pyramidal TIFFs.

They are small (about 2.5 x 2.3 mm at 0.5 um a pixel), contain nothing of a patient, and are the same bytes for the same
seed. Takes some 20 seconds on two cores. With --biopsies many tiny ones in their place, of two kinds from two sites, by
which the demo of the pilot judges models.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.slides.demo import make_demo_slides
from dinoscope.slides.demo_biopsies import biopsy_number, make_demo_biopsies


def main() -> None:
    """Parses the command line and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="folder for the .tiff files")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other tissue of the same kinds")
    parser.add_argument("--processes", type=int, metavar="N", help="slides drawn at once; one a core when not given")
    parser.add_argument("--biopsies", nargs="+", type=Path, metavar="NAME", help="demo_biopsy_000 and so on, instead")
    arguments = parser.parse_args()
    if arguments.biopsies:
        numbers = [biopsy_number(path.stem) for path in arguments.biopsies]
        make_demo_biopsies(arguments.output_dir, numbers, arguments.seed, arguments.processes)
    else:
        make_demo_slides(arguments.output_dir, arguments.seed, arguments.processes)


if __name__ == "__main__":
    run_script(main)
