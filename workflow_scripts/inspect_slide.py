"""Writes down what is known of a slide: size, levels, micrometres a pixel, format, what looks odd; and a thumbnail.

With --keep-going a slide that cannot be read gets a JSON file with its problem and a grey thumbnail, and the exit code
is 0, so that one pass over a collection finds all problems.
"""

import argparse
from pathlib import Path

from dinoscope.cli import HelpFormatter, run_script
from dinoscope.files import write_json
from dinoscope.slides.inspection import THUMBNAIL_PX, describe_slide
from dinoscope.slides.privacy import without_file_name
from dinoscope.slides.reader import Slide
from dinoscope.slides.skipping import failure_of
from dinoscope.visualize.overview import placeholder, save_jpeg


def main() -> None:
    """Parses the command line and inspects."""
    arguments = _parser().parse_args()

    def inspect() -> None:
        with Slide(arguments.slide, arguments.slide_id, arguments.slide_mpp, reader=arguments.slide_reader) as slide:
            description, thumbnail = describe_slide(slide)
        save_jpeg(thumbnail, arguments.thumbnail)
        write_json(arguments.output, description)

    if not arguments.keep_going:
        inspect()
    elif (reason := failure_of(inspect)) is not None:
        save_jpeg(placeholder("this slide cannot be read"), arguments.thumbnail)
        error = without_file_name(reason, arguments.slide, arguments.slide_id)
        write_json(arguments.output, {"slide_id": arguments.slide_id, "error": error})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--slide", type=Path, required=True, help="file, or folder of a DICOM series")
    parser.add_argument("--slide-id", required=True, metavar="ID", help="name of the slide in all results")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT.json", help="file to write")
    parser.add_argument(
        "--thumbnail",
        type=Path,
        required=True,
        metavar="OUT.jpg",
        help=f"picture of the slide to write, at most {THUMBNAIL_PX} pixels on its longer side",
    )
    parser.add_argument(
        "--slide-mpp", type=float, metavar="M", help="micrometres a level-0 pixel; what the file says when not given"
    )
    parser.add_argument("--slide-reader", metavar="MODULE:CLASS", help="reader of your own, for other formats")
    parser.add_argument("--keep-going", action="store_true", help="write down why a slide cannot be read and exit 0")
    return parser


if __name__ == "__main__":
    run_script(main)
