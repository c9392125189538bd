"""Packs the tiles of one slide as JPEG into Arrow files, for training from storage that is slow to read slides from.

    python workflow_scripts/pack_tiles.py --slide slides/S-001.svs --slide-id S-001 \\
        --tiles results/tiles/train/S-001.parquet --output results/packed/train/S-001.arrow

A slide of more tiles than one file should hold gets further files, .more/S-001.2.arrow and so on beside the first one,
which names them and comes last.
"""

import argparse
import functools
import logging
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.data.packing import FILE_BYTES, SUBSAMPLINGS, pack_slide
from dinoscope.slides.reader import Slide


def main() -> None:
    """Opens the slide and packs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--slide", type=Path, required=True, help="the slide: a file, or the folder of a DICOM series")
    add("--slide-id", required=True, help="its name")
    add("--slide-mpp", type=float, metavar="M", help="micrometres a pixel at level 0, in place of what the file says")
    add("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    add("--tiles", type=Path, required=True, help="manifest of the slide's tiles (tile_slide.py)")
    add("--output", type=Path, required=True, metavar="OUT.arrow", help="file to write, the first where there are more")
    add("--quality", type=int, choices=range(1, 101), metavar="1-100", default=90, help="of the JPEGs")
    add("--subsampling", choices=SUBSAMPLINGS, default="4:2:0", help="of their colour")
    add("--copy-stored", action="store_true", help="copy tiles that the slide stores as such, as JPEG, without loss")
    add("--file-gb", type=float, default=FILE_BYTES / 1e9, metavar="GB", help="JPEGs that go into one file, about")
    add("--on-error", choices=("fail", "skip"), default="fail", help="skip: leave places of unreadable tiles empty")
    arguments = parser.parse_args()
    how = {"mpp": arguments.slide_mpp, "reader": arguments.slide_reader}
    opened = functools.partial(Slide, arguments.slide, arguments.slide_id, **how)
    options = {"quality": arguments.quality, "subsampling": arguments.subsampling}
    options |= {"copy_stored": arguments.copy_stored, "file_bytes": round(arguments.file_gb * 1e9)}
    options["skip_unreadable"] = arguments.on_error == "skip"
    num_bytes = pack_slide(arguments.slide_id, opened, arguments.tiles, arguments.output, **options)
    logging.info("slide %s: %.1f MB of JPEG", arguments.slide_id, num_bytes / 1e6)


if __name__ == "__main__":
    run_script(main)
